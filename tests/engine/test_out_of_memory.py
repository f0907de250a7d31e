"""Where memory runs out, smaller sizes go on and learn the same."""

from dataclasses import dataclass

import pytest
import torch

from fastgrpo.assembly import load_training
from fastgrpo.engine import setup
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks
from fastgrpo.training import iterate
from support.micro_batches import gradient, noise_batch
from support.training import altered, counted_scores


def test_where_not_even_one_pair_fits_what_needs_less_is_named() -> None:
    hint = "; engine.gradient_checkpointing on needs less"
    with pytest.raises(torch.OutOfMemoryError, match=f"not even a micro-batch of one pair .*{hint}$"):
        setup._fit(4, lambda size: False, Ranks(), lambda *_: None, hint)


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
    def small_memory(self, embeds, part, *others):
        denoise = denoiser(self, embeds, part, *others)

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
