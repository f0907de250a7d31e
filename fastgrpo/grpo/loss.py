"""What is learned from one micro-batch of (sample, step) pairs: the UNet's pass, the loss, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastgrpo.kernels.ddim_step import log_prob
from fastgrpo.kernels.grpo_step import grpo_step
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.unet.copies import Network


@dataclass(frozen=True)
class MicroBatch:
    """N pairs. All tensors are on the policy's device.

    latents, taken: [N, C, H, W] float32, where the step began and ended. step: [N] int64, its position in the schedule.
    embeds: [N, L, D] float32. advantage: [N] float32. weight: [N] float32, of each pair's loss in the optimizer step's.
    old_log_prob: [N] float32, of the policy that took the step; old_mean: [N, C, H, W] float32, that policy's mean, with
    RatioNorm. None stands for the policy as it is.
    """

    latents: Tensor
    taken: Tensor
    step: Tensor
    embeds: Tensor
    advantage: Tensor
    weight: Tensor
    old_log_prob: Tensor | None = None
    old_mean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.step)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def padded(self, size: int) -> "MicroBatch":
        """`size` pairs, the first repeated at the end with no weight."""
        missing = size - len(self)
        if not missing:
            return self
        longer = (None if t is None else torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for t in self.tensors())
        batch = MicroBatch(*longer)
        return replace(batch, weight=torch.cat([self.weight, self.weight.new_zeros(missing)]))


@dataclass(frozen=True)
class PairResults:
    """What N pairs came to: ratio, clipped, loss (the policy's alone) and kl, [N] each; kl is None without a KL term.

    clipped: 1 where the ratio's upper bound leaves no gradient, -1 where the lower one does.
    """

    ratio: Tensor
    clipped: Tensor
    loss: Tensor
    kl: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        return self.ratio, self.clipped, self.loss, self.kl


@dataclass(frozen=True)
class PolicyLoss:
    """Turns micro-batches into gradients. trained: what to differentiate. base: computes for the model KL is measured from."""

    policy: Policy
    schedule: Schedule
    config: TrainConfig
    trained: Sequence[Tensor]
    base: Network | None = None

    def output(self, batch: MicroBatch, network: Network | None = None) -> Tensor:
        """What the policy as it is now, or `network`, says of the pairs: as `Policy.output`."""
        timesteps = self.schedule.timesteps[batch.step]
        return self.policy.output(batch.latents, timesteps, batch.embeds, self.config.rollout.guidance, network)

    def recompute(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs [N] and means [N, C, H, W] of the policy as it is now, float32."""
        output = self.output(batch).detach()
        return log_prob(output, *self._step(batch), keep_mean=True)

    def evaluate_pairs(self, batch: MicroBatch) -> PairResults:
        """What the pairs come to, without the way back."""
        return self._evaluate_pairs(self.output(batch).detach(), batch)[0]

    def learn(self, batch: MicroBatch) -> tuple[PairResults, tuple[Tensor, ...]]:
        """What the pairs come to, and their share of the gradient: one tensor per trained parameter."""
        output = self.output(batch)
        outcome, gradient = self._evaluate_pairs(output.detach(), batch)
        return outcome, torch.autograd.grad(output, self.trained, gradient)

    @torch.no_grad()
    def _evaluate_pairs(self, output: Tensor, batch: MicroBatch) -> tuple[PairResults, Tensor]:
        grpo = self.config.grpo
        result = grpo_step(
            output,
            *self._step(batch),
            batch.old_log_prob,
            advantage=batch.advantage,
            weight=batch.weight,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            base_output=self.output(batch, self.base) if grpo.kl > 0 else None,
            kl_weight=grpo.kl,
            ratio_norm=grpo.ratio_norm,
            old_mean=batch.old_mean,
        )
        kl = result.kl if grpo.kl > 0 else None
        return PairResults(result.ratio, result.clipped, result.loss, kl), result.gradient

    def _step(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """What the operators want to know of the pairs' steps beside the UNet's output."""
        return batch.latents, batch.taken, self.schedule.tables, batch.step, self.config.rollout.guidance


def blank_batch(learner: PolicyLoss, size: int) -> MicroBatch:
    """`size` pairs of noise, of no weight: what they come to has a gradient of 0."""
    policy = learner.policy
    zeros = torch.zeros(size, device=policy.device)
    latents = torch.randn(size, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    embeds = policy.unconditional.expand(size, -1, -1)
    return MicroBatch(latents, latents, zeros.long(), embeds, zeros, zeros)
