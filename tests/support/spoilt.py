"""A training of several processes in which numbers are not finite: `main` takes RANK:ITERATION:KIND,... and arguments.

KIND: `reward`, of the second image of the process's first prompt; `loss` or `gradient`, of the third sample's pairs at
the second denoising step.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastgrpo import train
from fastgrpo.grpo.loss import PairResults, PolicyLoss
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.system.pulse import PULSE
from fastgrpo.types import Rewards

SLOT, STEP = 2, 1

Learned = tuple[PairResults, tuple[torch.Tensor, ...]]


def main(argv: Sequence[str]) -> int:
    troubles, *rest = argv
    for trouble in troubles.split(","):
        rank, iteration, kind = trouble.split(":")
        if os.environ["RANK"] == rank:
            spoil(kind, lambda at=int(iteration): PULSE.iteration == at)
    return train.main(rest)


def spoil(kind: str, when: Callable[[], bool]) -> Callable[..., Learned]:
    """Returns PolicyLoss.learn as it was."""
    learn, score = PolicyLoss.learn, SteeringReward.__call__

    def scored(self: SteeringReward, *args: Any) -> Rewards:
        rewards = score(self, *args)
        if when():
            rewards.total[0, 1] = torch.inf
        return rewards

    def learned(self: PolicyLoss, batch: MicroBatch) -> Learned:
        results, gradients = learn(self, batch)
        bad = (batch.reward == batch.rewards[batch.group, SLOT]) & (batch.step == STEP)
        if bad.any() and when():
            if kind == "loss":
                results = replace(results, loss=results.loss.masked_fill(bad, torch.nan))
            else:
                gradients = (*gradients[:-1], torch.full_like(gradients[-1], torch.inf))
        return results, gradients

    if kind == "reward":
        SteeringReward.__call__ = scored  # type: ignore[method-assign]
    else:
        PolicyLoss.learn = learned  # type: ignore[method-assign, assignment]
    return learn
