"""Learning from one rollout: (sample, step) pairs, dealt into optimizer steps, micro-batched within each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgrpo.engine import not_finite
from fastgrpo.engine.not_finite import NotFinite
from fastgrpo.engine.old_policy import OldPolicy
from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.advantages import advantages, learned_from
from fastgrpo.grpo.branches import tree_of
from fastgrpo.grpo.loss import PairResults
from fastgrpo.grpo.micro_batch import Experience
from fastgrpo.grpo.pairs import Pairs, deal
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.types import PromptBatch, Rewards, Trajectory, UpdateStats


@dataclass
class _Statistics:
    """What stays on the device until the iteration ends: one entry per micro-batch or optimizer step.

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

    def add(self, results: Sequence[PairResults]) -> None:
        for each in results:
            self.ratio.append(each.ratio)
            self.clipped.append(each.clipped)
            self.policy_loss.append(each.loss)
            if each.kl is not None:
                self.kl.append(each.kl)

    def stepped(self, norm: Tensor, taken: bool) -> None:
        """An optimizer step was taken, or left out since fp16 overflowed."""
        if taken:
            self.grad_norm.append(norm)
        else:
            self.overflowed_steps += 1


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

    A step's loss is the mean over all the pairs dealt to it; pairs of flat groups count but are only computed with a KL
    term. Gradients of micro-batches are summed, so their size changes nothing but rounding.
    Every process learns from as many pairs of a step, or one more: what it does not draw itself it is sent before.
    A step whose loss or gradient is not finite changes nothing, and ends the update unless engine.not_finite is `skip`.
    Groups that the rewards leave out are not dealt; where a std is of all groups they count as flat.
    prompts, trajectory: this process's share. rewards: of all processes' prompts. iteration: from 1.
    generator: on the CPU, in the same state on all processes; deals the pairs. progress: called with how many of this
    process's pairs are done, and of how many.
    Raises ConfigError when no step can be trained, ValueError for rewards that cannot be compared or a missing base
    model, NotFinite when the loss or the gradient was not finite.
    """
    config, grpo, trainable = engine.config, engine.config.grpo, engine.trainable
    if config.kl_term and engine.loss.base is None:
        raise ValueError("grpo.kl is above 0 or guard.action is adapt, so update needs the base model")
    whole, total, ranks = rewards.whole, rewards.total, engine.ranks
    if config.engine.not_finite == "skip":
        total = torch.where(whole[:, None], total, 0.0)
    advantage, flat = advantages(total, grpo.advantage, grpo.std_floor, grpo.advantage_clamp, grpo.trim)
    learned = learned_from(total, grpo.trim, grpo.best_of) & whole[:, None]
    dealing = generator, ranks, engine.loss.kl_weight.value > 0
    steps, moves = deal(engine.schedule, learned, flat, config, iteration, *dealing) if whole.any() else ([], None)
    own = ranks.share(total.numel())
    tree = tree_of(engine.schedule, config)
    experience = Experience.of(prompts, trajectory, total.to(engine.policy.device), grpo, own, tree)
    if moves:
        experience = experience.exchanged(moves, ranks)
    old = OldPolicy(engine, experience, moves.received if moves else None)
    statistics, left_out = _Statistics(forward=old.begin()), list[NotFinite]()
    reached = _Reached(progress, sum(len(step.pairs) for step in steps))

    for position, step in enumerate(steps):
        if not step.computed:
            statistics.skipped_steps += 1
            continue
        pairs, weight = step.pairs, trainable.loss_scale / step.size
        skips = grpo.skip_clipped and old.moved
        if skips:
            evaluated = engine.evaluate_pairs(pairs, experience, old.remembered)
            statistics.forward += pairs.passes
            pairs = _unclipped(pairs, evaluated)
            reached.over(len(step.pairs) - len(pairs))
        results = engine.learn(pairs, experience, old.remembered, weight, reached)
        statistics.forward_backward += pairs.passes
        if old.mistaken(results):
            results = engine.learn(pairs, experience, old.remembered, weight, reached)
            statistics.forward_backward += pairs.passes
        reached.over(len(pairs))
        if not old.moved:
            statistics.forward += old.recompute(steps[position + 1 :])
        if not len(pairs):  # none here, or all are clipped: this process's share of the gradient is 0
            engine.weights.zero_gradient()
        found = evaluated if skips else results
        not_finite.spoil(engine.weights.collect_gradients(), found)
        engine.weights.reduce(ranks)
        norm, taken = trainable.step(config.optim.max_grad_norm)
        if not norm.isfinite():  # the only time that a step waits for the device, behind all of its passes

            def again(some: Pairs, weight: float = weight) -> object:
                return engine.learn(some, experience, old.remembered, weight)

            where = {"iteration": iteration, "optimizer_step": position + 1}
            tried = step.pairs if skips else pairs
            if error := not_finite.explain(engine, experience, tried, found, again, where):
                if config.engine.not_finite == "stop":
                    raise error
                left_out.append(error)
                continue
        if not old.moved:
            statistics.pairs_before_first_step += len(pairs)
        statistics.add(found)
        old.moved |= taken
        statistics.stepped(norm, taken)
    engine.clear()
    stats = _stats(statistics, advantage, flat, config, sum(step.size for step in steps), engine.ranks)
    return replace(stats, left_out=tuple(left_out))


class _Reached:
    """Tells `progress` how many of all pairs are done."""

    def __init__(self, progress: Callable[[int, int], None] | None, everything: int):
        self._progress, self._everything, self._before = progress, everything, 0

    def __call__(self, done: int) -> None:
        """done: pairs of the optimizer step at hand."""
        if self._progress is not None:
            self._progress(self._before + done, self._everything)

    def over(self, done: int) -> None:
        """So many more pairs are done before the next step's."""
        self._before += done


def _unclipped(pairs: Pairs, evaluated: list[PairResults]) -> Pairs:
    """The pairs whose ratio is not clipped yet: the others have no gradient."""
    return pairs[torch.cat([each.clipped for each in evaluated]) == 0] if evaluated else pairs


def _stats(
    statistics: _Statistics, advantage: Tensor, flat: Tensor, config: TrainConfig, pairs: int, ranks: Ranks
) -> UpdateStats:
    """Reduce on the device, fetch all numbers at once. Without a computed pair the ratio is 1 and the norm 0."""
    device = ranks.device if ranks.count > 1 else advantage.device

    def everywhere(tensors: list[Tensor], empty: float) -> Tensor:
        gathered = ranks.gather(torch.cat(tensors).to(device) if tensors else torch.empty(0, device=device))
        return gathered if len(gathered) else torch.full((1,), empty, device=device)

    ratio = everywhere(statistics.ratio, 1.0)
    clipped = everywhere([c.float() for c in statistics.clipped], 0.0)
    policy_loss = everywhere(statistics.policy_loss, 0.0)
    first = torch.cat(statistics.ratio)[: statistics.pairs_before_first_step] if statistics.ratio else torch.empty(0)
    first = everywhere([first], 1.0)
    grad_norm = torch.stack(statistics.grad_norm) if statistics.grad_norm else torch.zeros(1, device=device)
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
        "loss/policy": policy_loss.sum() / max(pairs, 1),
        "grad/norm": grad_norm.mean(),
        "grad/clipped_fraction": (grad_norm > config.optim.max_grad_norm).float().mean(),
    }
    if config.kl_term:
        values["kl/mean"] = everywhere(statistics.kl, 0.0).nanmean().nan_to_num()  # 0 where no pair's counts
    fetched = torch.stack([value.double().to(device) for value in values.values()]).tolist()
    numbers = dict(zip(values, fetched, strict=True))
    broken = [name for name, number in numbers.items() if not math.isfinite(number)]
    if broken:
        raise FloatingPointError(f"the update went wrong: {', '.join(broken)} not finite")
    counts = {"optim/steps": len(statistics.grad_norm), "optim/skipped_steps": statistics.skipped_steps}
    if config.engine.dtype == "fp16":
        counts["optim/overflowed_steps"] = statistics.overflowed_steps
    return UpdateStats(numbers | counts, statistics.forward, statistics.forward_backward)
