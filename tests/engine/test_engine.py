"""Every way of running the passes gives what plain calls give; what cannot is found out and said."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fastgrpo import update
from fastgrpo.assembly import load_training
from fastgrpo.engine import setup
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.grpo.micro_batch import blank_batch
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks
from fastgrpo.training import iterate
from fastgrpo.unet import compilation
from fastgrpo.unet.copies import computing_unet
from fastgrpo.unet.fused import FusedResnetBlock2D
from support.micro_batches import gradient, noise_batch
from support.training import FIXED, altered, counted_scores, engine_of, trained


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
        denoise = engine.denoiser(blank.embeds, slice(0, engine.chunk_size), False, loss.config.group_size)
        denoise(0, blank.latents, blank.taken)
    assert seen == [(2 * engine.chunk_size, saves)]


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

    def drawing(self, embeds, part, *others):
        events.append("draw")
        return chunk(self, embeds, part, *others)

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
