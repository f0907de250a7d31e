"""Micro-batches of (sample, step) pairs: the tensors that one pass of the update takes."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.grpo.advantages import compared_rewards
from fastgrpo.grpo.branches import Tree
from fastgrpo.grpo.pairs import Moves, Pairs
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import GrpoConfig, TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.types import POSITIVE, PromptBatch, Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """N pairs. All tensors are on the policy's device.

    rewards: [P, G] float32, of all groups, to be compared in the loss. group: [N] int64, the one that a pair is of.
    reward: [N] float32, what it led to.
    latents, taken: [N, C, H, W] float32, where the step began and ended. step: [N] int64, its position in the schedule.
    siblings: how many neighbouring pairs start from one latent each time, so that the UNet has N / siblings rows.
    embeds: [N, L, D] float32. weight: [N] float32, of each pair's loss in the optimizer step's.
    kl_share: [N] float32, of the KL term's weight: 1 where it counts, 0 elsewhere.
    old_log_prob: [N] float32, of the policy that took the step. old_mean: [N, C, H, W] float32, its mean, for
    RatioNorm. None stands for the policy as it is.
    """

    rewards: Tensor
    group: Tensor
    reward: Tensor
    latents: Tensor
    taken: Tensor
    step: Tensor
    embeds: Tensor
    weight: Tensor
    kl_share: Tensor
    old_log_prob: Tensor | None = None
    old_mean: Tensor | None = None
    siblings: int = 1

    def __len__(self) -> int:
        return len(self.step)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, name) for name in TENSORS)

    def padded(self, size: int) -> "MicroBatch":
        """Returns `size` families of siblings, the first repeated at the end with no weight."""
        missing = size * self.siblings - len(self)
        if not missing:
            return self
        given = {name: getattr(self, name) for name in TENSORS if name != "rewards"}
        rest = torch.arange(missing, device=self.step.device) % self.siblings
        longer: dict[str, Any] = {name: torch.cat([t, t[rest]]) for name, t in given.items() if t is not None}
        longer["weight"] = torch.cat([self.weight, self.weight.new_zeros(missing)])
        return replace(self, **longer)


TENSORS = tuple(field.name for field in fields(MicroBatch))[:-1]
SURE = len(TENSORS) - 2
"""How many of its tensors are always there: all but the last two."""


def blank_batch(policy: Policy, config: TrainConfig, families: int, siblings: int = 1) -> MicroBatch:
    """Returns so many families of pairs of noise, of no weight: their gradient is 0."""
    size = families * siblings
    zeros = torch.zeros(size, device=policy.device)
    latents = torch.randn(size, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    embeds, index = policy.unconditional.expand(size, -1, -1), zeros.long()
    compared = config.group_size - 2 * config.grpo.trim
    rewards = torch.zeros(config.prompts_per_iteration, compared, device=policy.device)
    return MicroBatch(rewards, index, zeros, latents, latents, index, embeds, zeros, zeros, siblings=siblings)


@dataclass(frozen=True)
class Remembered:
    """What the old policy said of a rollout's steps, in the order of `Experience.places`.

    log_probs: [T * B + M] float32. means: [T * B + M, C, H, W] float32, only with RatioNorm.
    """

    log_probs: Tensor
    means: Tensor | None

    @classmethod
    def of(cls, trajectory: Trajectory, ratio_norm: bool) -> "Remembered":
        """What was said when the trajectory was drawn; the means for RatioNorm only."""
        means = trajectory.means if ratio_norm else None
        return cls(trajectory.log_probs.flatten(), None if means is None else means.flatten(0, 1))

    def extended(self, other: "Remembered") -> "Remembered":
        """This, and what the other says of the places beyond."""
        count = len(self.log_probs)
        means = None
        if self.means is not None and other.means is not None:
            means = torch.cat([self.means, other.means[count:]])
        return Remembered(torch.cat([self.log_probs, other.log_probs[count:]]), means)


@dataclass(frozen=True)
class Experience:
    """What an update learns from, on one process.

    rewards: [P, G] float32, all that are compared, of all processes. group: [B] int64, the rows of this process's
    samples. reward: [T, B] float32, what their steps led to: of a tree's edge the mean over its samples.
    kl_share: [P] float32, as of `MicroBatch`, of this process's prompts.
    received: the M pairs that other processes have drawn and this one learns from, if there are any.
    """

    prompts: PromptBatch
    trajectory: Trajectory
    rewards: Tensor
    group: Tensor
    reward: Tensor
    kl_share: Tensor
    received: MicroBatch | None = None

    @classmethod
    def of(
        cls,
        prompts: PromptBatch,
        trajectory: Trajectory,
        rewards: Tensor,
        grpo: GrpoConfig,
        own: slice = slice(None),
        tree: Tree | None = None,
    ) -> "Experience":
        """rewards: [P, G] of all processes, on the device. own: this process's samples. tree: how they branch."""
        compared = compared_rewards(rewards, grpo.trim)
        group = torch.arange(len(rewards), device=rewards.device).repeat_interleave(rewards.shape[1])
        held = [float(grpo.kl_prompts == "all" or prompt.label == POSITIVE) for prompt in prompts.prompts]
        share = torch.tensor(held, device=rewards.device)
        reward = rewards.float().flatten()[own]
        reward = tree.edge_means(reward) if tree else reward.expand(trajectory.steps, -1)
        return cls(prompts, trajectory, compared, group[own], reward, share)

    def exchanged(self, moves: Moves, ranks: Ranks) -> "Experience":
        """Send the pairs that others learn from, and receive those of others. To be called by all processes."""
        if not moves.total:
            return self
        sent = self.micro_batch(moves.sent[:], None, 0.0)  # each on its own: families of all sizes are sent together
        given: dict[str, Any] = {name: ranks.exchange(getattr(sent, name), moves.to, moves.come) for name in _MOVED}
        weight = self.rewards.new_zeros(len(moves.received))
        received = MicroBatch(rewards=self.rewards, step=moves.received.step, weight=weight, **given)
        return replace(self, received=received) if len(received) else self

    def places(self, pairs: Pairs) -> Tensor:
        """[N] int64: where these pairs are among the T * B of this process's samples and the M that it received."""
        steps, samples = self.trajectory.log_probs.shape
        own = pairs.step * samples + pairs.sample
        return torch.where(pairs.sample < samples, own, (steps - 1) * samples + pairs.sample)

    def micro_batch(self, pairs: Pairs, old: Remembered | None, weight: float) -> MicroBatch:
        """Gather the tensors of these pairs. old, weight: as of `MicroBatch`."""
        latents, samples, step = self.trajectory.latents, self.trajectory.samples, pairs.step
        own = pairs.sample if self.received is None else pairs.sample.clamp(max=samples - 1)
        prompt = own // (samples // len(self.prompts))
        places = self.places(pairs)
        gathered = MicroBatch(
            rewards=self.rewards,
            group=self.group[own],
            reward=self.reward[step, own],
            latents=latents[step, own],
            taken=latents[step + 1, own],
            step=step,
            embeds=self.prompts.embeds[prompt],
            weight=self.rewards.new_full((len(pairs),), weight),
            kl_share=self.kl_share[prompt],
            old_log_prob=None if old is None else old.log_probs[places],
            old_mean=None if old is None or old.means is None else old.means[places],
            siblings=pairs.siblings,
        )
        return gathered if self.received is None else _with_received(gathered, self.received, pairs.sample - samples)


_MOVED = "group", "reward", "latents", "taken", "embeds", "kl_share"
"""What a pair is sent with."""


def _with_received(gathered: MicroBatch, received: MicroBatch, number: Tensor) -> MicroBatch:
    """The pairs with those that were received in their places. number: [N], of each in `received`; of others below 0.

    Both are looked up for all pairs, and one is chosen: to know which is which, the host would wait for the device.
    """
    chosen: dict[str, Any] = {}
    for name in _MOVED:
        mine, theirs = getattr(gathered, name), getattr(received, name)[number.clamp(min=0)]
        chosen[name] = torch.where((number < 0).view(-1, *[1] * (mine.dim() - 1)), mine, theirs)
    return replace(gathered, **chosen)
