"""How pairs are dealt to several processes: the parts of one process, each learned from once, by all equally many."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastgrpo.grpo.pairs import Moves, OptimizerStep, Pairs, deal, spread_evenly
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import GrpoConfig, RolloutConfig, TrainConfig
from fastgrpo.system.distributed import Ranks

COUNT, GROUP = 3, 6
SAMPLES = 6 * GROUP // COUNT
"""Of each process."""


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


def dealt(scheduler: dict, ranks: Ranks, branches: tuple[int, ...]) -> tuple[list[OptimizerStep], Moves]:
    """Six groups of six samples, of which one is flat, over four steps and twice, in three optimizer steps."""
    rollout, grpo = RolloutConfig(branches=branches), GrpoConfig(epochs=2)
    config = TrainConfig(prompts_per_iteration=6, group_size=GROUP, updates_per_iteration=3, grpo=grpo, rollout=rollout)
    schedule, learned = make_schedule(scheduler, 4, 1.0, torch.device("cpu")), torch.ones(6, GROUP, dtype=torch.bool)
    flat = torch.arange(6) == 2
    return deal(schedule, learned, flat, config, 1, torch.Generator().manual_seed(0), ranks)


def identified(pairs: Pairs, first: int, received: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs by the numbers of all processes' samples. first: of this process's. received: what it was sent."""
    return [
        received[sample - SAMPLES] if sample >= SAMPLES else (first + sample, step)
        for sample, step in zip(pairs.sample.tolist(), pairs.step.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("branches", "edges"), [((), [6] * 4), ((2, 3), [2, 6, 6, 6]), ((6,), [6] * 4)])
def test_processes_learn_from_the_pairs_of_one_and_from_equally_many(
    tiny_pipeline: Path, branches: tuple[int, ...], edges: list[int]
) -> None:
    """edges: that each group has in each step. Families stay together, so they are counted where there are any."""
    scheduler = json.loads((tiny_pipeline / "scheduler" / "scheduler_config.json").read_text())
    whole, nothing = dealt(scheduler, Ranks(), branches)
    taken = [zip(step.pairs.sample.tolist(), step.pairs.step.tolist(), strict=True) for step in whole]
    learned = Counter(pair for pairs in taken for pair in pairs)
    ends = [(group, edge, step) for group in (0, 1, 3, 4, 5) for step in range(3) for edge in range(edges[step])]
    assert learned == Counter({(GROUP * g + edge * (GROUP // edges[s]), s): 2 for g, edge, s in ends})
    assert (nothing.total, len(nothing.received)) == (0, 0)
    each = [dealt(scheduler, Ranks(index, COUNT), branches) for index in range(COUNT)]
    assert {moves.total for _, moves in each} == {sum(len(moves.sent) for _, moves in each)} != {0}
    found: list[list[tuple[int, int]]] = [[] for _ in whole]
    for index, (steps, moves) in enumerate(each):
        received = []
        for other, (_, theirs) in enumerate(each):
            assert theirs.to[index] == moves.come[other]
            start = sum(theirs.to[:index])
            received += identified(theirs.sent, other * SAMPLES, [])[start : start + theirs.to[index]]
        assert identified(moves.received, 0, received) == received
        for step, of_one, pairs in zip(steps, whole, found, strict=True):
            assert (step.size, step.computed) == (of_one.size, of_one.computed)
            pairs += identified(step.pairs, index * SAMPLES, received)
            families = sum(count for count, _ in of_one.pairs.families) or step.computed
            own = sum(count for count, _ in step.pairs.families) or len(step.pairs)
            assert families // COUNT <= own <= -(-families // COUNT)
    for step, pairs in zip(whole, found, strict=True):
        assert Counter(pairs) == Counter(zip(step.pairs.sample.tolist(), step.pairs.step.tolist(), strict=True))


def test_families_stay_whole_in_micro_batches() -> None:
    sample = torch.arange(3 * 4 + 5)
    pairs = Pairs(sample, torch.zeros_like(sample), ((3, 4), (5, 1)))
    for parts in (pairs.split(2), pairs.blocks(2)):
        assert [part.siblings for part in parts] == [4, 4, 1, 1, 1]
        assert all(len(part) <= 2 * part.siblings for part in parts)
        assert torch.equal(torch.cat([part.sample for part in parts]), sample)
    assert [len(part) for part in pairs.blocks(2)] == [8, 4, 2, 2, 1]
    assert pairs[sample > 3].siblings == 1, "some of them are pairs on their own"
    with pytest.raises(ValueError, match=r"families of \[1, 4\] pairs"):
        _ = pairs.siblings
