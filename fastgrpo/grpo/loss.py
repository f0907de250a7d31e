"""The loss of one micro-batch of (sample, step) pairs, and its gradient: the UNet's pass and the way back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgrpo.grpo.kl_weight import KlWeight
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.kernels.ddim_step import log_prob
from fastgrpo.kernels.grpo_step import GrpoStep, grpo_step
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.unet.copies import Network


@dataclass(frozen=True)
class PairResults:
    """Of N pairs the ratio, whether it is clipped, the policy's loss and the KL divergence, [N] each.

    clipped: 1 where the ratio's upper bound leaves no gradient, -1 where the lower one does. kl: None without KL term,
    NaN where it does not count.
    """

    ratio: Tensor
    clipped: Tensor
    loss: Tensor
    kl: Tensor | None

    def first(self, count: int) -> "PairResults":
        """Copies of the first `count` pairs' results."""
        kl = None if self.kl is None else self.kl[:count].clone()
        return PairResults(self.ratio[:count].clone(), self.clipped[:count].clone(), self.loss[:count].clone(), kl)


@dataclass(frozen=True)
class PolicyLoss:
    """Turns micro-batches into losses and gradients. trained: to differentiate by. base: what KL is measured from.

    kl_weight: of the KL term, at first grpo.kl. sparing: whether the base model computes only rows whose KL term
    counts; a GPU would have to be waited for to know them, and a captured graph cannot ask.
    """

    policy: Policy
    schedule: Schedule
    config: TrainConfig
    trained: Sequence[Tensor]
    base: Network | None = None
    sparing: bool = False
    kl_weight: KlWeight = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_weight", KlWeight(self.config.grpo.kl, self.policy.device))

    def learn(
        self, batch: MicroBatch, accumulate: Callable[[Sequence[Tensor]], object] | None = None
    ) -> tuple[PairResults, tuple[Tensor, ...]]:
        """Returns the pairs' results and, unless `accumulate` takes it, their gradient: one tensor per parameter."""
        rows = self._rows(batch)
        output = self.policy.forward(*rows, return_dict=False)[0]
        with torch.no_grad():
            base, held = None, self._held(batch)
            if self.base and held is not None:
                base = self.base(*(given[held] for given in rows), return_dict=False)[0]
            result = grpo_step(*self._step(batch, output.detach()), **self._terms(batch, base, held, output.detach()))
        gradient = torch.autograd.grad(output, self.trained, _of_siblings(result.gradient, batch.siblings))
        if accumulate:
            accumulate(gradient)
            gradient = ()
        return self._results(result, batch), gradient

    def evaluate_pairs(self, batch: MicroBatch) -> PairResults:
        """Returns the pairs' results, without the way back."""
        rows = self._rows(batch)
        output = self.policy.forward(*rows, return_dict=False)[0]
        with torch.no_grad():
            base, held = None, self._held(batch)
            if self.base and held is not None:
                base = self.base(*(given[held] for given in rows), return_dict=False)[0]
            result = grpo_step(*self._step(batch, output.detach()), **self._terms(batch, base, held, output.detach()))
        return self._results(result, batch)

    def recompute(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Returns log-probs [N] and means [N, C, H, W] of the policy as it is now, float32."""
        output = self.policy.forward(*self._rows(batch), return_dict=False)[0].detach()
        found, mean = log_prob(*self._step(batch, output), self._rescale, keep_mean=True)
        return found, mean

    # What the UNet and the operators are given. No pass is made here: each function returns before one begins.

    def _held(self, batch: MicroBatch) -> slice | Tensor | None:
        """The UNet's rows that the base model computes; None where it computes none."""
        if not self.config.kl_term:
            return None
        if not self.sparing or batch.kl_share.all():
            return slice(None)
        held = (batch.kl_share[:: batch.siblings] > 0).repeat(self.config.rollout.halves)
        return held if held.any() else None

    @staticmethod
    def _spread(base: Tensor | None, held: slice | Tensor | None, output: Tensor) -> Tensor | None:
        """What the base model said in the places of its rows; elsewhere `output`, where no KL term counts."""
        if base is None or not isinstance(held, Tensor):
            return base
        said = output.clone()
        said[held] = base
        return said

    def _rows(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        latents, step, embeds = (given[:: batch.siblings] for given in (batch.latents, batch.step, batch.embeds))
        return self.policy.rows(latents, self.schedule.timesteps[step], embeds, self.config.rollout.guidance)

    def _step(self, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """output: of the UNet's rows."""
        tables, guidance = self.schedule.tables, self.config.rollout.guidance
        return _each_sibling(output, batch.siblings), batch.latents, batch.taken, tables, batch.step, guidance

    @property
    def _rescale(self) -> float:
        return self.schedule.rescale(self.config.rollout.guidance)

    def _terms(
        self, batch: MicroBatch, base: Tensor | None, held: slice | Tensor | None, output: Tensor
    ) -> dict[str, Any]:
        """base: what the base model said of its rows, `held`. output: what the policy's UNet said of all."""
        grpo, base = self.config.grpo, self._spread(base, held, output)
        return {
            "base_output": None if base is None else _each_sibling(base, batch.siblings),
            "old_log_prob": batch.old_log_prob,
            "old_mean": batch.old_mean,
            "rewards": batch.rewards,
            "group": batch.group,
            "reward": batch.reward,
            "mode": grpo.advantage,
            "std_floor": grpo.std_floor,
            "clamp": grpo.advantage_clamp,
            "weight": batch.weight,
            "clip_low": grpo.clip_low,
            "clip_high": grpo.clip_high,
            "kl_weight": self.kl_weight.operand * batch.kl_share,
            "ratio_norm": grpo.ratio_norm,
            "rescale": self._rescale,
        }

    def _results(self, result: GrpoStep, batch: MicroBatch) -> PairResults:
        kl = torch.where(batch.kl_share > 0, result.kl, torch.nan) if self.config.kl_term else None
        return PairResults(result.ratio, result.clipped, result.loss, kl)


def _each_sibling(output: Tensor, siblings: int) -> Tensor:
    """The UNet's rows [R, C, H, W] -> [R * siblings, C, H, W]: each again for all that start from its latent."""
    return output if siblings == 1 else output.repeat_interleave(siblings, dim=0)


def _of_siblings(gradient: Tensor, siblings: int) -> Tensor:
    """The gradient with respect to `_each_sibling` of rows -> that with respect to the rows."""
    if siblings == 1:
        return gradient
    return gradient.unflatten(0, (-1, siblings)).sum(dim=1, dtype=torch.float32).to(gradient.dtype)
