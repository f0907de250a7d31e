"""(sample, step) pairs, the units of learning, and how an iteration's are dealt out to its optimizer steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.grpo.steps import steps_of_samples, trained_steps
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks


@dataclass(frozen=True)
class Pairs:
    """N pairs, on the policy's device. sample: [N] int64, in 0..B-1. step: [N] int64, the position in the schedule."""

    sample: Tensor
    step: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> "Pairs":
        return Pairs(self.sample[chosen], self.step[chosen])

    def split(self, size: int) -> list["Pairs"]:
        """Nearly equal micro-batches of at most `size`.

        Not full ones and a rest: BLAS on the CPU sums very few rows in another order, which would move the rest's
        ratios off 1 by a few 1e-7.
        """
        count = -(-len(self) // size)
        if not count:
            return []
        return [Pairs(*both) for both in zip(*(t.tensor_split(count) for t in (self.sample, self.step)), strict=True)]

    def blocks(self, size: int) -> list["Pairs"]:
        """Micro-batches of exactly `size`, and a rest."""
        return [self[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step learns from.

    size: pairs that the loss is averaged over, with those of flat groups, on all processes. computed: how many of them
    are computed. pairs: this process's share, numbered by its own B samples, and those of other processes' samples from
    B on, as they are received.
    """

    size: int
    computed: int
    pairs: Pairs


@dataclass(frozen=True)
class Moves:
    """Pairs that another process learns from than the one that drew them.

    sent: this process's, by its own samples, those for one process after the other. received: the M that come to it,
    numbered from B on, in the same order. to, come: how many for, and from, each process. total: on all processes.
    """

    sent: Pairs
    received: Pairs
    to: list[int]
    come: list[int]
    total: int


def deal(
    schedule: Schedule,
    learned: Tensor,
    flat: Tensor,
    config: TrainConfig,
    iteration: int,
    generator: torch.Generator,
    ranks: Ranks,
    kl: bool = False,
) -> tuple[list[OptimizerStep], Moves]:
    """Shuffle all pairs and deal them into nearly equal parts, so that every optimizer step sees a mix of samples.

    learned: [P, G] bool and flat: [P] bool, of all processes' prompts; all deal alike, then each takes its own pairs,
    and of processes with more than the others in a step some of theirs: nobody waits for more than one pair.
    kl: whether the KL term has a weight: then pairs of flat groups have a gradient too.
    Raises ConfigError when no step can be trained.
    """
    samples, steps = learned.flatten().nonzero().flatten().cpu(), trained_steps(schedule, config.grpo, iteration)
    steps = steps_of_samples(steps, len(samples), config.grpo.step_fraction, generator)
    count = steps.numel()
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(config.grpo.epochs)])
    row, column = order % len(samples), order // len(samples) % steps.shape[1]
    sample, step = samples[row], steps[row, column]
    computed = ~flat.cpu()[sample // config.group_size] | kl
    dealt = torch.arange(len(order)).tensor_split(config.updates_per_iteration)
    chosen = [part[computed[part]] for part in dealt]
    drawn = learned.numel() // ranks.count  # samples of each process
    drawer = sample // drawn
    learner = drawer.clone()
    for part in chosen:
        learner[part] = spread_evenly(drawer[part], ranks.count)

    moving = torch.cat(chosen)
    moving = moving[learner[moving] != drawer[moving]]
    sent, received = moving[drawer[moving] == ranks.index], moving[learner[moving] == ranks.index]
    sent, received = sent[learner[sent].argsort(stable=True)], received[drawer[received].argsort(stable=True)]
    place = sample - ranks.index * drawn
    place[received] = drawn + torch.arange(len(received))
    device = schedule.timesteps.device

    def pairs(chosen: Tensor) -> Pairs:
        return Pairs(place[chosen].to(device), step[chosen].to(device))

    to, come = (torch.bincount(of, minlength=ranks.count).tolist() for of in (learner[sent], drawer[received]))
    parts = [
        OptimizerStep(len(everything), len(part), pairs(part[learner[part] == ranks.index]))
        for everything, part in zip(dealt, chosen, strict=True)
    ]
    return parts, Moves(pairs(sent), pairs(received), to, come, len(moving))


def spread_evenly(drawer: Tensor, count: int) -> Tensor:
    """Who of `count` processes learns from each pair: as many pairs each, or one more, and as few moved as can be.

    drawer: [N] int64, who has drawn it. Returns [N] int64. A process with too many gives away its last ones.
    """
    have = torch.bincount(drawer, minlength=count)
    least, more = divmod(len(drawer), count)
    wanted = torch.full((count,), least)
    wanted[have.argsort(descending=True, stable=True)[:more]] += 1
    number = torch.empty_like(drawer)  # of each pair among its process's
    number[drawer.argsort(stable=True)] = torch.arange(len(drawer)) - (have.cumsum(0) - have).repeat_interleave(have)
    learner = drawer.clone()
    learner[number >= wanted[drawer]] = torch.arange(count).repeat_interleave((wanted - have).clamp(min=0))
    return learner
