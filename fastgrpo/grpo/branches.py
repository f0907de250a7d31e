"""Groups that share the beginning of their trajectories: one path until the first branching, a tree from there on.

With widths (2, 4) a group of 8 is one trajectory until the first step with noise, which leads to two latents; the next
step with noise leads from each of these to four, and from there on all 8 go on alone. An edge of the tree is learned
from once, with the mean reward of the samples it led to (BranchGRPO, Li et al., arXiv 2509.06040; TreeGRPO, Ding and
Ye, arXiv 2512.08153).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig


@dataclass(frozen=True)
class Tree:
    """How many different latents a group has: `counts[i]` before step i, `counts[-1]` in the end, which is G.

    Sample j of a group is on the path of the node j // (G / count).
    """

    counts: tuple[int, ...]

    @property
    def group_size(self) -> int:
        return self.counts[-1]

    @property
    def denoised(self) -> int:
        """Latents that a group's steps start from, over all steps."""
        return sum(self.counts[:-1])

    def width(self, step: int) -> int:
        """Latents that this step leads to from each one."""
        return self.counts[step + 1] // self.counts[step]

    def widths(self, steps: Iterable[int]) -> list[int]:
        """The different widths of these steps, the widest first."""
        return sorted({self.width(step) for step in steps}, reverse=True)

    def phases(self) -> list[tuple[range, int]]:
        """Neighbouring steps that start from equally many latents, and this number."""
        starts = [i for i, count in enumerate(self.counts[:-1]) if not i or count != self.counts[i - 1]]
        return [(range(*both), self.counts[both[0]]) for both in pairwise([*starts, len(self.counts) - 1])]

    def nodes(self, samples: Tensor, count: int) -> Tensor:
        """Of [P * G, ...] samples those that stand for the `count` nodes of each group, [P * count, 1, ...], a view."""
        spread = self.group_size // count
        return samples.view(len(samples) // spread, spread, *samples.shape[1:])[:, :1]

    def spread(self, nodes: Tensor, count: int) -> Tensor:
        """[P * count, ...], of each node -> [P * G, ...], of each sample."""
        return nodes.repeat_interleave(self.group_size // count, dim=0)

    def edge_means(self, rewards: Tensor) -> Tensor:
        """[T, P * G] float32: at each step the mean reward of all samples that it led to. rewards: [P * G] float32."""
        rows = []
        for count in self.counts[1:]:
            means = rewards.double().view(-1, self.group_size // count).mean(dim=1).float()
            rows.append(rewards if count == self.group_size else self.spread(means, count))
        return torch.stack(rows)


def tree_of(schedule: Schedule, config: TrainConfig) -> Tree | None:
    """The tree of rollout.branches, whose widths are those of the first steps with noise; None where samples are alone.

    Raises ValueError where there are fewer such steps than widths.
    """
    return grown(schedule.trainable.tolist(), config.rollout.branches) if config.rollout.branches else None


def grown(noisy: Sequence[bool], widths: Sequence[int]) -> Tree:
    """noisy: of each step. Raises ValueError where fewer of them are noisy than there are widths."""
    if sum(noisy) < len(widths):
        raise ValueError(f"a tree of widths {tuple(widths)} needs as many steps with noise; there are {sum(noisy)}")
    left, counts = list(widths), [1]
    for noise in noisy:
        counts.append(counts[-1] * (left.pop(0) if noise and left else 1))
    return Tree(tuple(counts))
