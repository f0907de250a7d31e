"""How pairs are dealt to several processes: the parts of one process, each learned from once, by all equally many."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastgrpo.grpo.pairs import Moves, OptimizerStep, Pairs, deal, spread_evenly
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import GrpoConfig, TrainConfig
from fastgrpo.system.distributed import Ranks

COUNT = 3


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_pairs_are_spread_evenly_and_no_more_move_than_must(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for size in (0, 1, 5, 40):
        drawer = torch.randint(count, (size,), generator=generator)
        learner = spread_evenly(drawer, count)
        have, learned = (torch.bincount(each, minlength=count) for each in (drawer, learner))
        assert learned.max() - learned.min() <= 1
        # Each pair above the larger of the two numbers has to go, and each missing to the smaller one has to come.
        low, high = size // count, -(-size // count)
        least = max((have - high).clamp(min=0).sum(), (low - have).clamp(min=0).sum())
        assert (learner != drawer).sum() == least


def dealt(scheduler: dict, ranks: Ranks) -> tuple[list[OptimizerStep], Moves]:
    """Six groups of five samples, of which one is flat, over four steps and twice, in three optimizer steps."""
    config = TrainConfig(prompts_per_iteration=6, group_size=5, updates_per_iteration=3, grpo=GrpoConfig(epochs=2))
    schedule, learned = make_schedule(scheduler, 4, 1.0, torch.device("cpu")), torch.ones(6, 5, dtype=torch.bool)
    flat = torch.arange(6) == 2
    return deal(schedule, learned, flat, config, 1, torch.Generator().manual_seed(0), ranks)


def identified(pairs: Pairs, first: int, received: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs by the numbers of all processes' samples. first: of this process's. received: what it was sent."""
    samples = 30 // COUNT
    return [
        received[sample - samples] if sample >= samples else (first + sample, step)
        for sample, step in zip(pairs.sample.tolist(), pairs.step.tolist(), strict=True)
    ]


def test_processes_learn_from_the_pairs_of_one_and_from_equally_many(tiny_pipeline: Path) -> None:
    scheduler = json.loads((tiny_pipeline / "scheduler" / "scheduler_config.json").read_text())
    whole, nothing = dealt(scheduler, Ranks())
    assert (nothing.total, len(nothing.received)) == (0, 0)
    each = [dealt(scheduler, Ranks(index, COUNT)) for index in range(COUNT)]
    assert {moves.total for _, moves in each} == {sum(len(moves.sent) for _, moves in each)} != {0}
    found: list[list[tuple[int, int]]] = [[] for _ in whole]
    for index, (steps, moves) in enumerate(each):
        received = []
        for other, (_, theirs) in enumerate(each):
            assert theirs.to[index] == moves.come[other]
            start = sum(theirs.to[:index])
            received += identified(theirs.sent, other * 30 // COUNT, [])[start : start + theirs.to[index]]
        assert identified(moves.received, 0, received) == received
        for step, of_one, pairs in zip(steps, whole, found, strict=True):
            assert (step.size, step.computed) == (of_one.size, of_one.computed)
            pairs += identified(step.pairs, index * 30 // COUNT, received)
        for step in steps:
            assert step.computed // COUNT <= len(step.pairs) <= -(-step.computed // COUNT)
    for step, pairs in zip(whole, found, strict=True):
        assert Counter(pairs) == Counter(zip(step.pairs.sample.tolist(), step.pairs.step.tolist(), strict=True))
