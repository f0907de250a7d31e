"""Learning from one rollout: (sample, step) pairs, dealt into optimizer steps, micro-batched within each."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.grpo.advantage import advantages
from fastgrpo.grpo.loss import clipped_loss, gaussian_kl
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule, gaussian_log_prob
from fastgrpo.types import PromptBatch, Rewards, Trajectory, UpdateStats


@dataclass(frozen=True)
class Pairs:
    """N (sample, step) pairs, the units of learning. Both on the policy's device.

    sample: [N] int64, in 0..B-1. step: [N] int64, the position in the schedule.
    """

    sample: Tensor
    step: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def split(self, size: int) -> list["Pairs"]:
        """Nearly equal micro-batches of at most `size`.

        Not full ones and a rest: BLAS on the CPU sums products of very few rows in another order, which would move the
        rest's ratios off 1 by a few 1e-7.
        """
        count = -(-len(self) // size)
        return [
            Pairs(sample, step)
            for sample, step in zip(self.sample.tensor_split(count), self.step.tensor_split(count), strict=True)
        ]


@dataclass(frozen=True)
class Part:
    """What one optimizer step learns from.

    size: how many pairs the loss is averaged over, those of flat groups included.
    pairs: those that are computed.
    """

    size: int
    pairs: Pairs


@dataclass(frozen=True)
class _Outcome:
    """What one micro-batch of N pairs came to. gradients: one per trained parameter; the others [N]; kl None without it."""

    gradients: tuple[Tensor, ...]
    ratio: Tensor
    clipped: Tensor
    policy_loss: Tensor
    kl: Tensor | None


@dataclass
class _Record:
    """What the update leaves on the device until the iteration ends: one entry per micro-batch or optimizer step."""

    ratio: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    policy_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)
    pairs_before_first_step: int = 0
    skipped_steps: int = 0

    def add(self, outcome: _Outcome) -> None:
        self.ratio.append(outcome.ratio)
        self.clipped.append(outcome.clipped)
        self.policy_loss.append(outcome.policy_loss)
        if outcome.kl is not None:
            self.kl.append(outcome.kl)


def update(
    policy: Policy,
    prompts: PromptBatch,
    trajectory: Trajectory,
    rewards: Rewards,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    generator: torch.Generator,
    base_unet: UNet2DConditionModel | None = None,
    progress: Callable[[int], None] | None = None,
) -> UpdateStats:
    """Take `config.updates_per_iteration` optimizer steps on one rollout.

    A step's loss is the mean over all the pairs dealt to it; pairs of flat groups count but are only computed when
    there is a KL term. Gradients of micro-batches are summed, so their size changes nothing but rounding.
    generator: on the CPU; deals the pairs. base_unet: the base model, needed when config.grpo.kl is above 0.
    progress: called after every micro-batch with the number of pairs just finished, and once with those left out;
    the numbers add up to `pair_count`.
    Raises ConfigError when no step can be trained, ValueError for rewards that cannot be compared or a missing
    base model, FloatingPointError when the loss or the gradient was not finite.
    """
    if config.grpo.kl > 0 and base_unet is None:
        raise ValueError("grpo.kl is above 0, so update needs the base model's UNet")
    grpo = config.grpo
    advantage, flat = advantages(rewards.total, grpo.advantage, grpo.std_floor, grpo.advantage_clamp)
    advantage, flat = advantage.to(policy.device), flat.to(policy.device)
    parts = _deal(policy, trajectory, schedule, flat, config, generator)
    trained = _trained(optimizer)
    learner = _Learner(policy, prompts, trajectory, schedule, advantage.flatten(), config, base_unet, trained)
    old_log_probs = learner.replay(parts) if grpo.old_log_prob == "replay" else trajectory.log_probs
    record = _Record()
    if progress is not None:
        progress(sum(part.size - len(part.pairs) for part in parts))
    for part in parts:
        if not len(part.pairs):
            record.skipped_steps += 1
            continue
        optimizer.zero_grad(set_to_none=True)
        # As many at a time as there are workers, so that no more gradients than those exist at once.
        for batches in _batched(part.pairs.split(config.micro_batch), policy.workers.count):
            learn = partial(learner.learn, part_size=part.size, old_log_probs=old_log_probs)
            for pairs, outcome in zip(batches, policy.workers.map(learn, batches), strict=True):
                _accumulate(trained, outcome.gradients)
                record.add(outcome)
                if progress is not None:
                    progress(len(pairs))
        if not record.grad_norm:
            record.pairs_before_first_step = len(part.pairs)
        record.grad_norm.append(torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return _stats(record, advantage, flat, config, pairs=sum(part.size for part in parts))


def trained_steps(schedule: Schedule, drop_last_steps: int) -> Tensor:
    """[S] int64 on the CPU: the positions in the schedule that are learned from.

    Raises ConfigError when none is left.
    """
    kept = schedule.trainable[: max(len(schedule) - drop_last_steps, 0)]
    steps = kept.nonzero().flatten().cpu()
    if not len(steps):
        raise ConfigError(
            f"grpo.drop_last_steps is {drop_last_steps}, which leaves none of the {len(schedule)} rollout.steps "
            "to train on; a smaller number is accepted"
        )
    return steps


def pair_count(schedule: Schedule, config: TrainConfig) -> int:
    """How many (sample, step) pairs one update deals out."""
    samples = config.prompts_per_iteration * config.group_size
    return samples * len(trained_steps(schedule, config.grpo.drop_last_steps))


@dataclass(frozen=True)
class _Learner:
    """What every micro-batch of one update needs. advantage: [B] float32. trained: the parameters to differentiate."""

    policy: Policy
    prompts: PromptBatch
    trajectory: Trajectory
    schedule: Schedule
    advantage: Tensor
    config: TrainConfig
    base_unet: UNet2DConditionModel | None
    trained: list[Tensor]

    def mean(self, pairs: Pairs, unet: UNet2DConditionModel | None = None) -> Tensor:
        """[N, C, H, W] float64: each pair's mean under the policy as it is now, or under `unet`."""
        latents = self.trajectory.latents[pairs.step, pairs.sample]
        embeds = self.prompts.embeds[pairs.sample // self.config.group_size]
        timesteps = self.schedule.timesteps[pairs.step]
        output = self.policy.predict(latents, timesteps, embeds, self.config.rollout.guidance, unet)
        return self.schedule.mean(pairs.step, latents, output)

    def log_prob(self, pairs: Pairs, mean: Tensor) -> Tensor:
        """[N] float32: log-probability of the step that was taken."""
        taken = self.trajectory.latents[pairs.step + 1, pairs.sample]
        return gaussian_log_prob(taken, mean, self.schedule.sigma[pairs.step])

    @torch.no_grad()
    def replay(self, parts: list[Part]) -> Tensor:
        """[T, B] float32: the log-probs of all the pairs to be computed, in the very micro-batches of the update."""
        log_probs = torch.zeros_like(self.trajectory.log_probs)
        batches = [b for part in parts if len(part.pairs) for b in part.pairs.split(self.config.micro_batch)]
        replayed = self.policy.workers.map(lambda pairs: self.log_prob(pairs, self.mean(pairs)), batches)
        for pairs, log_prob in zip(batches, replayed, strict=True):
            log_probs[pairs.step, pairs.sample] = log_prob
        return log_probs

    def learn(self, pairs: Pairs, part_size: int, old_log_probs: Tensor) -> _Outcome:
        """These pairs' share of their part's mean loss, and its gradient."""
        grpo = self.config.grpo
        mean = self.mean(pairs)
        log_prob = self.log_prob(pairs, mean)
        old = log_prob.detach() if grpo.old_log_prob == "detach" else old_log_probs[pairs.step, pairs.sample]
        loss, ratio, clipped = clipped_loss(log_prob, old, self.advantage[pairs.sample], grpo.clip_low, grpo.clip_high)
        policy_loss, kl = loss.detach(), None
        if grpo.kl > 0:
            with torch.no_grad():
                base_mean = self.mean(pairs, self.base_unet)
            kl = gaussian_kl(mean, base_mean, self.schedule.sigma[pairs.step])
            loss = loss + grpo.kl * kl
            kl = kl.detach()
        gradients = torch.autograd.grad(loss.sum() / part_size, self.trained)
        return _Outcome(gradients, ratio.detach(), clipped, policy_loss, kl)


def _accumulate(parameters: list[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add to `.grad`, in the order of the micro-batches, so that the sum does not depend on which worker was first."""
    if parameters[0].grad is None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    else:
        torch._foreach_add_([parameter.grad for parameter in parameters], list(gradients))


def _deal(
    policy: Policy,
    trajectory: Trajectory,
    schedule: Schedule,
    flat: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
) -> list[Part]:
    """Shuffle all pairs and deal them into nearly equal parts, so that every optimizer step sees a mix of samples."""
    steps = trained_steps(schedule, config.grpo.drop_last_steps)
    order = torch.randperm(len(steps) * trajectory.samples, generator=generator)
    sample, step = order % trajectory.samples, steps[order // trajectory.samples]
    computed = ~flat.cpu()[sample // config.group_size] | (config.grpo.kl > 0)
    parts = []
    for dealt in torch.arange(len(order)).tensor_split(config.updates_per_iteration):
        chosen = dealt[computed[dealt]]
        parts.append(Part(len(dealt), Pairs(sample[chosen].to(policy.device), step[chosen].to(policy.device))))
    return parts


def _batched(items: Iterable[Pairs], count: int) -> Iterator[tuple[Pairs, ...]]:
    """Runs of `count` items (itertools.batched, which Python 3.11 does not have)."""
    iterator = iter(items)
    while run := tuple(islice(iterator, count)):
        yield run


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _stats(record: _Record, advantage: Tensor, flat: Tensor, config: TrainConfig, pairs: int) -> UpdateStats:
    """Reduce on the device, fetch all numbers at once. Without a computed pair the ratio is 1 and the norm 0."""
    device = advantage.device
    ratio = torch.cat(record.ratio) if record.ratio else torch.ones(1, device=device)
    clipped = torch.cat(record.clipped) if record.clipped else torch.zeros(1, dtype=torch.bool, device=device)
    policy_loss = torch.cat(record.policy_loss) if record.policy_loss else torch.zeros(1, device=device)
    grad_norm = torch.stack(record.grad_norm) if record.grad_norm else torch.zeros(1, device=device)
    values = {
        "ratio/max_abs_dev_first": (ratio[: max(record.pairs_before_first_step, 1)] - 1).abs().max(),
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "clip/fraction": clipped.float().mean(),
        "clip/fraction_high": (clipped & (ratio > 1)).float().mean(),
        "clip/fraction_low": (clipped & (ratio < 1)).float().mean(),
        "advantage/zero_std_groups": flat.sum(),
        "advantage/abs_mean": advantage.abs().mean(),
        "loss/policy": policy_loss.sum() / pairs,
        "grad/norm": grad_norm.mean(),
        "grad/clipped_fraction": (grad_norm > config.optim.max_grad_norm).float().mean(),
    }
    if record.kl:
        values["kl/mean"] = torch.cat(record.kl).mean()
    numbers = dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
    broken = [name for name, number in numbers.items() if not math.isfinite(number)]
    if broken:
        raise FloatingPointError(f"the update went wrong: {', '.join(broken)} not finite; the weights are spoilt")
    return UpdateStats(numbers | {"optim/steps": len(record.grad_norm), "optim/skipped_steps": record.skipped_steps})
