"""The policy that drew a rollout: what the update's ratios are taken to."""

from collections.abc import Sequence

import torch

from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.loss import PairResults
from fastgrpo.grpo.micro_batch import Experience, Remembered
from fastgrpo.grpo.pairs import OptimizerStep


class OldPolicy:
    """The denominators of one update, as `engine.old_log_prob` says.

    rollout   the trajectory's own numbers
    replay    until the policy moves, what its pass just gave; afterwards numbers that were recomputed before it moved
    detach    what the pass just gave, always

    A pass may be rounded otherwise than the rollout's: BLAS chooses the order of its sums by the number of rows, and of
    very few by the place of a row among them. So before the first optimizer step the trajectory's numbers are compared
    with the passes that the step learns from. Where ratios leave 1 by more than `engine.allowed`, this update is a
    replay, and so are all later ones; this one alone if the engine halved a size since the rollout began.

    moved: whether an optimizer step has been taken; the update says so.
    """

    def __init__(self, engine: Passes, experience: Experience):
        self.moved = False
        self._engine, self._experience, self._mode = engine, experience, engine.old_log_prob
        self._recomputed: Remembered | None = None

    @property
    def remembered(self) -> Remembered | None:
        """What the next pass is compared with; None is itself."""
        if self._mode == "rollout":
            trajectory = self._experience.trajectory
            return Remembered(trajectory.log_probs, trajectory.means if self._engine.config.grpo.ratio_norm else None)
        return self._recomputed if self.moved else None

    def mistaken(self, results: Sequence[PairResults]) -> bool:
        """Whether these passes of a policy that has not moved are to be done again, for its numbers were not theirs.

        Asks all processes, and waits for the device.
        """
        engine = self._engine
        if self._mode != "rollout" or self.moved:
            return False
        one = self._experience.trajectory.log_probs.new_ones(1)
        ratios = torch.cat([each.ratio for each in results]) if results else one
        apart = float(engine.ranks.gather((ratios - 1).abs().max()[None]).max())
        if not apart > engine.allowed:  # nor if it is not a number: the update will say so
            return False
        self._mode = "replay"
        if not engine.ranks.any(engine.resized):
            engine.replay(apart)
        return True

    def recompute(self, steps: Sequence[OptimizerStep]) -> int:
        """Remember what the policy says now of the pairs of these steps, if it will be needed: once, before it moves.

        Returns how many pairs went through the UNet.
        """
        if self._mode != "replay" or self.moved or self._recomputed is not None:
            return 0
        self._recomputed = self._engine.recompute([step.pairs for step in steps], self._experience)
        return sum(len(step.pairs) for step in steps)
