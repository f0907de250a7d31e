"""Learning from one rollout: (sample, step) pairs, dealt into optimizer steps, micro-batched within each."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgrpo.config import TrainConfig
from fastgrpo.distributed import Ranks
from fastgrpo.grpo.advantage import advantages, learned_from
from fastgrpo.grpo.steps import steps_of_samples, trained_steps
from fastgrpo.kernels.ddim_step import log_prob
from fastgrpo.kernels.grpo_step import grpo_step
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.trainable import Trainable
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
        if not count:
            return []
        return [
            Pairs(sample, step)
            for sample, step in zip(self.sample.tensor_split(count), self.step.tensor_split(count), strict=True)
        ]


@dataclass(frozen=True)
class Part:
    """What one optimizer step learns from.

    size: how many pairs the loss is averaged over, those of flat groups included, on all processes.
    computed: how many of them are computed, on all processes. pairs: the share of this one, as its own samples.
    """

    size: int
    computed: int
    pairs: Pairs


@dataclass(frozen=True)
class _Old:
    """The policy that drew the trajectory, as the ratio's denominator needs it.

    log_probs: [T, B] float32. means: [T, B, C, H, W] float32, only with RatioNorm.
    """

    log_probs: Tensor
    means: Tensor | None


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
    overflowed_steps: int = 0

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
    trainable: Trainable,
    config: TrainConfig,
    iteration: int,
    generator: torch.Generator,
    base_unet: UNet2DConditionModel | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    progress: Callable[[int, int], None] | None = None,
) -> UpdateStats:
    """Take `config.updates_per_iteration` optimizer steps on one rollout.

    A step's loss is the mean over all the pairs dealt to it; pairs of flat groups count but are only computed when
    there is a KL term. Gradients of micro-batches are summed, so their size changes nothing but rounding.
    prompts, trajectory: this process's share. rewards: of all processes' prompts.
    iteration: from 1. generator: on the CPU, in the same state on all processes; deals the pairs.
    base_unet: the base model, needed when config.grpo.kl is above 0.
    progress: called after every micro-batch with the number of this process's pairs that are done, and of all of them.
    Raises ConfigError when no step can be trained, ValueError for rewards that cannot be compared or a missing
    base model, FloatingPointError when the loss or the gradient was not finite.
    """
    if config.grpo.kl > 0 and base_unet is None:
        raise ValueError("grpo.kl is above 0, so update needs the base model's UNet")
    grpo = config.grpo
    advantage, flat = advantages(rewards.total, grpo.advantage, grpo.std_floor, grpo.advantage_clamp, grpo.trim)
    learned = learned_from(rewards.total, grpo.trim, grpo.best_of)
    parts = _deal(policy, trajectory, schedule, learned, flat, config, iteration, generator, ranks)
    own_advantage = advantage.flatten()[ranks.share(advantage.numel())].to(policy.device)
    parameters = list(trainable.parameters.values())
    learner = _Learner(policy, prompts, trajectory, schedule, own_advantage, config, base_unet, parameters)
    old = learner.replay(parts) if grpo.old_log_prob == "replay" else _Old(trajectory.log_probs, trajectory.means)
    record = _Record()
    done, everything = 0, sum(len(part.pairs) for part in parts)
    for part in parts:
        if not part.computed:
            record.skipped_steps += 1
            continue
        trainable.optimizer.zero_grad(set_to_none=True)
        scale = trainable.scaler.get_scale() if trainable.scaler.is_enabled() else 1.0
        learn = partial(learner.learn, part_size=part.size, old=old, scale=scale)
        # As many at a time as there are workers, so that no more gradients than those exist at once.
        for batches in _batched(part.pairs.split(config.micro_batch), policy.workers.count):
            for pairs, outcome in zip(batches, policy.workers.map(learn, batches), strict=True):
                _accumulate(parameters, outcome.gradients)
                record.add(outcome)
                done += len(pairs)
                if progress is not None:
                    progress(done, everything)
        if not record.grad_norm:
            record.pairs_before_first_step = len(part.pairs)
        _sum_gradients(parameters, ranks)
        norm, taken = trainable.step(config.optim.max_grad_norm)
        if taken:
            record.grad_norm.append(norm)
        else:
            record.overflowed_steps += 1
    trainable.optimizer.zero_grad(set_to_none=True)
    return _stats(record, advantage, flat, config, sum(part.size for part in parts), ranks)


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

    def output(self, pairs: Pairs, unet: UNet2DConditionModel | None = None) -> Tensor:
        """What the policy as it is now, or `unet`, says of the pairs: as `Policy.output`."""
        latents = self.trajectory.latents[pairs.step, pairs.sample]
        embeds = self.prompts.embeds[pairs.sample // self.config.group_size]
        timesteps = self.schedule.timesteps[pairs.step]
        return self.policy.output(latents, timesteps, embeds, self.config.rollout.guidance, unet)

    def steps(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Where the pairs' steps began and ended, and the rest of what the operators want to know of them."""
        latents = self.trajectory.latents
        began, ended = latents[pairs.step, pairs.sample], latents[pairs.step + 1, pairs.sample]
        return began, ended, self.schedule.tables, pairs.step, self.config.rollout.guidance

    @torch.no_grad()
    def replay(self, parts: list[Part]) -> _Old:
        """The old policy recomputed, in the very micro-batches of the update, for all the pairs to be computed."""
        log_probs = torch.zeros_like(self.trajectory.log_probs)
        means = None if self.trajectory.means is None else torch.zeros_like(self.trajectory.means)
        batches = [b for part in parts for b in part.pairs.split(self.config.micro_batch)]
        for pairs, output in zip(batches, self.policy.workers.map(self.output, batches), strict=True):
            old, mean = log_prob(output, *self.steps(pairs), keep_mean=True)
            log_probs[pairs.step, pairs.sample] = old
            if means is not None:
                means[pairs.step, pairs.sample] = mean
        return _Old(log_probs, means)

    def learn(self, pairs: Pairs, part_size: int, old: _Old, scale: float) -> _Outcome:
        """These pairs' share of their part's mean loss, and its gradient times `scale`."""
        grpo = self.config.grpo
        remembered = grpo.old_log_prob != "detach"
        output = self.output(pairs)
        with torch.no_grad():
            base = self.output(pairs, self.base_unet) if grpo.kl > 0 else None
            outcome = grpo_step(
                output.detach(),
                *self.steps(pairs),
                old.log_probs[pairs.step, pairs.sample] if remembered else None,
                advantage=self.advantage[pairs.sample],
                weight=scale / part_size,
                clip_low=grpo.clip_low,
                clip_high=grpo.clip_high,
                base_output=base,
                kl_weight=grpo.kl,
                ratio_norm=grpo.ratio_norm,
                old_mean=old.means[pairs.step, pairs.sample] if grpo.ratio_norm and remembered else None,
            )
        gradients = torch.autograd.grad(output, self.trained, outcome.gradient)
        return _Outcome(gradients, outcome.ratio, outcome.clipped, outcome.loss, outcome.kl if grpo.kl > 0 else None)


def _accumulate(parameters: list[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add to `.grad`, in the order of the micro-batches, so that the sum does not depend on which worker was first."""
    if parameters[0].grad is None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    else:
        torch._foreach_add_([parameter.grad for parameter in parameters], list(gradients))


def _sum_gradients(parameters: list[Tensor], ranks: Ranks) -> None:
    """Add the processes' gradients; one without a pair in this part has none of its own."""
    if ranks.count == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_([parameter.grad for parameter in parameters])


def _deal(
    policy: Policy,
    trajectory: Trajectory,
    schedule: Schedule,
    learned: Tensor,
    flat: Tensor,
    config: TrainConfig,
    iteration: int,
    generator: torch.Generator,
    ranks: Ranks,
) -> list[Part]:
    """Shuffle all pairs and deal them into nearly equal parts, so that every optimizer step sees a mix of samples.

    learned: [P, G] bool and flat: [P] bool, of all processes' prompts; all deal alike, then each takes its own pairs.
    """
    samples = learned.flatten().nonzero().flatten().cpu()
    steps = trained_steps(schedule, config.grpo, iteration)
    steps = steps_of_samples(steps, len(samples), config.grpo.step_fraction, generator)
    count = steps.numel()
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(config.grpo.epochs)])
    row, column = order % len(samples), order // len(samples) % steps.shape[1]
    sample, step = samples[row], steps[row, column]
    computed = ~flat.cpu()[sample // config.group_size] | (config.grpo.kl > 0)
    own = ranks.share(learned.numel())
    parts = []
    for dealt in torch.arange(len(order)).tensor_split(config.updates_per_iteration):
        chosen = dealt[computed[dealt]]
        here = chosen[(sample[chosen] >= own.start) & (sample[chosen] < own.stop)]
        pairs = Pairs((sample[here] - own.start).to(policy.device), step[here].to(policy.device))
        parts.append(Part(len(dealt), len(chosen), pairs))
    return parts


def _batched(items: Iterable[Pairs], count: int) -> Iterator[tuple[Pairs, ...]]:
    """Runs of `count` items (itertools.batched, which Python 3.11 does not have)."""
    iterator = iter(items)
    while run := tuple(islice(iterator, count)):
        yield run


def _stats(
    record: _Record, advantage: Tensor, flat: Tensor, config: TrainConfig, pairs: int, ranks: Ranks
) -> UpdateStats:
    """Reduce on the device, fetch all numbers at once. Without a computed pair the ratio is 1 and the norm 0."""
    device = ranks.device if ranks.count > 1 else advantage.device

    def everywhere(tensors: list[Tensor], empty: float) -> Tensor:
        gathered = ranks.gather(torch.cat(tensors).to(device) if tensors else torch.empty(0, device=device))
        return gathered if len(gathered) else torch.full((1,), empty, device=device)

    ratio = everywhere(record.ratio, 1.0)
    clipped = everywhere([c.float() for c in record.clipped], 0.0)
    policy_loss = everywhere(record.policy_loss, 0.0)
    first = torch.cat(record.ratio)[: record.pairs_before_first_step] if record.ratio else torch.empty(0)
    first = everywhere([first], 1.0)
    grad_norm = torch.stack(record.grad_norm) if record.grad_norm else torch.zeros(1, device=device)
    values = {
        "ratio/max_abs_dev_first": (first - 1).abs().max(),
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "clip/fraction": clipped.abs().mean(),
        "clip/fraction_high": (clipped > 0).float().mean(),
        "clip/fraction_low": (clipped < 0).float().mean(),
        "advantage/zero_std_groups": flat.sum(),
        "advantage/abs_mean": advantage.abs().mean(),
        "loss/policy": policy_loss.sum() / pairs,
        "grad/norm": grad_norm.mean(),
        "grad/clipped_fraction": (grad_norm > config.optim.max_grad_norm).float().mean(),
    }
    if config.grpo.kl > 0:
        values["kl/mean"] = everywhere(record.kl, 0.0).mean()
    numbers = [value.double().to(device) for value in values.values()]
    numbers = dict(zip(values, torch.stack(numbers).tolist(), strict=True))
    broken = [name for name, number in numbers.items() if not math.isfinite(number)]
    if broken:
        raise FloatingPointError(f"the update went wrong: {', '.join(broken)} not finite; the weights are spoilt")
    counts = {"optim/steps": len(record.grad_norm), "optim/skipped_steps": record.skipped_steps}
    if config.engine.dtype == "fp16":
        counts["optim/overflowed_steps"] = record.overflowed_steps
    return UpdateStats(numbers | counts)
