"""The policy that drew a rollout: what the update's ratios are taken to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.loss import MicroBatch, PairResults
from fastgrpo.grpo.pairs import OptimizerStep
from fastgrpo.types import Trajectory


@dataclass(frozen=True)
class Remembered:
    """log_probs: [T, B] float32. means: [T, B, C, H, W] float32, only with RatioNorm."""

    log_probs: Tensor
    means: Tensor | None


class OldPolicy:
    """The denominators of one update, as `engine.old_log_prob` says.

    rollout   the trajectory's own numbers
    replay    until the policy moves, what its pass just gave; afterwards numbers that were recomputed before it moved
    detach    what the pass just gave, always

    A pass may be rounded otherwise than the rollout's: BLAS chooses the order of its sums by the number of rows, and of very few
    by the place of a row among them. So before the first optimizer step the trajectory's numbers are compared with the
    passes that the step learns from. Where ratios leave 1 by more than `engine.allowed`, this update is a replay, and so
    are all later ones; this one alone if the engine halved a size since the rollout began.

    moved: whether an optimizer step has been taken; the update says so.
    """

    def __init__(self, engine: Passes, trajectory: Trajectory, gather: Callable[..., MicroBatch]):
        """gather: (pairs, old: Remembered or None, weight) -> their micro-batch."""
        self.moved = False
        self._engine, self._trajectory, self._gather, self._ranks = engine, trajectory, gather, engine.ranks
        self._mode, self._keeps_means = engine.old_log_prob, engine.config.grpo.ratio_norm
        self._recomputed: Remembered | None = None

    @property
    def remembered(self) -> Remembered | None:
        """What the next pass is compared with; None is itself."""
        if self._mode == "rollout":
            return Remembered(self._trajectory.log_probs, self._trajectory.means if self._keeps_means else None)
        return self._recomputed if self.moved else None

    def mistaken(self, outcomes: Sequence[PairResults]) -> bool:
        """Whether these passes of a policy that has not moved are to be done again, for its numbers were not theirs.

        Asks all processes, and waits for the device.
        """
        engine = self._engine
        if self._mode != "rollout" or self.moved:
            return False
        ratios = (
            torch.cat([outcome.ratio for outcome in outcomes]) if outcomes else self._trajectory.log_probs.new_ones(1)
        )
        apart = float(self._ranks.gather((ratios - 1).abs().max()[None]).max())
        if not apart > engine.allowed:  # nor if it is not a number: the update will say so
            return False
        self._mode = "replay"
        if not self._ranks.any(engine.resized):
            engine.replay(apart)
        return True

    def recompute(self, parts: Sequence[OptimizerStep]) -> int:
        """Remember what the policy says now of the pairs of these parts, if it will be needed: once, before it moves.

        Returns how many pairs went through the UNet.
        """
        if self._mode != "replay" or self.moved or self._recomputed is not None:
            return 0
        engine, trajectory = self._engine, self._trajectory
        log_probs = torch.zeros_like(trajectory.log_probs)
        means = torch.zeros_like(trajectory.latents[1:]) if self._keeps_means else None
        passed, size = 0, 0
        while size != engine.micro_batch:  # from the beginning, should memory run out on the way
            size = engine.micro_batch
            for part in parts:
                for pairs, (old, mean) in engine.recompute(part.pairs, partial(self._gather, old=None, weight=0.0)):
                    log_probs[pairs.step, pairs.sample] = old
                    if means is not None:
                        means[pairs.step, pairs.sample] = mean
                    passed += len(pairs)
        self._recomputed = Remembered(log_probs, means)
        return passed
