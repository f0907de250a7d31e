"""The memory plan against arithmetic done here; finding a micro-batch on memories that are made up."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fastgrpo.costs.counting import ModelCost
from fastgrpo.costs.held_memory import PeakBytes
from fastgrpo.costs.memory import (
    Iteration,
    beside_a_pass,
    candidates,
    choose_gradient_checkpointing,
    choose_offload,
    iteration_of,
    memory_lines,
    memory_plan,
    peak,
    predicted_micro_batch,
    with_offload,
)
from fastgrpo.engine.batch_size import (
    choose_size,
    find_micro_batch,
    fits_within,
    largest_micro_batch,
    memory_room,
    timed,
)
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from support.costs import ENCODERS, MODEL

R1 = replace(load_toml(find_preset("safediffusion-r1")), micro_batch=4)


def grpo(**fields) -> TrainConfig:
    return replace(R1, grpo=replace(R1.grpo, **fields))


def plan(config: TrainConfig, model: ModelCost = MODEL, dtype=torch.bfloat16, processes=8, micro_batch=0):
    return memory_plan(config, model, ENCODERS, dtype, processes, micro_batch or config.micro_batch)


def sizes_of(config: TrainConfig, *arguments, **keywords) -> dict[str, int]:
    return {f"{part.stage}: {part.name}": part.size for part in plan(config, *arguments, **keywords)}


# ---------------------------------------------------------------------------------------------------------------------
# The plan.


def test_memory_of_the_paper_closed_form():
    # 64 samples a GPU: 51 latents, 50 log-probs and an image each, in float32.
    trajectories = 64 * 4 * (51 * 4 * 64 * 64 + 50 + 3 * 512 * 512)
    assert sizes_of(R1) == {
        "always: UNet, fp32": 4 * 10007,
        "always: working copy of what is trained, bf16": 2 * 10007,
        "always: Adam's two moments, fp32": 8 * 10007,
        "always: gradient, fp32": 4 * 10007,
        "always: VAE and text encoder, bf16": 2 * 5003,
        "always: encoder hpsv2, fp32": 4 * 3001,
        "always: trajectories and images, fp32": trajectories,
        "rollout: 8 UNet samples, as in the update": 8 * 1013,
        "decode: 16 images in the VAE": 16 * 401,
        "reward: 64 images in hpsv2": 64 * 601,
        # A micro-batch of 4, each with and without its prompt.
        "update: 8 UNet samples' activations, bf16": 8 * 1009,
        "update: more in the backward pass, with gradients, bf16": 20_011 + 8 * 13 - 8 * 1009,
        # CUDA graphs keep theirs: the update's, which is more than the rollout's.
        "decode: CUDA graphs, of rollout and update": 20_011 + 8 * 13,
        "reward: CUDA graphs, of rollout and update": 20_011 + 8 * 13,
    }


def test_float32_has_no_working_copy():
    memory = sizes_of(R1, dtype=torch.float32)
    assert not any("working copy" in name for name in memory)
    assert memory["always: VAE and text encoder, fp32"] == 4 * 5003


def test_what_options_hold():
    plain = sizes_of(R1)
    large = sizes_of(R1, micro_batch=40)
    assert large["update: 80 UNet samples' activations, bf16"] == 80 * 1009
    assert large["update: more in the backward pass, with gradients, bf16"] == 7 + 80 * 1021 - 80 * 1009
    assert large["rollout: 80 UNet samples, as in the update"] == 80 * 1013
    ema = sizes_of(replace(R1, optim=replace(R1.optim, ema=0.99)))
    assert ema == {**plain, "always: moving average (optim.ema), fp32": 4 * 10007}
    assert sizes_of(grpo(kl=0.1)) == {**plain, "always: base UNet's own (grpo.kl), bf16": 2 * 10007}
    # With many samples the base model's pass, while all activations are there, needs more than the backward pass.
    assert sizes_of(grpo(kl=0.1), micro_batch=40)["update: 80 samples in the base UNet"] == 80 * 211
    name, means = "always: trajectories and images, fp32", 64 * 50 * 4 * 64 * 64 * 4
    for mode, kept in {"rollout": means, "replay": means, "detach": 0}.items():
        assert sizes_of(grpo(ratio_norm=True, old_log_prob=mode))[name] - plain[name] == kept


def test_another_rollout_batch_saves_nothing_and_is_shared_out_evenly():
    config = replace(R1, rollout=replace(R1.rollout, batch=48))
    # 64 images as twice 32, each with guidance.
    assert sizes_of(config)["rollout: 64 UNet samples, nothing saved"] == 64 * 211
    assert sizes_of(config, micro_batch=48)["rollout: 96 UNet samples, as in the update"] == 96 * 1013


def test_a_rollout_has_no_more_samples_than_images():
    assert sizes_of(R1, micro_batch=196)["rollout: 128 UNet samples, as in the update"] == 128 * 1013


def test_without_guidance_half():
    plain = sizes_of(replace(R1, rollout=replace(R1.rollout, guidance=1.0)))
    assert plain["update: 4 UNet samples' activations, bf16"] == 4 * 1009


def test_lora_holds_moments_and_gradients_of_adapters_only():
    config = replace(R1, model=replace(R1.model, lora_rank=4))
    memory = sizes_of(config, replace(MODEL, trained=97))
    assert memory["always: frozen UNet, bf16"] == 2 * 10007
    assert memory["always: adapters, fp32"] == memory["always: gradient, fp32"] == 4 * 97
    assert memory["always: working copy of what is trained, bf16"] == 2 * 97
    assert memory["always: Adam's two moments, fp32"] == 8 * 97


def test_beside_adapters_the_base_model_is_a_copy_of_them():
    config = replace(grpo(kl=0.1), model=replace(R1.model, lora_rank=4))
    memory = sizes_of(config, replace(MODEL, trained=97))
    assert memory["always: base UNet's own (grpo.kl), bf16"] == 2 * 97


def test_offloaded_parts_are_there_in_the_stages_that_use_them():
    config = replace(R1, optim=replace(R1.optim, ema=0.99))
    here, away = sizes_of(with_offload(config, False)), sizes_of(with_offload(config, True))
    left = {
        "always: VAE and text encoder, bf16": 2 * 5003,
        "always: encoder hpsv2, fp32": 4 * 3001,
        "always: moving average (optim.ema), fp32": 4 * 10007,
    }
    kept = 20_011 + 8 * 13  # by CUDA graphs
    came = {
        "texts: text tower of hpsv2, fp32": 4 * 1201,  # more than the text encoder's 2 * 2003, and not beside it
        "decode: VAE, bf16": 2 * (5003 - 2003),
        "reward: image tower of hpsv2, fp32": 4 * (3001 - 1201),
        "texts: CUDA graphs, of rollout and update": kept,
    }
    assert away == {name: size for name, size in here.items() if name not in left} | came
    assert set(left) <= set(here)
    # A CPU's memory is the host's; and what is not decided yet is not done.
    cpu = replace(config, engine=replace(config.engine, device="cpu"))
    assert sizes_of(with_offload(cpu, True)) == sizes_of(with_offload(cpu, False))
    assert sizes_of(config) == here


def test_offloading_leaves_no_scoring_beside_the_rollout():
    config = replace(R1, engine=replace(R1.engine, graphs="off"))
    assert "reward: the rollout that goes on meanwhile" in sizes_of(config)
    assert "reward: the rollout that goes on meanwhile" not in sizes_of(with_offload(config, True))


def test_what_comes_for_decoding_and_scoring_is_left_room_beside_graphs():
    config = with_offload(R1, True)
    trajectories = 512 * 4 * (51 * 4 * 64 * 64 + 50 + 3 * 512 * 512)
    scoring = 256 * 601 + 4 * (3001 - 1201)
    assert beside_a_pass(config, MODEL, ENCODERS, torch.bfloat16, 1) == trajectories + scoring
    many = replace(
        config, rollout=replace(R1.rollout, guidance=1.0, decode_batch=500), reward=replace(R1.reward, batch=1)
    )
    decoding = 500 * 401 + 2 * (5003 - 2003)
    assert beside_a_pass(many, MODEL, ENCODERS, torch.bfloat16, 1) == trajectories + decoding


def test_auto_offloads_where_one_pair_would_not_fit():
    def chosen_offload(room: int | None, config: TrainConfig = R1) -> tuple[bool, str]:
        return choose_offload(config, {False: MODEL, True: AGAIN}.__getitem__, ENCODERS, torch.bfloat16, 8, room)

    without, with_it = (peak(plan(with_offload(R1, on), micro_batch=1))[1] for on in (False, True))
    # In both, most is needed for scoring: without, beside VAE, text encoder and the text tower.
    assert without - with_it == 2 * 5003 + 4 * 1201
    assert [chosen_offload(room)[0] for room in (without, without - 1, 0)] == [False, True, True]
    assert chosen_offload(None) == (False, "offloading is off, as auto is on a CPU")
    for on, setting in ((True, "on"), (False, "off")):
        expected = on, f"offloading is {setting}, as engine.offload says"
        assert chosen_offload(0, with_offload(R1, on)) == expected
    # Where blocks are computed again in any case, that is counted.
    again = peak(plan(with_setting("on"), AGAIN, micro_batch=1))[1]
    assert [chosen_offload(room, with_setting("on"))[0] for room in (again, again - 1)] == [False, True]


def test_peak_is_of_one_stage_at_a_time():
    always = 18 * 10007 + 2 * 5003 + 4 * 3001
    always += 512 * 4 * (51 * 4 * 64 * 64 + 50 + 3 * 512 * 512)  # 8 GPUs' trajectories on one
    alone = replace(R1, engine=replace(R1.engine, graphs="off", overlap=False))
    assert peak(plan(alone, processes=1)) == ("reward", always + 256 * 601)
    assert peak(plan(alone, processes=1, micro_batch=256)) == ("update", always + 7 + 512 * 1021)
    overlapping = replace(R1, engine=replace(R1.engine, graphs="off"))
    assert peak(plan(overlapping, processes=1)) == ("reward", always + 256 * 601 + 8 * 1013)
    # On a CPU there are neither.
    cpu = replace(R1, engine=replace(R1.engine, device="cpu"))
    assert peak(plan(cpu, processes=1)) == ("reward", always + 256 * 601)


def test_what_graphs_keep_is_not_there_for_decoding_and_scoring():
    """A pass that is tried alone must leave room for them: together they are the plan's peak."""
    always = 18 * 10007 + 2 * 5003 + 4 * 3001
    for config in (R1, replace(R1, rollout=replace(R1.rollout, decode_batch=400))):
        beside = beside_a_pass(config, MODEL, ENCODERS, torch.bfloat16, 1)
        a_pass = 7 + 512 * 1021
        decoding, pictures = (config.rollout.decode_batch * cost for cost in (401, 2 * 211))
        trajectories = 512 * 4 * (51 * 4 * 64 * 64 + 50 + 3 * 512 * 512)
        assert beside == trajectories + max(decoding, 256 * 601, pictures)
        most = peak(plan(config, processes=1, micro_batch=256))[1]
        assert most == always + a_pass + trajectories + max(decoding, 256 * 601) <= always + a_pass + beside
    off = replace(R1, engine=replace(R1.engine, graphs="off"))
    assert beside_a_pass(off, MODEL, ENCODERS, torch.bfloat16, 1) == trajectories


def test_lines_say_every_part_and_the_peak():
    lines = memory_lines(plan(R1), "the GPU")
    assert lines[0] == "MB on the GPU"
    assert len(lines) == 2 + len(plan(R1))
    assert lines[1].split() == ["always", "UNet,", "fp32", "0.04"]
    assert lines[-1].split()[-1] == f"{peak(plan(R1))[1] / 1e6:.2f}"
    assert {len(line) for line in lines[1:]} == {72}


def test_prediction_is_the_largest_size_whose_plan_fits():
    sizes = (1, 2, 4, 8, 11, 22, 33, 66)
    for room in [peak(plan(R1, micro_batch=size))[1] for size in sizes]:
        for slack in (-1, 0, 1):
            fitting = [size for size in sizes if peak(plan(R1, micro_batch=size))[1] <= room + slack]
            predicted = predicted_micro_batch(R1, MODEL, ENCODERS, torch.bfloat16, 8, room + slack, sizes)
            assert predicted == max(fitting, default=1)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing.


AGAIN = replace(MODEL, gradient_checkpointing=True, activations=101, saving=103, learning=PeakBytes(((15_013, 17),)))


def chosen(config: TrainConfig, room: int | None, again: ModelCost = AGAIN) -> tuple[bool, str]:
    models = {False: MODEL, True: again}
    return choose_gradient_checkpointing(config, models.__getitem__, ENCODERS, torch.bfloat16, 8, room)


def with_setting(value: str) -> TrainConfig:
    return replace(R1, engine=replace(R1.engine, gradient_checkpointing=value))


@pytest.mark.parametrize("micro_batch", [0, 1, 64])
def test_auto_checkpoints_where_one_pair_would_not_fit(micro_batch):
    """Whatever micro_batch says, which is halved where it does not fit."""
    config = replace(R1, micro_batch=micro_batch)
    without = peak(plan(R1, MODEL, micro_batch=1))[1]
    with_it = peak(plan(R1, AGAIN, micro_batch=1))[1]
    # Peaks are during scoring, beside the CUDA graphs of a pass of two samples.
    assert without - with_it == 20_011 + 2 * 13 - (15_013 + 2 * 17)
    for room in (without, without + 1, 10 * without):
        assert chosen(config, room)[0] is False
    for room in (without - 1, with_it, with_it - 1, 0):
        assert chosen(config, room)[0] is True
    assert chosen(config, None) == (False, "gradient checkpointing is off, as auto is on a CPU")


def test_auto_does_not_checkpoint_where_that_would_spare_nothing():
    """Without CUDA graphs the most is needed while images are scored, when no activations are there."""
    alone = replace(R1, engine=replace(R1.engine, graphs="off", overlap=False), reward=replace(R1.reward, batch=64))
    assert peak(plan(alone, micro_batch=1))[0] == "reward"
    on, why = chosen(alone, 1)
    assert not on
    assert why.endswith(", and with it no less")


def test_on_and_off_are_not_decided():
    for value, on in (("on", True), ("off", False)):
        for room in (None, 0, 10**12):
            line = f"gradient checkpointing is {value}, as engine.gradient_checkpointing says"
            assert chosen(with_setting(value), room) == (on, line)


def test_the_reason_has_what_is_needed_and_what_is_there():
    large = {name: 10**9 * size for name, size in (("activations", 2), ("saving", 2), ("passing", 1))}
    models = {
        False: replace(MODEL, **large, learning=PeakBytes(((10**10, 10**9),))),
        True: replace(AGAIN, **large, learning=PeakBytes(((5 * 10**9, 10**9),))),
    }
    lines = [
        choose_gradient_checkpointing(R1, models.__getitem__, ENCODERS, torch.bfloat16, 8, room)[1]
        for room in (20 * 10**9, 11 * 10**9)
    ]
    # 10 or 5 GB and twice 1, and 0.415 for trajectories and images, as above.
    assert lines[0] == "gradient checkpointing is off: of 20.00 GB one pair needs 12.42"
    expected = "gradient checkpointing is on: of 11.00 GB one pair needs 12.42 without it, 7.42 with it"
    assert lines[1] == expected


def test_the_plan_names_checkpointed_activations():
    memory = sizes_of(R1, AGAIN)
    assert memory["update: 8 UNet samples' activations, checkpointed, bf16"] == 8 * 101
    assert memory["update: more in the backward pass, with gradients, bf16"] == 15_013 + 8 * 17 - 8 * 101
    assert memory["rollout: 8 UNet samples, as in the update"] == 8 * 103


def test_a_rollouts_pass_is_a_smaller_share_beside_passes_that_compute_twice():
    work = iteration_of(replace(R1, prompts_per_iteration=4), 50, 64 * 49, 1, gradient_checkpointing=True)
    assert work == replace(WORK, forwards=4)
    # 64 samples as 2 x 32 in 50 steps; 196 pairs as 7 x 32, 16 times.
    assert work.passes(32) == 50 * 2 / 4 + 16 * 7
    assert work.padding(32) == pytest.approx(32 * (25 + 112) / (50 * 64 / 4 + 16 * 196) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The micro-batch.


WORK = Iteration(samples=64, steps=50, updates=16, pairs=196)
POWERS = (1, 2, 4, 8, 16, 32, 64)


def filled_up(size: int, work: Iteration) -> float:
    """What an iteration computes over what it needs, less 1; passes are cut off one by one."""
    passes = {"samples": 0, "pairs": 0}
    for kind in passes:
        left = getattr(work, kind)
        while left > 0:
            left, passes[kind] = left - size, passes[kind] + 1
    done = size * (work.steps * passes["samples"] / 3 + work.updates * passes["pairs"])
    return done / (work.steps * work.samples / 3 + work.updates * work.pairs) - 1


def test_padding_is_what_is_computed_for_nothing() -> None:
    for size, percent in ((16, 4.6), (32, 10.7), (33, 1.6), (64, 22.8)):
        assert WORK.padding(size) == pytest.approx(filled_up(size, WORK))
        assert round(100 * WORK.padding(size), 1) == percent


@pytest.mark.parametrize(
    "work",
    [
        WORK,
        Iteration(samples=96, steps=12, updates=4, pairs=192),
        Iteration(samples=512, steps=50, updates=16, pairs=1568),
        Iteration(samples=7, steps=5, updates=3, pairs=11),
        Iteration(samples=0, steps=50, updates=16, pairs=196),
        Iteration(samples=8, steps=50, updates=1, pairs=1),
    ],
    ids=str,
)
def test_candidates_are_few_and_nearly_full(work: Iteration) -> None:
    sizes = candidates(work)
    assert sizes[0] == 1
    assert sizes[-1] <= work.pairs
    assert len(sizes) <= math.ceil(math.log2(work.pairs)) + 1
    assert all(1.25 <= b / a <= 4 for a, b in itertools.pairwise(sizes))
    for size in sizes[1:]:
        octave = 2 ** math.ceil(math.log2(size))
        others = range(octave // 2 + 1, min(octave, work.pairs) + 1)
        assert work.padding(size) <= min(work.padding(other) for other in others) + 0.005
        assert work.padding(size) <= 0.25


def test_candidates_of_the_paper() -> None:
    config = replace(R1, prompts_per_iteration=4)
    assert iteration_of(config, 50, 64 * 49, 1) == WORK
    assert iteration_of(R1, 50, 512 * 49, 8) == WORK, "every process has as many pairs"
    assert candidates(WORK) == (1, 2, 4, 8, 11, 22, 33, 66)
    # What a rollout draws by itself is not filled up to a micro-batch.
    alone = iteration_of(replace(config, rollout=replace(R1.rollout, batch=48)), 50, 64 * 49, 1)
    assert candidates(alone) == (1, 2, 4, 7, 14, 28, 49, 98, 196)


@pytest.mark.parametrize("fixed", [0.0, 2e-3, 8e-3, 30e-3])
@pytest.mark.parametrize("room", [22, 40, 66, 200])
def test_the_chosen_size_is_filled_to_two_percent(room: int, fixed: float) -> None:
    """14 ms a pair as on a GPU, and the cost of a pass. Larger powers of two compute 4.6 to 22.8% for nothing."""

    def seconds(size: int) -> float:
        return fixed + 14e-3 * size

    found = find_micro_batch(lambda size: size <= room, seconds, WORK, predicted=32)
    assert filled_up(found.size, WORK) <= 0.02
    before = choose_size({size: seconds(size) for size in POWERS if size <= room and size >= 8}, WORK)
    took, took_before = (seconds(size) * WORK.passes(size) for size in (found.size, before))
    assert took <= took_before * 1.02
    if fixed == 30e-3:
        assert filled_up(before, WORK) > 0.04
        assert took < 0.98 * took_before


@pytest.mark.parametrize("predicted", [0, 1, 7, 8, 60, 200, 10_000])
@pytest.mark.parametrize("room", [1, 2, 5, 7, 8, 9, 15, 64, 77, 195, 500])
def test_largest_of_a_memory(room, predicted):
    """Up to 8 every size, then multiples of 8; a size is tried once."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    limit = 196
    expected = min(room, limit) if room < 8 else min(room, limit) // 8 * 8
    assert largest_micro_batch(fits, limit, predicted) == expected
    assert len(tried) == len(set(tried))
    assert max(tried) <= limit
    # Doubling or halving crosses a factor of 196 in 8 tries; what it leaves are at most 24 sizes, 5 halvings.
    assert len(tried) <= 8 + 5


def test_a_right_prediction_is_confirmed_with_two_tries():
    tried: list[int] = []
    sizes = (1, 2, 4, 8, 16, 32, 64)
    assert largest_micro_batch(lambda size: not tried.append(size) and size <= 32, 64, 40, sizes) == 32
    assert tried == [32, 64]


@pytest.mark.parametrize("seed", range(50))
def test_what_is_returned_did_fit_on_a_fragmented_memory(seed):
    generator = torch.Generator().manual_seed(seed)
    good = {size for size in range(1, 197) if torch.rand(1, generator=generator) < 0.7}
    tried: dict[int, bool] = {}

    def fits(size: int) -> bool:
        assert size not in tried
        tried[size] = size in good
        return tried[size]

    try:
        assert tried[largest_micro_batch(fits, 196, 40)]
    except torch.OutOfMemoryError:
        assert not any(tried.values())


def test_nothing_fits():
    tried: list[int] = []
    with pytest.raises(torch.OutOfMemoryError, match="not even the smallest"):
        largest_micro_batch(lambda size: bool(tried.append(size)), 64, 32)
    assert min(tried) == 1


def test_equally_fast_the_smaller_is_chosen():
    """At the same time for a pair the update decides: 196 pairs are 13 x 16, 7 x 32 or 4 x 64, filled up."""
    assert choose_size({size: 1e-3 * size for size in (16, 32, 64)}, WORK) == 16
    # 64 computes 256 pairs where 196 are needed, but each in half the time.
    assert choose_size({16: 16e-3, 32: 32e-3, 64: 32e-3}, WORK) == 64


@pytest.mark.parametrize(("gain", "chosen"), [(1.0, 16), (0.99, 16), (0.97, 32)])
def test_two_percent_are_no_reason_for_more_memory(gain, chosen):
    work = replace(WORK, pairs=192)  # of which both are divisors
    assert choose_size({16: 16e-3, 32: 32e-3 * gain}, work) == chosen


def test_choice_minimises_the_seconds_of_an_iteration():
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        seconds = {size: size * (1 + torch.rand(1, generator=generator).item()) for size in (8, 16, 32, 64)}
        least = {n: s * (50 * (64 // n) / 3 + 16 * math.ceil(196 / n)) for n, s in seconds.items()}
        chosen = choose_size(seconds, WORK)
        assert least[chosen] <= 1.02 * min(least.values())
        assert chosen == choose_size(dict(reversed(seconds.items())), WORK)


def test_find_tries_times_chooses_and_is_recorded():
    asked: list[int] = []

    def seconds(size: int) -> float:
        asked.append(size)
        return 1e-3 * size * (1 + 8 / size)  # a fixed cost: larger is faster

    found = find_micro_batch(lambda size: size <= 40, seconds, WORK, predicted=64)
    assert asked == [8, 11, 22, 33]
    assert (found.size, found.largest) == (33, 33)
    assert found.seconds[-1] == (33, pytest.approx(0.041))
    assert "33: 1.2 ms a pair" in found.line()
    # No micro-batch is larger than an optimizer step's pairs.
    few = replace(WORK, pairs=20)
    assert find_micro_batch(lambda size: True, seconds, few, predicted=64).largest <= 20


def test_timed_is_the_median_without_the_first_call():
    moments = iter([0.0, 100.0, 100.0, 103.0, 200.0, 201.0, 300.0, 302.0])
    calls: list[int] = []
    assert timed(calls.append, torch.device("cpu"), lambda: next(moments))(7) == 2.0
    assert calls == [7] * 4


class Gpu:
    """torch.cuda's memory, as far as it is asked for; n pairs take 10 + n bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, others: int):
        self.total, self.others, self.reserved, self.most = total, others, 0, 0
        names = ("mem_get_info", "memory_reserved", "max_memory_reserved", "empty_cache", "reset_peak_memory_stats")
        for name in (*names, "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def run(self, size: int) -> None:
        self.reserved = min(10 + size, self.total - self.others)
        self.most = max(self.most, self.reserved)
        if 10 + size > self.reserved:
            raise torch.OutOfMemoryError

    def mem_get_info(self, device):
        return self.total - self.others - self.reserved, self.total

    def memory_reserved(self, device):
        return self.reserved

    def max_memory_reserved(self, device):
        return self.most

    def empty_cache(self):
        self.reserved = 0

    def reset_peak_memory_stats(self, device):
        self.most = self.reserved

    def synchronize(self, device):
        pass


def test_fitting_is_within_the_share_that_others_leave(monkeypatch):
    gpu, device = Gpu(monkeypatch, total=100, others=20), torch.device("cuda")
    room = memory_room(device, 0.9)
    assert room == 70
    fits = fits_within(gpu.run, device, room)
    assert largest_micro_batch(fits, 1000, 1000, range(1, 1001)) == 60
    assert not fits(65)  # would go, but into what is to stay free
    assert not fits(200)  # runs out of memory
    assert fits(60)  # and what that left behind does not count


@pytest.mark.gpu
def test_probe_on_a_device():
    """At 64 MB a pair it fits as often as the room is large; an impossible one leaves the device usable."""
    device = torch.device("cuda")
    fits = fits_within(lambda size: torch.empty(size << 26, dtype=torch.int8, device=device), device, 10 << 26)
    assert largest_micro_batch(fits, 64, 4, range(1, 65)) == 10
    assert not fits(1 << 20)
    assert torch.ones(3, device=device).sum().item() == 3
