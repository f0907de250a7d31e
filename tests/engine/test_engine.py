"""Every way of running the passes gives what plain calls give; what cannot is found out and said."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fastgrpo import train, update
from fastgrpo.assembly import Training, load_training
from fastgrpo.costs.rates import device_name
from fastgrpo.costs.throughput import count_and_measure
from fastgrpo.engine import batch_size, setup
from fastgrpo.engine.batch_size import MicroBatchFinder, decide_gradient_checkpointing
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.record import EngineRecord
from fastgrpo.engine.setup import decoded_at_once
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import MicroBatch, blank_batch
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.models.check import describe
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks
from fastgrpo.training import iterate
from fastgrpo.unet import compilation
from fastgrpo.unet.copies import computing_unet
from fastgrpo.unet.fused import FusedResnetBlock2D
from support.micro_batches import Rows, noise_batch
from support.training import TIMED, altered


@pytest.fixture(scope="module")
def base(config_file: Path) -> TrainConfig:
    """Linear in the gradient, with no decision near a bound: AdamW with an eps of 1, a wide clip range."""
    changes = {
        "engine.threads": 1,
        "iterations": 2,
        "updates_per_iteration": 5,
        "grpo.std_floor": 1e-9,
        "grpo.clip_low": 0.9,
        "grpo.clip_high": 10.0,
        "optim.eps": 1.0,
        "optim.lr": 1e-3,
        "optim.max_grad_norm": 1e9,
    }
    return altered(load_toml(config_file), changes)


def trained(config: TrainConfig) -> tuple[Training, torch.Tensor, list[dict[str, float]]]:
    """The training after two iterations of five updates each, how far the weights moved, and the metrics."""
    training = load_training(config, threads=1)
    before = training.trainable.optimizer.weights.values.clone()
    metrics = [iterate(training, iteration, Console()) for iteration in (1, 2)]
    return training, training.trainable.optimizer.weights.values - before, metrics


@pytest.fixture(scope="module")
def plain(base: TrainConfig) -> tuple[Training, torch.Tensor, list[dict[str, float]]]:
    return trained(base)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"graphs": "on"}, marks=pytest.mark.slow),
        pytest.param({"kernels": "on"}, marks=pytest.mark.slow),
        pytest.param({"attention": "sdpa"}, marks=pytest.mark.slow),
        {"graphs": "on", "kernels": "on", "attention": "flash"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_ten_updates_come_to_the_same_weights(base: TrainConfig, plain, changes: dict[str, str]) -> None:
    training, moved, metrics = trained(altered(base, {f"engine.{name}": value for name, value in changes.items()}))
    assert isinstance(training.engine, FixedPasses) == ("graphs" in changes)
    _, expected, expected_metrics = plain
    # A gradient is float32 sums through some forty layers and back, each rounded by 6e-8 of its terms: 1e-5 of its
    # length with room for cancellation, ten times over. A micro-batch left out or counted twice would be a tenth.
    assert torch.linalg.vector_norm(moved - expected) <= 1e-4 * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(expected) > 0
    for got, wanted in zip(metrics, expected_metrics, strict=True):
        assert got["ratio/max_abs_dev_first"] <= 1e-6
        assert got["reward/mean"] == pytest.approx(wanted["reward/mean"], abs=1e-5)
        assert got["optim/steps"] == 5


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_shared_first_step_computed_once_comes_to_the_same(base: TrainConfig, graphs: str) -> None:
    config = altered(base, {"rollout.initial_noise": "shared", "engine.graphs": graphs})
    metrics = {}
    for setting in ("off", "on"):
        training = load_training(altered(config, {"engine.reuse": setting}), threads=1)
        assert training.engine.share_first == (setting == "on")
        metrics[setting] = iterate(training, 1, Console())
        assert metrics[setting]["ratio/max_abs_dev_first"] <= 1e-6
    assert metrics["on"]["reward/mean"] == pytest.approx(metrics["off"]["reward/mean"], abs=1e-5)


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_the_vaes_decoder_has_the_kernels_too(base: TrainConfig, kernels: str) -> None:
    policy = load_training(altered(base, {"engine.kernels": kernels}), threads=1).policy
    resnet = policy.vae.decoder.mid_block.resnets[0]
    assert isinstance(resnet, FusedResnetBlock2D) == (kernels == "on")
    assert resnet.conv1.weight.is_contiguous()
    setup._patch_vae(replace(policy, device=torch.device("cuda")))  # as there
    assert isinstance(resnet, FusedResnetBlock2D)
    assert resnet.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("samples", "batch"), [(64, 16), (64, 64), (24, 7), (5, 16), (1, 1)])
def test_what_is_decoded_at_once_is_known_beforehand(base: TrainConfig, samples: int, batch: int) -> None:
    """As `Policy.decode` splits the chunks of a rollout."""
    config = altered(base, {"rollout.decode_batch": batch})
    for chunk in (1, 4, 16, 22, 33, 64, 66):
        chunks = torch.empty(samples).split(chunk)
        expected = {len(latents) for part in chunks for latents in part.split(batch)}
        assert decoded_at_once(samples, chunk, config) == sorted(expected)


AGAIN = {"engine.gradient_checkpointing": "on"}


def test_ten_updates_with_gradient_checkpointing_come_to_the_same_bits(base: TrainConfig, plain) -> None:
    training, moved, metrics = trained(altered(base, AGAIN))
    assert training.policy.computing.is_gradient_checkpointing
    _, expected, expected_metrics = plain
    assert torch.equal(moved, expected)
    timeless = [
        {k: v for k, v in values.items() if not k.startswith(TIMED)} for values in (*metrics, *expected_metrics)
    ]
    assert timeless[:2] == timeless[2:]


@pytest.mark.parametrize(("rank", "workers", "kernels"), [(0, 1, "off"), (0, 2, "on"), (2, 1, "on"), (2, 2, "off")])
def test_gradient_checkpointing_sums_the_same_gradients(
    base: TrainConfig, rank: int, workers: int, kernels: str
) -> None:
    config = altered(base, {"model.lora_rank": rank, "engine.kernels": kernels, "micro_batch": 2})
    gradients = []
    for setting in ("off", "on"):
        changed = altered(config, {"engine.gradient_checkpointing": setting})
        training = load_training(changed, threads=workers, say=lambda line: None)
        assert training.engine.workers.count == workers
        weights = training.trainable.optimizer.weights
        # Fresh adapters are half zeros, and so would be the other half's gradients.
        noise = torch.randn(weights.size, generator=torch.Generator().manual_seed(0))
        for parameter, moved in zip(weights.parameters.values(), weights.views(noise).values(), strict=True):
            parameter.data.add_(moved, alpha=0.02)
        batch = noise_batch(training.engine.loss, 8)
        training.engine.learn(Pairs(torch.arange(8), batch.step), Rows(batch), None, 0.0)
        gradients.append(weights.collect_gradients().clone())
    assert torch.equal(*gradients)
    assert all(view.count_nonzero() for view in weights.views(gradients[0]).values())


def test_gradient_checkpointing_is_said_recorded_counted_and_followed(base: TrainConfig) -> None:
    said: list[str] = []
    training = load_training(altered(base, AGAIN), threads=1, say=said.append)
    assert said == ["gradient checkpointing is on, as engine.gradient_checkpointing says"]
    assert training.record.gradient_checkpointing is True
    assert count_and_measure(training.config, training.policy).model.gradient_checkpointing
    before = training.record.to_json()
    for config, record, on, lines in (
        (base, {}, False, []),  # on a CPU nothing is said of it
        (altered(base, AGAIN), before, True, ["gradient checkpointing is on, as the run had it before"]),
        (base, before, False, ["engine.gradient_checkpointing is not as before: the engine decides anew"]),
    ):
        said.clear()
        followed = load_training(config, threads=1, record=EngineRecord(**record), say=said.append)
        assert followed.policy.computing.is_gradient_checkpointing == followed.record.gradient_checkpointing == on
        assert count_and_measure(config, followed.policy).model.gradient_checkpointing == on
        assert said == lines


def test_a_record_of_before_there_was_a_setting_decides_nothing_anew(base: TrainConfig) -> None:
    record = load_training(base, threads=1, say=lambda line: None).record
    old = {name: value for name, value in record.to_json().items() if name != "gradient_checkpointing"}
    del old["settings"]["engine.gradient_checkpointing"]
    kept, said = EngineRecord(**old | {"old_log_prob": "replay"}), []
    assert load_training(base, threads=1, record=kept, say=said.append).record.old_log_prob == "replay"
    assert said == []


@pytest.mark.parametrize(("own_room", "others"), [(10**12, False), (10**12, True), (0, True)])
def test_one_process_that_is_short_of_memory_checkpoints_on_all(
    own_room: int, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class BesideAnother(Ranks):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return flag or others

    asked: list[bool] = []
    monkeypatch.setattr(batch_size, "memory_room", lambda *_: own_room)
    config, ranks = load_toml(find_preset("shapes")), BesideAnother(0, 2)
    on, why = decide_gradient_checkpointing(config, torch.device("cuda"), torch.bfloat16, ranks)
    assert on == others
    assert asked == [own_room == 0]
    if not others:
        assert re.search(r"is off: of 1000\.00 GB one pair needs 0\.0\d$", why)
    elif own_room:
        assert why == "gradient checkpointing is on, as another process has less memory"
    else:
        assert why.startswith("gradient checkpointing is on: of 0.00 GB one pair needs ")


def test_where_not_even_one_pair_fits_what_needs_less_is_named() -> None:
    hint = "; engine.gradient_checkpointing on needs less"
    with pytest.raises(torch.OutOfMemoryError, match=f"not even a micro-batch of one pair .*{hint}$"):
        setup._fit(4, lambda size: False, Ranks(), lambda *_: None, hint)


FIXED = {"engine.graphs": "on", "engine.kernels": "on", "engine.reuse": "on"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"engine.dtype": "bf16", "model.lora_rank": 2, "grpo.kl": 0.1},
        {"engine.dtype": "fp16", "optim.ema": 0.5, "grpo.kl": 0.0},
        {"grpo.ratio_norm": True, "grpo.old_log_prob": "replay"},
        {"grpo.ratio_norm": True, "grpo.old_log_prob": "detach", "rollout.guidance": 1.0},
        {"group_size": 6, "grpo.trim": 1, "grpo.best_of": 2, "rollout.initial_noise": "shared"},
        {"grpo.epochs": 5, "grpo.step_fraction": 0.5, "rollout.initial_noise": "per_prompt", "rollout.batch": 4},
        {"grpo.window": 1, "model.prediction_type": "v_prediction", "grpo.kl": 0.0},
    ],
    ids=lambda changes: "-".join(name.rpartition(".")[2] for name in changes),
)
def test_options_mean_the_same_in_fixed_shapes(base: TrainConfig, changes: dict[str, object]) -> None:
    """Neither the samples nor a step's pairs are a multiple of what is computed together."""
    # The std of all rewards is some 0.03. One of these groups' own is 0.001, which makes 1e-4 of a reward's rounding.
    sizes = {"iterations": 1, "updates_per_iteration": 5, "micro_batch": 4, "grpo.advantage": "global"}
    once = altered(base, sizes | changes)
    half = once.engine.dtype != "auto"
    moves, metrics = [], []
    # Kernels round elsewhere, which in half precision the division by a group's std magnifies: they are left out there.
    for config in (once, altered(once, FIXED | {"engine.kernels": "off" if half else "on"})):
        training = load_training(config, threads=1, say=lambda line: None)
        before = training.trainable.optimizer.weights.values.clone()
        metrics.append(iterate(training, 1, Console()))
        weights = training.trainable.optimizer.weights
        moves.append(torch.cat([weights.values - before, *([weights.ema - before] if weights.ema is not None else [])]))
    assert isinstance(training.engine, FixedPasses)
    assert set(training.engine._calls) == {key for keys in training.engine._foreseen() for key in keys}, (
        "nothing comes unforeseen"
    )
    # As above for float32. In half precision a row's bits may depend on how many there are, by 2^-8 of its terms.
    apart = torch.linalg.vector_norm(moves[0] - moves[1]) / torch.linalg.vector_norm(moves[0])
    assert apart <= (0.05 if half else 1e-4)
    assert metrics[1]["ratio/max_abs_dev_first"] <= 1e-6
    assert metrics[0].keys() == metrics[1].keys()
    for name in ("reward/mean", "clip/fraction", "kl/mean", "optim/steps"):
        wanted = pytest.approx(metrics[0].get(name, 0.0), rel=0.05 if half else 1e-3, abs=1e-6)
        assert metrics[1].get(name, 0.0) == wanted, name


def test_a_compiled_unet_is_shared_by_rollout_and_update(base: TrainConfig, plain, monkeypatch, tmp_path) -> None:
    """The calls alone: tracing this UNet takes a minute. tests/unet/test_compilation.py compiles, on a smaller one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[tuple[int, bool]] = []

    def compiler(network, **options):
        def compiled(latents, *args, **kwargs):
            calls.append((len(latents), torch.is_grad_enabled()))
            return network(latents, *args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(compilation, "check_compiled", lambda *_: compilation.GradientCheck(True, "output", 0.0, 0.0))
    monkeypatch.setattr(setup, "CPU_AGREEMENT", 1e-4)  # so that no CPU's rounding asks for a pass twice
    training, moved, _ = trained(altered(base, {"engine.compile": "on"}))
    assert training.record.compiled
    assert isinstance(training.engine, FixedPasses)
    assert training.policy.passes is None, "pictures come in other shapes"
    # One shape, with gradients: what is compiled for the update serves the rollout. Two of 3 steps of 6 samples are
    # trained on.
    assert set(calls) == {(2 * base.micro_batch, True)}
    chunks, micro_batches = 2, 5
    assert len(calls) == 2 * (3 * chunks + micro_batches)
    assert torch.linalg.vector_norm(moved - plain[1]) <= 1e-4 * torch.linalg.vector_norm(plain[1])


@pytest.mark.parametrize(("batch", "saves"), [(0, True), (2, False)])
def test_a_rollout_of_another_size_saves_nothing(base: TrainConfig, batch: int, saves: bool, monkeypatch) -> None:
    """Compiled too: only a pass of the update's size is the update's own program, which holds what gradients need."""
    plain = engine_of(altered(base, {"rollout.batch": batch, "micro_batch": 4}))
    loss = plain.loss
    seen: list[tuple[int, bool]] = []

    def compiled(latents, *args, **kwargs):
        seen.append((len(latents), torch.is_grad_enabled()))
        return loss.policy.computing(latents, *args, **kwargs)

    engine = FixedPasses(replace(loss, policy=replace(loss.policy, passes=compiled)), plain.trainable, 4)
    blank = blank_batch(loss.policy, loss.config, engine.chunk_size)
    with torch.no_grad():
        denoise = engine.denoiser(blank.embeds, slice(0, engine.chunk_size), keep_mean=False)
        denoise(0, blank.latents, blank.taken)
    assert seen == [(2 * engine.chunk_size, saves)]


def engine_of(config: TrainConfig) -> Passes:
    return load_training(config, threads=1, say=lambda line: None).engine


def gradient(engine: Passes, batch: MicroBatch, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat gradient of the batch's rows taken in this order, and their losses in the batch's own."""
    engine.clear()
    losses = torch.empty(len(batch))
    results = engine.learn(Pairs(order, batch.step[order]), Rows(batch), None, 0.0)
    losses[order] = torch.cat([each.loss for each in results])
    result = engine.weights.collect_gradients().clone()
    engine.clear()
    return result, losses


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_permuted_batch_gives_permuted_results(base: TrainConfig, graphs: str) -> None:
    engine = engine_of(altered(base, {"engine.graphs": graphs, "micro_batch": 4}))
    batch, order = noise_batch(engine.loss, 7), torch.tensor([6, 2, 0, 5, 1, 3, 4])
    straight, losses = gradient(engine, batch, torch.arange(7))
    permuted, other_losses = gradient(engine, batch, order)
    assert torch.allclose(losses, other_losses, rtol=1e-6, atol=0)  # one rounding of exp
    assert torch.linalg.vector_norm(straight - permuted) <= 1e-5 * torch.linalg.vector_norm(straight)
    assert losses.unique().numel() == 6  # as many rewards as an iteration has: the last pair has the first one's


def test_filling_up_a_micro_batch_adds_nothing(base: TrainConfig) -> None:
    """Seven pairs in fixed micro-batches of 4 and of 7: the eighth row has no weight."""
    engines = [engine_of(altered(base, {"engine.graphs": "on", "micro_batch": size})) for size in (4, 7)]
    (one, losses), (other, other_losses) = (
        gradient(engine, noise_batch(engine.loss, 7), torch.arange(7)) for engine in engines
    )
    assert torch.linalg.vector_norm(one - other) <= 1e-5 * torch.linalg.vector_norm(one)
    assert torch.allclose(losses, other_losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_out_of_memory_halves_the_micro_batch_and_learns_the_same(base: TrainConfig, graphs: str, monkeypatch) -> None:
    said: list[str] = []
    config = altered(base, {"engine.graphs": graphs, "micro_batch": 8})
    training = load_training(config, threads=1, say=said.append)
    engine = training.engine
    batch, order = noise_batch(engine.loss, 11), torch.arange(11)
    expected, losses = gradient(engine, batch, order)
    learn, sizes = PolicyLoss.learn, []

    def small_memory(self: PolicyLoss, batch: MicroBatch, **options):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(self, batch, **options)

    monkeypatch.setattr(PolicyLoss, "learn", small_memory)
    if graphs == "on":
        engine._calls.clear()
    result, other_losses = gradient(engine, batch, order)
    assert engine.micro_batch == training.record.micro_batch == 2
    assert sizes[0] > sizes[1] > 2 >= max(sizes[2:])
    assert [line.split(":")[0] for line in said] == ["out of memory", "out of memory"]
    assert torch.linalg.vector_norm(result - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert torch.allclose(losses, other_losses, rtol=1e-5, atol=0)
    engine.micro_batch = 1
    monkeypatch.setattr(
        PolicyLoss, "learn", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    if graphs == "on":
        engine._calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        gradient(engine, batch, order)


def out_of_memory(where: str, most: int, monkeypatch) -> None:
    """From now on more than `most` do not fit: samples in a rollout's second step, or pairs in a pass of PolicyLoss."""
    if where == "draw":
        for kind in (Passes, FixedPasses):
            monkeypatch.setattr(kind, "denoiser", _running_out(kind.denoiser, most))
        return
    call = getattr(PolicyLoss, where)

    def small_memory(self: PolicyLoss, batch: MicroBatch, **options):
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, batch, **options)

    monkeypatch.setattr(PolicyLoss, where, small_memory)


def _running_out(denoiser, most: int):
    def small_memory(self, embeds, part, keep_mean):
        denoise = denoiser(self, embeds, part, keep_mean)

        def step(position, latents, noise):
            if position == 1 and len(latents) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return denoise(position, latents, noise)

        return step

    return small_memory


PASSES = {
    "draw": {},
    "learn": {},
    "recompute": {"grpo.old_log_prob": "replay"},
    "evaluate_pairs": {"grpo.skip_clipped": True, "grpo.kl": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("where", PASSES)
def test_wherever_memory_runs_out_the_same_is_learned(base: TrainConfig, where: str, graphs: str, monkeypatch) -> None:
    said: list[str] = []
    moves, metrics = [], []
    for small in (False, True):
        config = altered(base, PASSES[where] | {"engine.graphs": graphs, "micro_batch": 4})
        training = load_training(config, threads=1, say=said.append)
        if small:
            out_of_memory(where, 2, monkeypatch)
        before = training.trainable.optimizer.weights.values.clone()
        metrics.append(iterate(training, 1, Console()))
        moves.append(training.trainable.optimizer.weights.values - before)
    # As for ten updates above.
    assert torch.linalg.vector_norm(moves[0] - moves[1]) <= 1e-4 * torch.linalg.vector_norm(moves[0])
    assert metrics[1]["reward/mean"] == pytest.approx(metrics[0]["reward/mean"], abs=1e-5)
    assert metrics[1]["ratio/max_abs_dev_first"] <= 1e-6
    halved = {line.removeprefix("out of memory: ").split()[0] for line in said if line.startswith("out of memory")}
    rollouts = where == "draw" and graphs == "off"
    assert halved == {"rollouts" if rollouts else "micro-batches"}
    # All 6 samples at first, where a CPU's rollout draws them together.
    assert (training.record.micro_batch, training.record.rollout_batch) == ((4, 1) if rollouts else (2, 0))


@pytest.mark.parametrize(
    ("kind", "where", "failing"), [(FixedPasses, "denoiser", 2), (PolicyLoss, "learn", 1), (PolicyLoss, "recompute", 2)]
)
def test_after_memory_ran_out_the_ratio_is_1_where_bits_depend_on_the_size(
    base: TrainConfig, kind: type, where: str, failing: int, monkeypatch
) -> None:
    """A UNet whose output is off by a thousandth for each row: log-probs of passes of another size would be seen.

    Memory runs out once: in the second chunk, in the first pass of the update, or in the second one of the
    recomputation.
    """
    forward = Policy.forward

    def by_rows(self):
        network = forward.fget(self)
        return lambda latents, *rest, **options: (network(latents, *rest, **options)[0] * (1 + 1e-3 * len(latents)),)

    monkeypatch.setattr(Policy, "forward", property(by_rows))
    config = altered(base, PASSES.get(where, {}) | {"engine.graphs": "on", "micro_batch": 4})
    training = load_training(config, threads=1, say=lambda line: None)
    assert training.record.old_log_prob == config.grpo.old_log_prob
    call, calls = getattr(kind, where), []

    def failing_once(self, *arguments, **options):
        calls.append(where)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, *arguments, **options)

    monkeypatch.setattr(kind, where, failing_once)
    for iteration in (1, 2):
        metrics = iterate(training, iteration, Console())
        assert metrics["ratio/max_abs_dev_first"] <= 1e-6
        assert training.engine.micro_batch == 2
        assert training.engine.resized == (iteration == 1)
        # Of this update alone: the next rollout's passes are of the update's size again.
        assert training.engine.old_log_prob == training.record.old_log_prob == config.grpo.old_log_prob


@pytest.mark.slow
def test_a_group_that_halving_divided_is_scored_when_it_is_whole(base: TrainConfig, monkeypatch) -> None:
    rewards = {}
    for most in (3, 2):
        config = altered(base, {"engine.graphs": "on", "micro_batch": 3})
        training = load_training(config, threads=1, say=lambda line: None)
        calls = counted_scores(training, monkeypatch)
        out_of_memory("draw", most, monkeypatch)
        rewards[most] = iterate(training, 1, Console())["reward/mean"]
        assert calls == [3, 3]
    assert rewards[2] == pytest.approx(rewards[3], abs=1e-5)


def test_all_processes_go_on_with_the_smallest_sizes(base: TrainConfig) -> None:
    @dataclass(frozen=True)
    class BesideOneThatHalved(Ranks):
        def gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, torch.tensor([[2, 3]])])

    config = altered(base, {"engine.graphs": "on", "micro_batch": 4, "rollout.batch": 6})
    said: list[str] = []
    training = load_training(config, threads=1, say=said.append)
    said.clear()
    training.engine.begin_rollout()
    assert not said
    training.engine.ranks = BesideOneThatHalved()
    training.engine.begin_rollout()
    assert (training.engine.micro_batch, training.engine.rollout_batch) == (2, 3)
    assert (training.record.micro_batch, training.record.rollout_batch) == (2, 3)
    assert len(said) == 2


def test_a_micro_batch_of_the_settings_is_halved_until_it_fits_everywhere() -> None:
    @dataclass(frozen=True)
    class BesideASmallerOne(Ranks):
        def any(self, flag: bool) -> bool:
            return flag or len(tried) < 3

    tried: list[int] = []
    halved: list[tuple[str, int]] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 8

    setup._fit(16, fits, BesideASmallerOne(), lambda name, size, why: halved.append((name, size)))
    assert tried == [16, 8, 4], "8 fits here, but not there"
    assert halved == [("micro_batch", 8), ("micro_batch", 4)]
    with pytest.raises(torch.OutOfMemoryError):
        setup._fit(2, lambda size: False, Ranks(), lambda *told: None)


def counted_scores(training: Training, monkeypatch) -> list[int]:
    """How many images each call of the reward got, filled in as it is called."""
    begin, calls = training.reward.begin, []

    def counting(images, *rest):
        calls.append(len(images))
        return begin(images, *rest)

    monkeypatch.setattr(training.reward, "begin", counting)
    return calls


@pytest.mark.parametrize(("size", "scored"), [(4, [3, 3]), (6, [6])])
def test_groups_are_scored_while_the_next_are_drawn(
    base: TrainConfig, size: int, scored: list[int], monkeypatch
) -> None:
    """Two groups of three, in chunks that cut them or not: each is scored when its last image is there, a chunk late.

    Nothing else changes. A chunk of all images leaves nothing to draw meanwhile.
    """
    events: list[str] = []
    decode, chunk = Policy.decode, FixedPasses.denoiser

    def decoding(self, *args):
        events.append("decode")
        return decode(self, *args)

    def drawing(self, embeds, part, keep_mean):
        events.append("draw")
        return chunk(self, embeds, part, keep_mean)

    monkeypatch.setattr(Policy, "decode", decoding)
    monkeypatch.setattr(FixedPasses, "denoiser", drawing)
    metrics = {}
    for overlap in (True, False):
        config = altered(base, {"engine.graphs": "on", "engine.overlap": overlap, "micro_batch": size})
        training = load_training(config, threads=1, say=lambda line: None)
        calls = counted_scores(training, monkeypatch)
        events.clear()
        metrics[overlap] = iterate(training, 1, Console())
        chunks = math.ceil(6 / size)
        early = ["draw", *["draw", "decode"] * (chunks - 1), "decode"]
        assert events == (early if overlap else ["draw"] * chunks + ["decode"])
        assert calls == (scored if overlap else [6])
    for name in ("reward/mean", "reward/std", "grad/norm"):
        # Three images at a time or six: matrix products of other sizes, rounded to 6e-8 of their terms.
        assert metrics[True][name] == pytest.approx(metrics[False][name], rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_decides_nothing_anew(base: TrainConfig, monkeypatch) -> None:
    config = altered(base, {"engine.graphs": "on", "engine.attention": "flash", "engine.reuse": "on", "micro_batch": 0})
    record = load_training(config, threads=1, say=lambda line: None).record
    assert record.micro_batch == 32
    kept = EngineRecord(**record.to_json())

    def again(*_, **__):
        raise AssertionError("decided again")

    for name in ("choose_backends", "_shares_first_step"):
        monkeypatch.setattr(setup, name, again)
    assert load_training(config, threads=1, record=kept, say=lambda line: None).record == kept


def test_a_resumed_run_goes_on_with_a_halved_micro_batch(base: TrainConfig, monkeypatch) -> None:
    config = altered(base, {"engine.graphs": "on", "engine.attention": "flash", "micro_batch": 8})
    record = load_training(config, threads=1, say=lambda line: None).record
    plan = record.attention
    record.micro_batch, record.rollout_batch = 4, 2
    monkeypatch.setattr(setup, "choose_backends", lambda *_: pytest.fail("decided again"))
    training = load_training(config, threads=1, record=EngineRecord(**record.to_json()), say=lambda line: None)
    assert (training.engine.micro_batch, training.engine.rollout_batch) == (4, 2)
    assert training.record.attention == plan


def test_another_device_decides_for_itself(base: TrainConfig) -> None:
    said: list[str] = []
    kept = EngineRecord(
        "some GPU", None, 3, True, {"text": True, "times": True, "first": True}, "replay", {"a": "native"}
    )
    record = load_training(base, threads=1, record=kept, say=said.append).record
    here = device_name(torch.device("cpu"))
    assert record.device == here
    assert (record.micro_batch, record.compiled, record.old_log_prob) == (base.micro_batch, False, "rollout")
    assert record.reuse == {"first": False}
    assert said[0] == f"this run was on some GPU before and is on {here} now: the engine decides anew"


def test_settings_that_a_resumed_run_changes_are_decided_upon_anew(base: TrainConfig) -> None:
    record = load_training(altered(base, {"micro_batch": 8}), threads=1, say=lambda line: None).record
    assert (record.micro_batch, record.compiled, record.reuse) == (8, False, {"first": False})
    said: list[str] = []
    config = altered(base, {"micro_batch": 3, "engine.reuse": "on", "rollout.initial_noise": "shared"})
    training = load_training(config, threads=1, record=EngineRecord(**record.to_json()), say=said.append)
    assert said[0] == "micro_batch and engine.reuse are not as before: the engine decides anew"
    assert training.engine.micro_batch == training.record.micro_batch == 3
    assert training.record.reuse == {"first": True}
    again = load_training(config, threads=1, record=EngineRecord(**training.record.to_json()), say=said.append)
    assert again.record == dataclasses.replace(training.record, group_norm={})
    old = EngineRecord(**(record.to_json() | {"settings": None}))  # as older checkpoints have it
    assert load_training(config, threads=1, record=old, say=said.append).record.micro_batch == 8
    assert sum("decides anew" in line for line in said) == 1


@pytest.mark.slow
def test_a_resumed_run_of_fixed_shapes_goes_on_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    options = [
        "--eval.every",
        "0",
        "--checkpoint.every",
        "1",
        "--grpo.std-floor",
        "1e-9",
        "--engine.attention",
        "flash",
    ]
    options += [part for name, value in FIXED.items() for part in (f"--{name}", value)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([str(config_file), "--run", str(whole), "--iterations", "2", *options]) == 0
    assert train.main([str(config_file), "--run", str(cut), "--iterations", "1", *options]) == 0
    assert train.main(["--resume", str(cut), "--iterations", "2"]) == 0
    last = Path("checkpoints") / "iter-000002"
    for name in ("unet/diffusion_pytorch_model.safetensors", "trainer/optimizer.safetensors"):
        assert (whole / last / name).read_bytes() == (cut / last / name).read_bytes(), name
    decided = [json.loads((run / "engine.json").read_text()) for run in (whole, cut)]
    assert decided[0] == decided[1] == json.loads((cut / last / "trainer/state.json").read_text())["engine"]
    assert decided[0]["attention"]["wanted"] == "flash"
    assert decided[0]["reuse"] == {"first": False}  # each sample begins with noise of its own


@dataclass(frozen=True)
class _BesideAnother(Ranks):
    """Another process, whose share of every gradient is 1."""

    def sum_(self, tensors) -> None:
        for tensor in tensors:
            tensor += 1


@pytest.mark.parametrize("changes", [{}, {"engine.graphs": "on"}, {"engine.dtype": "fp16"}], ids=str)
def test_a_process_without_a_pair_of_its_own_learns_what_the_others_learn(
    base: TrainConfig, changes: dict, monkeypatch
) -> None:
    monkeypatch.setattr(update, "_unclipped", lambda pairs, *_: pairs[:0])
    config = altered(base, {"grpo.skip_clipped": True, "grpo.kl": 0.0} | changes)
    training = load_training(config, threads=1, say=lambda line: None)
    seen: list[bool] = []
    step, weights = training.trainable.optimizer.step, training.trainable.optimizer.weights

    def watched(*args):
        gradients = weights.views(weights.collect_gradients()).values()
        seen.append(all(bool((gradient == 1).all()) for gradient in gradients))
        return step(*args)

    training.trainable.optimizer.step = watched
    training.engine.ranks = _BesideAnother()
    iterate(training, 1, Console())
    # Before the first step nothing can be clipped; fp16 leaves some out until its scale is low enough.
    assert not seen[0]
    assert seen[-2:] == [True, True]


@pytest.mark.slow
def test_skipping_clipped_pairs_learns_the_same_from_fewer(base: TrainConfig) -> None:
    tight = altered(base, {"grpo.clip_low": 1e-6, "grpo.clip_high": 1e-6, "grpo.kl": 0.0})
    _, expected, metrics = trained(tight)
    _, moved, other = trained(altered(tight, {"grpo.skip_clipped": True}))
    assert torch.linalg.vector_norm(moved - expected) <= 1e-4 * torch.linalg.vector_norm(expected)
    for one, two in zip(metrics, other, strict=True):
        assert one["clip/fraction"] > 0.2, "there is something to skip"
        for name in ("clip/fraction", "ratio/mean", "loss/policy"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_on_a_rounded_copy_that_follows(base: TrainConfig, dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    training, moved, _ = trained(altered(base, {"engine.dtype": name, "optim.ema": 0.5}))
    network, unet = (
        dict(training.trainable.network.named_parameters()),
        dict(training.trainable.unet.named_parameters()),
    )
    assert torch.linalg.vector_norm(moved) > 0
    assert all(torch.equal(network[name], weight.detach().to(dtype)) for name, weight in unet.items())
    with training.trainable.ema.in_place():
        assert all(torch.equal(network[name], weight.detach().to(dtype)) for name, weight in unet.items())
        averages = training.trainable.ema.average
        assert all(torch.equal(network[n], averages[n].to(dtype)) for n in unet)
    assert all(torch.equal(network[name], weight.detach().to(dtype)) for name, weight in unet.items())


def test_a_computing_unet_shares_float32_weights_and_has_modules_of_its_own(base: TrainConfig) -> None:
    unet = load_training(base, threads=1).policy.unet
    shared, rounded = computing_unet(unet, torch.float32), computing_unet(unet, torch.bfloat16)
    pairs = list(zip(unet.parameters(), shared.parameters(), rounded.parameters(), strict=True))
    assert all(one is two for one, two, _ in pairs)
    assert all(three.dtype == torch.bfloat16 and three.stride() == one.stride() for one, _, three in pairs)
    assert not set(map(id, unet.modules())) & set(map(id, shared.modules()))


def test_every_decision_is_plain_data() -> None:
    record = EngineRecord(attention={"a": 1}, micro_batch=3, compiled=True, reuse={"text": True}, old_log_prob="replay")
    assert EngineRecord(**record.to_json()) == dataclasses.replace(record, group_norm={})


@pytest.mark.parametrize(
    ("settled", "given", "why"),
    [
        (8, 8, "micro-batch of 8 pairs, as micro_batch says"),
        (4, 8, "micro-batch of 4 pairs, as the run had them before"),
    ],
)
def test_the_memory_plan_is_said_for_a_settled_micro_batch_too(settled: int, given: int, why: str) -> None:
    config = replace(load_toml(find_preset("shapes")), micro_batch=given)
    said: list[str] = []
    find = MicroBatchFinder(config, describe(config.model), torch.device("cuda"), torch.bfloat16, Ranks(), said.append)
    unwanted = lambda size: pytest.fail("measured")  # noqa: E731
    assert find(unwanted, settled, unwanted) == settled
    assert said[-1] == why
    assert re.search(rf"update +{2 * settled} UNet samples' activations, bf16", "\n".join(said))


def test_processes_expect_and_take_what_the_first_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has less room, and fewer pairs would be faster here."""

    @dataclass(frozen=True)
    class BesideAFirst(Ranks):
        def agree(self, text: str) -> str:
            own.append(int(text))
            return str(first.pop(0))

    own, expected, first = [], [], [48, 96]
    monkeypatch.setattr(batch_size, "memory_room", lambda *_: 1)
    monkeypatch.setattr(batch_size, "fits_within", lambda *_: lambda size: True)
    monkeypatch.setattr(batch_size, "timed", lambda *_: lambda size: size**2)
    config, said = replace(load_toml(find_preset("shapes")), micro_batch=0), []
    find = MicroBatchFinder(
        config, describe(config.model), torch.device("cuda"), torch.bfloat16, BesideAFirst(1, 2), said.append
    )
    assert find(lambda size: None, 0, expected.append) == 96
    assert expected == [48]
    assert own[0] < 48
    assert own[1] < 96
    assert "timed uncompiled" in said[-1]
