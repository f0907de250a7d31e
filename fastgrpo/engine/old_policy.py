"""The policy that drew a rollout: what the update's ratios are taken to."""

from collections.abc import Sequence

import torch

from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.loss import PairResults
from fastgrpo.grpo.micro_batch import Experience, Remembered
from fastgrpo.grpo.pairs import OptimizerStep, Pairs


class OldPolicy:
    """The denominators of one update, as `engine.old_log_prob` says.

    rollout   the trajectory's own numbers
    replay    until the policy moves, what its pass just gave; afterwards numbers that were recomputed before it moved
    detach    what the pass just gave, always

    The update's passes may round differently from the rollout's: BLAS orders its sums by the number of rows, and for
    very few by a row's place. So before the first optimizer step its passes are compared with the trajectory's numbers.
    Where a ratio leaves 1 by more than `engine.allowed`, this update and all later ones are replays; only this one if
    the engine halved a size since the rollout began.

    Pairs that another process has drawn have numbers of its kernels, which may round differently: those are computed
    anew here, before the policy moves.

    moved: whether an optimizer step has been taken; the update sets it.
    """

    def __init__(self, engine: Passes, experience: Experience, received: Pairs | None = None):
        """received: the pairs that other processes have drawn."""
        self.moved = False
        self._engine, self._experience, self._mode = engine, experience, engine.old_log_prob
        self._received = received if received is not None and len(received) else None
        self._drawn: Remembered | None = None
        self._recomputed: Remembered | None = None

    @property
    def remembered(self) -> Remembered | None:
        """What the next pass is compared with; None is the pass itself."""
        if self._mode == "rollout":
            return self._drawn or self._as_drawn()
        return self._recomputed if self.moved else None

    def begin(self) -> int:
        """Say what the rollouts' numbers are, before anything is learned. Returns how many pairs the UNet computed."""
        if self._mode != "rollout" or self._received is None:
            return 0
        found = self._engine.recompute([self._received], self._experience)
        self._drawn = self._as_drawn().extended(found)
        return self._received.passes

    def _as_drawn(self) -> Remembered:
        return Remembered.of(self._experience.trajectory, self._engine.config.grpo.ratio_norm)

    def mistaken(self, results: Sequence[PairResults]) -> bool:
        """Whether these passes must be repeated as a replay. Asks all processes, and waits for the device."""
        engine = self._engine
        if self._mode != "rollout" or self.moved:
            return False
        one = self._experience.trajectory.log_probs.new_ones(1)
        ratios = torch.cat([each.ratio for each in results]) if results else one
        apart = float(engine.ranks.gather((ratios - 1).abs().max()[None]).max())
        if not apart > engine.allowed:  # also where it is NaN, which the update will report
            return False
        self._mode = "replay"
        if not engine.ranks.any(engine.resized):
            engine.replay(apart)
        return True

    def recompute(self, steps: Sequence[OptimizerStep]) -> int:
        """In a replay, remember once what the policy says of these steps' pairs. Returns how many the UNet computed."""
        if self._mode != "replay" or self.moved or self._recomputed is not None:
            return 0
        self._recomputed = self._engine.recompute([step.pairs for step in steps], self._experience)
        return sum(step.pairs.passes for step in steps)
