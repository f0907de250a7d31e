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
    are computed. pairs: this process's share, numbered by its own samples.
    """

    size: int
    computed: int
    pairs: Pairs


def deal(
    schedule: Schedule,
    learned: Tensor,
    flat: Tensor,
    config: TrainConfig,
    iteration: int,
    generator: torch.Generator,
    ranks: Ranks,
    kl: bool = False,
) -> list[OptimizerStep]:
    """Shuffle all pairs and deal them into nearly equal parts, so that every optimizer step sees a mix of samples.

    learned: [P, G] bool and flat: [P] bool, of all processes' prompts; all deal alike, then each takes its own pairs.
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
    own, device = ranks.share(learned.numel()), schedule.timesteps.device
    parts = []
    for dealt in torch.arange(len(order)).tensor_split(config.updates_per_iteration):
        chosen = dealt[computed[dealt]]
        here = chosen[(sample[chosen] >= own.start) & (sample[chosen] < own.stop)]
        pairs = Pairs((sample[here] - own.start).to(device), step[here].to(device))
        parts.append(OptimizerStep(len(dealt), len(chosen), pairs))
    return parts
