"""Capturing on an imitated device: in what order, how much memory at once, and that replays learn what calls learn."""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import measure
import pytest
import torch
from torch import Tensor

from fastgrpo.assembly import Training, load_training
from fastgrpo.costs.counting import count_model
from fastgrpo.costs.memory import memory_plan
from fastgrpo.engine import graphs
from fastgrpo.engine.fixed_passes import FixedPasses, Key
from fastgrpo.engine.graphs import StaticCall, capture_all
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.models.check import describe
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from fastgrpo.unet.copies import Network
from support.graph_stand_in import PLAIN, Device, imitated
from support.micro_batches import Rows, noise_batch
from support.training import altered

MB = 2**20


@pytest.fixture(scope="module")
def base(config_file: Path) -> TrainConfig:
    changes = {"engine.threads": 1, "engine.graphs": "on", "grpo.std_floor": 1e-9, "iterations": 2, "micro_batch": 3}
    return altered(load_toml(config_file), changes)


def load(config: TrainConfig, capture: bool = True) -> Training:
    training = load_training(config, threads=1, say=lambda line: None)
    training.engine._capture, training.engine._pool = capture, (0, 1000)
    return training


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def needing(megabytes: int) -> Callable[[Tensor], Tensor]:
    """A function that has so much at once, and returns a number."""

    def function(x: Tensor) -> Tensor:
        return x.expand(megabytes * MB // 4).clone().sum()

    return function


def test_graphs_of_a_pool_need_what_the_largest_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    example = (torch.zeros(1),)
    with imitated(monkeypatch, counts=True) as device:
        pool = graphs.memory_pool(torch.device("cpu"))
        calls = [StaticCall(needing(size), example, capture=False, pool=pool) for size in (5, 2, 3)]
        capture_all(calls)
        assert device.events == ["warm up"] * 3 + ["capture", "end"] * 3
        assert 5 * MB <= device.peak < 5.1 * MB
        assert device.reserved[PLAIN] < 1000
        assert 5 * MB <= device.reserved[pool] < 5.1 * MB
        capture_all(calls)
        assert device.events.count("warm up") == 3, "once for good"
        del calls
        device.empty_cache()
        assert sum(device.reserved.values()) < 1000


def test_a_call_that_was_warmed_up_before_is_captured_without(monkeypatch: pytest.MonkeyPatch) -> None:
    with imitated(monkeypatch, counts=True) as device:
        pool = graphs.memory_pool(torch.device("cpu"))
        large, late = (StaticCall(needing(size), (torch.zeros(1),), False, pool) for size in (5, 3))
        late.warm_up()
        capture_all([large])
        capture_all([late])
        assert device.events == ["warm up", "warm up", "capture", "end", "capture", "end"]
        assert device.peak < 5.1 * MB


@pytest.mark.parametrize("ends_itself", [False, True], ids=["PyTorch 2.11", "PyTorch 2.14"])
def test_after_a_capture_that_could_not_end_nothing_is_recorded(
    monkeypatch: pytest.MonkeyPatch, ends_itself: bool
) -> None:
    with imitated(monkeypatch) as device:
        monkeypatch.setattr(graphs, "_ABANDONED", [])

        def waits(x: Tensor) -> Tensor:
            if device.capturing:
                device.broken = True
                if ends_itself:
                    device.recording.clear()
                raise RuntimeError("operation not permitted when stream is capturing")
            return x + 1

        with pytest.raises(RuntimeError, match="not permitted"):
            StaticCall(waits, (torch.zeros(1),), capture=True)
        assert (device.stream, device.recording, device.drawing) == ("main", [], True)
        # The allocator of pinned memory goes on asking the graph, unless it was told to stop.
        assert len(graphs._ABANDONED) == len(device.released) == (0 if ends_itself else 1)
        device.broken, device._graph = False, None
        assert StaticCall(lambda x: x + 1, (torch.zeros(1),), capture=True)(torch.ones(1)) == 2


def test_a_failed_capture_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs out of memory is tried again, smaller, before any garbage is collected."""

    def fails(x: Tensor) -> Tensor:
        large = x.expand(MB).clone()
        if device.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return large.sum()

    with imitated(monkeypatch, counts=True) as device:
        monkeypatch.setattr(gc, "collect", lambda: 0)
        gc.disable()
        try:
            with suppress(torch.OutOfMemoryError):
                StaticCall(fails, (torch.zeros(1),), capture=True)
            device.empty_cache()
            assert sum(device.reserved.values()) < 1000
        finally:
            gc.enable()


def test_what_waits_for_the_device_is_found_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = ["default"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)

    def waits(x: Tensor) -> Tensor:
        if mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return x + 1

    with imitated(monkeypatch) as device:
        with pytest.raises(RuntimeError, match="synchronizing"):
            StaticCall(waits, (torch.zeros(1),), capture=True)
        assert device.events == ["warm up"]
    assert mode[-1] == "default"


def test_a_rival_that_waits_is_measured_without_a_graph_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = torch.zeros(1)

    def waits() -> None:
        if device.capturing:
            device.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    with imitated(monkeypatch) as device:
        assert measure.captured(waits) is None
        assert (device.stream, device.recording, device.drawing) == ("main", [], True)
        device.broken, device._graph = False, None
        replay = measure.captured(lambda: counter.add_(1))
        assert device.stream == "main"
    before = counter.item()
    replay()
    assert counter == before + 1


# ---------------------------------------------------------------------------------------------------------------------
# The engine


OPTIONS = [
    {"engine.reuse": "on", "rollout.initial_noise": "shared"},
    {"grpo.old_log_prob": "replay", "grpo.ratio_norm": True, "grpo.skip_clipped": True, "grpo.kl": 0.0},
    {"grpo.kl": 0.5},  # its weight changes between the iterations, as does the learning rate
]


@pytest.mark.parametrize("changes", OPTIONS, ids=["rollout", "replay", "KL weight"])
def test_replays_learn_what_calls_learn(
    base: TrainConfig, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; all is captured at the first step of the first rollout, after all was warmed up."""
    config = altered(base, {"updates_per_iteration": 2} | changes)
    plain, captured = load(config, capture=False), load(config)
    for iteration in (1, 2):
        for training in (plain, captured):
            training.guard.restore(training.guard.state() | {"brake": float(iteration)})
        expected = iterate(plain, iteration, Console())
        with imitated(monkeypatch) as device:
            metrics = iterate(captured, iteration, Console())
        assert metrics["ratio/max_abs_dev_first"] == expected["ratio/max_abs_dev_first"] <= 1e-6
        if iteration == 1:
            warm, events = device.events.count("warm up"), device.events
            assert events == ["warm up"] * warm + ["capture", "end"] * ((len(events) - warm) // 2)
            assert len(events) > warm > 1
        else:
            assert not device.events
    assert torch.equal(*(training.trainable.optimizer.weights.values for training in (plain, captured)))
    captures = sum(call.captured for call in captured.engine._calls.values())
    assert captures == {"rollout": 2, "replay": 5}[config.grpo.old_log_prob]


@pytest.fixture(scope="module", params=["off", "on"], ids=lambda setting: f"checkpointing-{setting}")
def loaded(base: TrainConfig, request: pytest.FixtureRequest) -> FixedPasses:
    changes = {"grpo.old_log_prob": "replay", "updates_per_iteration": 2}
    return load(altered(base, changes | {"engine.gradient_checkpointing": request.param})).engine


@pytest.fixture
def engine(loaded: FixedPasses) -> FixedPasses:
    """Nothing is captured, no gradient summed."""
    loaded._calls.clear()
    loaded._capture, loaded.micro_batch = True, 3
    loaded.clear()
    return loaded


def learn(engine: FixedPasses, count: int = 2) -> None:
    """Add the gradient of a few pairs of noise."""
    batch = noise_batch(engine.loss, count)
    engine.learn(Pairs(torch.arange(count), batch.step), Rows(batch), None, 0.0)


@pytest.mark.parametrize("begun", [False, True])
def test_warming_up_adds_nothing_to_the_gradient(
    engine: FixedPasses, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a graph that was captured while there was none overwrite the next."""
    weights = engine.weights
    before = torch.randn(weights.size, generator=torch.Generator().manual_seed(0)) * begun
    for parameter in weights.parameters.values() if not begun else ():
        parameter.grad = None
    weights.gradient.copy_(before)
    with imitated(monkeypatch) as device:
        engine._prepare()
        assert torch.equal(weights.collect_gradients(), before)
        learn(engine)
        learn(engine)
    assert "capture" in device.events
    captured = weights.collect_gradients().clone()
    weights.gradient.copy_(before)
    engine._capture = False
    engine._calls.clear()
    learn(engine)
    learn(engine)
    assert torch.equal(captured, weights.collect_gradients())
    assert not torch.equal(captured, before)


def test_an_engine_needs_the_memory_of_its_largest_pass_once(
    engine: FixedPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four functions beside the largest of them alone."""
    foreseen, _ = engine._foreseen()

    def prepared(keys: list[Key]) -> Device:
        engine._calls.clear()
        monkeypatch.setattr(engine, "_foreseen", lambda: (keys, []))
        with imitated(monkeypatch, counts=True) as device:
            engine._prepare()
        return device

    assert [name for name, *_ in foreseen] == ["learn", "recompute", "learn", "step"]
    alone, together = prepared(foreseen[:1]), prepared(foreseen)
    assert (alone.events.count("capture"), together.events.count("capture")) == (1, 4)
    # What each keeps of its own, inputs and outputs, is some 50 kB of 4 MB, or of 2.
    assert together.peak <= 1.05 * alone.peak
    assert together.reserved[PLAIN] <= 0.05 * alone.peak
    config, again = engine.config, engine.policy.computing.is_gradient_checkpointing
    model = count_model(describe(config.model), config.model, torch.float32, gradient_checkpointing=again)
    plan = memory_plan(config, model, {}, torch.float32, processes=1, micro_batch=engine.micro_batch)
    (planned,) = (part.size for part in plan if part.name.startswith("CUDA graphs"))
    assert together.reserved[engine._pool] == pytest.approx(planned, rel=0.05)


def test_a_switch_to_replay_captures_what_was_warmed_up(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Policy.forward

    def by_rows(self: Policy) -> Network:
        network = forward.fget(self)
        return lambda latents, *rest, **options: (network(latents, *rest, **options)[0] * (1 + 1e-3 * len(latents)),)

    monkeypatch.setattr(Policy, "forward", property(by_rows))
    config = altered(base, {"rollout.batch": 2, "updates_per_iteration": 2, "grpo.ratio_norm": True})
    training = load(config)
    with imitated(monkeypatch) as device:
        for iteration in (1, 2):
            assert iterate(training, iteration, Console())["ratio/max_abs_dev_first"] == 0.0
            assert training.engine.old_log_prob == "replay"
            assert device.events.count("capture") == 4, "of which two before it was found out"
    assert device.events == ["warm up"] * 4 + ["capture", "end"] * 4


def test_where_a_pass_does_not_fit_its_own_size_is_halved_and_all_is_captured_anew(
    base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update's, found out in the rollout, which is of another size."""
    config = altered(base, {"rollout.batch": 3, "micro_batch": 4, "updates_per_iteration": 1})
    training, call = load(config), PolicyLoss.learn

    def small_memory(self: PolicyLoss, batch: MicroBatch, **options):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, batch, **options)

    monkeypatch.setattr(PolicyLoss, "learn", small_memory)
    with imitated(monkeypatch) as device:
        iterate(training, 1, Console())
    assert (training.engine.micro_batch, training.engine.rollout_batch) == (2, 3)
    assert device.events == ["warm up"] * (1 + 3) + ["capture", "end"] * 2
