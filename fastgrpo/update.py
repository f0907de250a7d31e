"""Learning from one rollout: (sample, step) pairs, dealt into optimizer steps, micro-batched within each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastgrpo.engine.old_policy import OldPolicy, Remembered
from fastgrpo.engine.passes import Gather, Passes
from fastgrpo.grpo.advantages import advantages, learned_from
from fastgrpo.grpo.loss import MicroBatch, PairResults
from fastgrpo.grpo.pairs import Pairs, deal
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.types import PromptBatch, Rewards, Trajectory, UpdateStats


@dataclass
class _Statistics:
    """What the update leaves on the device until the iteration ends: one entry per micro-batch or optimizer step.

    forward, forward_backward: pairs that went through the UNet one way, and both ways.
    """

    ratio: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    policy_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)
    pairs_before_first_step: int = 0
    skipped_steps: int = 0
    overflowed_steps: int = 0
    forward: int = 0
    forward_backward: int = 0

    def add(self, outcome: PairResults) -> None:
        self.ratio.append(outcome.ratio)
        self.clipped.append(outcome.clipped)
        self.policy_loss.append(outcome.loss)
        if outcome.kl is not None:
            self.kl.append(outcome.kl)


def update(
    engine: Passes,
    prompts: PromptBatch,
    trajectory: Trajectory,
    rewards: Rewards,
    iteration: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> UpdateStats:
    """Take `updates_per_iteration` optimizer steps on one rollout.

    A step's loss is the mean over all the pairs dealt to it; pairs of flat groups count but are only computed when
    there is a KL term. Gradients of micro-batches are summed, so their size changes nothing but rounding.
    engine: runs the passes. prompts, trajectory: this process's share. rewards: of all processes' prompts.
    iteration: from 1. generator: on the CPU, in the same state on all processes; deals the pairs.
    progress: called with the number of this process's pairs that are done, and of all of them.
    Raises ConfigError when no step can be trained, ValueError for rewards that cannot be compared or a missing
    base model, FloatingPointError when the loss or the gradient was not finite.
    """
    config, ranks, trainable = engine.config, engine.ranks, engine.trainable
    grpo = config.grpo
    if grpo.kl > 0 and engine.loss.base is None:
        raise ValueError("grpo.kl is above 0, so update needs the base model")
    advantage, flat = advantages(rewards.total, grpo.advantage, grpo.std_floor, grpo.advantage_clamp, grpo.trim)
    learned = learned_from(rewards.total, grpo.trim, grpo.best_of)
    parts = deal(engine.schedule, learned, flat, config, iteration, generator, ranks)
    own_advantage = advantage.flatten()[ranks.share(advantage.numel())].to(engine.policy.device)
    gather = _Gather(prompts, trajectory, own_advantage, config.group_size)
    record, old = _Statistics(), OldPolicy(engine, trajectory, gather)
    done, everything = 0, sum(len(part.pairs) for part in parts)

    def learn(pairs: Pairs, weight: float) -> list[PairResults]:
        """Add the pairs' gradient to the sum."""
        nonlocal done
        outcomes = []
        for some, outcome in engine.learn(pairs, partial(gather, old=old.remembered, weight=weight)):
            outcomes.append(outcome)
            record.forward_backward += len(some)
            done += len(some)
            if progress is not None:
                progress(done, everything)
        return outcomes

    for position, part in enumerate(parts):
        if not part.computed:
            record.skipped_steps += 1
            continue
        engine.clear()
        scale = trainable.scaler.get_scale() if trainable.scaler.is_enabled() else 1.0
        weight = scale / part.size
        pairs, judged = part.pairs, grpo.skip_clipped and old.moved
        if judged:
            pairs = _unclipped(engine, pairs, partial(gather, old=old.remembered, weight=weight), record)
            done += len(part.pairs) - len(pairs)
        outcomes = learn(pairs, weight)
        if not old.moved:
            if old.mistaken(outcomes):
                engine.clear()
                done -= len(pairs)
                outcomes = learn(pairs, weight)
            record.forward += old.recompute(parts[position + 1 :])
            record.pairs_before_first_step += len(pairs)
        for outcome in outcomes if not judged else ():
            record.add(outcome)
        if not len(pairs):  # nothing here, or nothing that is not clipped: 0 is this process's share of the gradient
            engine.weights.zero_gradient()
        ranks.sum_([engine.weights.collect_gradients()])
        norm, taken = trainable.step(config.optim.max_grad_norm)
        if taken:
            record.grad_norm.append(norm)
            old.moved = True
        else:
            record.overflowed_steps += 1
    engine.clear()
    return _stats(record, advantage, flat, config, sum(part.size for part in parts), ranks)


@dataclass(frozen=True)
class _Gather:
    """Turns pairs into micro-batches. advantage: [B] float32, of this process's samples."""

    prompts: PromptBatch
    trajectory: Trajectory
    advantage: Tensor
    group_size: int

    def __call__(self, pairs: Pairs, old: Remembered | None, weight: float) -> MicroBatch:
        """old: None where the ratio's denominator is the policy as it is. weight: of each pair."""
        latents, sample, step = self.trajectory.latents, pairs.sample, pairs.step
        means = old and old.means
        return MicroBatch(
            latents=latents[step, sample],
            taken=latents[step + 1, sample],
            step=step,
            embeds=self.prompts.embeds[sample // self.group_size],
            advantage=self.advantage[sample],
            weight=self.advantage.new_full((len(pairs),), weight),
            old_log_prob=None if old is None else old.log_probs[step, sample],
            old_mean=None if means is None else means[step, sample],
        )


def _unclipped(engine: Passes, pairs: Pairs, gather: Gather, record: _Statistics) -> Pairs:
    """The pairs whose ratio is not clipped yet: the others have no gradient."""
    clipped = []
    for some, outcome in engine.evaluate_pairs(pairs, gather):
        record.add(outcome)
        record.forward += len(some)
        clipped.append(outcome.clipped)
    return pairs[torch.cat(clipped) == 0] if clipped else pairs


def _stats(
    record: _Statistics, advantage: Tensor, flat: Tensor, config: TrainConfig, pairs: int, ranks: Ranks
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
        raise FloatingPointError(f"the update went wrong: {', '.join(broken)} not finite")
    counts = {"optim/steps": len(record.grad_norm), "optim/skipped_steps": record.skipped_steps}
    if config.engine.dtype == "fp16":
        counts["optim/overflowed_steps"] = record.overflowed_steps
    return UpdateStats(numbers | counts, record.forward, record.forward_backward)
