"""Gradient checkpointing in a training: the same bits, and who decides on it."""

import re
from dataclasses import dataclass

import pytest
import torch

from fastgrpo.assembly import load_training
from fastgrpo.costs.throughput import count_and_measure
from fastgrpo.engine import batch_size
from fastgrpo.engine.batch_size import decide_gradient_checkpointing
from fastgrpo.engine.record import EngineRecord
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.distributed import Ranks
from support.micro_batches import Rows, noise_batch
from support.training import TIMED, altered, trained

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
