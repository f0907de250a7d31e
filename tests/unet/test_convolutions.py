"""When cuDNN may try algorithms: its switches are read here, where no convolution looks at them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.backends import cudnn

from fastgrpo.assembly import load_training
from fastgrpo.engine import setup
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.record import EngineRecord
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from fastgrpo.unet import compilation
from fastgrpo.unet.compilation import check_compiled, make_example
from fastgrpo.unet.convolutions import aside, searching
from fastgrpo.unet.copies import Network
from support.training import altered

SEARCHED, PLAIN, ASIDE = (True, False), (False, False), (False, True)


def switches() -> tuple[bool, bool]:
    return cudnn.benchmark, cudnn.deterministic


@pytest.fixture
def config(config_file: Path) -> TrainConfig:
    changes = {"engine.threads": 1, "engine.graphs": "on", "engine.reuse": "on", "micro_batch": 4}
    changes |= {"rollout.initial_noise": "shared"}
    return altered(load_toml(config_file), changes)


def watch(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[tuple[bool, bool]]:
    """The switches at every call of a method, filled in as it is called."""
    seen, call = [], getattr(kind, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(switches())
        return call(*args, **kwargs)

    monkeypatch.setattr(kind, name, watched)
    return seen


def test_the_switches_are_as_they_were_afterwards() -> None:
    assert switches() == PLAIN
    with searching(True):
        assert switches() == SEARCHED
        with searching(False):
            assert switches() == PLAIN
        with aside():
            assert switches() == ASIDE
        assert switches() == SEARCHED
    assert switches() == PLAIN
    for block in (searching(True), aside()):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
        assert switches() == PLAIN


def test_algorithms_are_searched_for_passes_of_fixed_shapes_alone(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for decoding, whose batches may be of any size, nor where a rollout's first step has fewer rows."""
    fresh = load_training(config, threads=1, say=lambda line: None).record
    assert not fresh.cudnn_benchmark, "on a CPU there is no cuDNN"
    training = load_training(config, threads=1, record=replace(fresh, cudnn_benchmark=True), say=lambda line: None)
    assert isinstance(training.engine, FixedPasses)
    assert training.record.cudnn_benchmark
    decoded, learned = watch(monkeypatch, Policy, "decode"), watch(monkeypatch, PolicyLoss, "learn")
    forward, rows = Policy.forward, []

    def watched(self: Policy) -> Network:
        network = forward.fget(self)

        def call(latents: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, ...]:
            rows.append((len(latents), switches()))
            return network(latents, *rest, **options)

        return call

    monkeypatch.setattr(Policy, "forward", property(watched))
    iterate(training, 1, Console())
    assert set(decoded) == {PLAIN}
    assert set(learned) == {SEARCHED}
    full = 2 * config.micro_batch
    assert {seen for count, seen in rows if count == full} == {SEARCHED}
    assert {seen for count, seen in rows if count != full} == {PLAIN}
    assert switches() == PLAIN


@pytest.mark.parametrize("found", [2, 3])
def test_passes_that_are_tried_for_their_size_are_made_aside(
    config: TrainConfig, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN would keep what its heuristics name there, and search no more for the size that is chosen.

    They compute attention as it was chosen for the size that was expected; for another it is then chosen again.
    """
    learned, compared, record = watch(monkeypatch, PolicyLoss, "learn"), [], EngineRecord()

    def rows() -> set[int]:
        return {choice["shape"]["rows"] for choice in record.attention["choices"]}

    def find(run: Callable[[int], None], settled: int, expect: Callable[[int], None], _: bool) -> int:
        expect(3)
        assert rows() == {6}
        run(3)
        return found

    def compile_forward(*_: Any) -> None:
        compared.append(switches())

    def begin_on_a_gpu(record: EngineRecord, *_: Any) -> None:
        record.cudnn_benchmark = True

    choose, chosen = setup.choose_backends, []

    def counted(*args: Any) -> Any:
        chosen.append(args)
        return choose(*args)

    monkeypatch.setattr("fastgrpo.assembly.MicroBatchFinder", lambda *_: find)
    monkeypatch.setattr(setup, "compile_forward", compile_forward)
    monkeypatch.setattr(setup, "_begin", begin_on_a_gpu)
    monkeypatch.setattr(setup, "choose_backends", counted)
    wanted = altered(config, {"engine.compile": "on", "engine.attention": "sdpa"})
    load_training(wanted, threads=1, record=record, say=lambda line: None)
    assert learned == [ASIDE]
    assert compared == [SEARCHED]
    assert rows() == {2 * found}
    assert len(chosen) == (1 if found == 3 else 2)


def test_the_exact_reference_is_not_searched_for(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two rows in the wider dtype are computed once."""
    seen: list[tuple[torch.dtype, tuple[bool, bool]]] = []
    results = compilation._results

    def watched(call: Any, network: Any, example: Any, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        seen.append((dtype, switches()))
        return results(call, network, example, rows, dtype)

    monkeypatch.setattr(compilation, "_results", watched)
    policy = load_training(config, threads=1, say=lambda line: None).policy
    example = make_example(policy.unet, policy.latent_shape, 5, torch.float32, policy.device)
    with searching(True):
        check_compiled(policy.unet, policy.unet, policy.unet, example, 3)
    assert seen == [(torch.float64, PLAIN), (torch.float32, SEARCHED), (torch.float32, SEARCHED)]


@pytest.mark.parametrize(
    ("device", "changes", "before", "expected"),
    [
        ("cuda", {}, {}, True),
        ("cuda", {"engine.compile": "off", "engine.graphs": "off"}, {}, False),
        ("cuda", {"engine.compile": "off", "engine.graphs": "on"}, {}, True),
        ("cpu", {}, {}, False),
        ("cuda", {}, {"device": "a GPU", "micro_batch": 16}, False),  # a record of before there was the field
        ("cuda", {}, {"device": "a GPU", "micro_batch": 16, "cudnn_benchmark": True}, True),
        ("cuda", {}, {"device": "another", "micro_batch": 16}, True),
        ("cpu", {}, {"device": "another", "micro_batch": 16, "cudnn_benchmark": True}, False),
    ],
)
def test_a_resumed_run_does_as_it_did(
    device: str,
    changes: dict[str, str],
    before: dict[str, Any],
    expected: bool,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "device_name", lambda device: {"cuda": "a GPU", "cpu": "a CPU"}[device.type])
    record = EngineRecord(**before)
    automatic = {"engine.graphs": "auto", "engine.compile": "auto"}
    setup._begin(record, torch.device(device), altered(config, automatic | changes), lambda line: None)
    assert record.cudnn_benchmark is expected
    assert EngineRecord(**record.to_json()).cudnn_benchmark is expected
