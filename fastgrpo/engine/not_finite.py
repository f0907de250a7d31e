"""An optimizer step whose loss or gradient is not finite: found on every process alike, and explained.

Gradients are summed over all processes, so a number in one of them that is not finite makes the sum so everywhere, and
the optimizer leaves the step out. A loss or a ratio that is not finite need not have such a gradient, where it is
clipped: `spoil` sees to it. So all processes know of a bad step without asking each other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.loss import PairResults
from fastgrpo.grpo.micro_batch import Experience
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.system.errors import quoted

_NAMES = 20  # of parameters that a record lists


class NotFinite(FloatingPointError):
    """A loss or a gradient was not finite; all processes raise it at the same optimizer step.

    own: whether a pair of this process is to blame, which `record` and `tensors` then hold.
    record: what is known, JSON-able. tensors: of the first such pair, by name; empty where no pair alone is to blame.
    """

    def __init__(self, message: str, record: dict[str, Any], tensors: dict[str, Tensor], own: bool):
        super().__init__(message)
        self.message, self.record, self.tensors, self.own = message, record, tensors, own


def spoil(gradient: Tensor, results: Sequence[PairResults]) -> None:
    """Make the first number of a flat gradient NaN where a loss or a ratio is not finite; else add 0 to it.

    Does not wait for the device.
    """
    for each in results:
        gradient[:1] += (each.loss * 0 + each.ratio * 0).sum(0, keepdim=True)


def explain(
    engine: Passes,
    experience: Experience,
    pairs: Pairs,
    results: Sequence[PairResults],
    learn: Callable[[Pairs], object],
    where: dict[str, int],
) -> NotFinite | None:
    """What is wrong with the step whose summed gradient was not finite; None where only fp16's loss scale was too high.

    All processes call it together. pairs, results: this process's, in the same order; the flat gradient still has the
    sum. learn: computes the gradient of some of them. where: iteration and optimizer step, for the record.
    """
    lost = _not_finite(results)
    of_loss = engine.ranks.any(len(lost) > 0)
    if not of_loss and engine.trainable.scaler.is_enabled():
        return None
    weights = engine.weights
    broken = [name for name, part in weights.views(weights.gradient).items() if not bool(part.isfinite().all())]
    kind = "loss" if of_loss else "gradient"
    place = (lost[0] if lost else None) if of_loss else _first_bad_gradient(engine, pairs, learn)
    record: dict[str, Any] = {"kind": kind, **where, "process": engine.ranks.index}
    if not of_loss:
        record |= {"parameters": broken[:_NAMES], "parameters_not_finite": len(broken)}
    when = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in where.items())
    if place is None:
        return NotFinite(f"{when}: the {kind} is not finite", record, {}, own=False)
    described, tensors = _pair(experience, engine, pairs, place, results)
    sample = f"a sample of the iteration's prompt {described['prompt_number']}, which another process drew,"
    if "prompt" in described:
        sample = f"sample {described['sample']} of {engine.config.group_size} of prompt {quoted(described['prompt'])}"
    message = f"{when}: the {kind} of {sample} at denoising step {described['denoising_step']} is not finite"
    return NotFinite(message, record | described, tensors, own=True)


def _not_finite(results: Sequence[PairResults]) -> list[int]:
    """Which pairs have a loss or a ratio that is not finite."""
    if not results:
        return []
    fine = torch.cat([each.loss.isfinite() & each.ratio.isfinite() for each in results])
    found: list[int] = (~fine).nonzero().flatten().tolist()
    return found


def _first_bad_gradient(engine: Passes, pairs: Pairs, learn: Callable[[Pairs], object]) -> int | None:
    """The first pair whose gradient alone is not finite, by halving; None where there is none on this process."""

    def bad(start: int, stop: int) -> bool:
        learn(pairs[start:stop])
        return not bool(engine.weights.collect_gradients().isfinite().all())

    start, stop = 0, len(pairs)
    if not stop or not bad(start, stop):
        return None
    while stop - start > 1:
        middle = (start + stop) // 2
        if bad(start, middle):
            stop = middle
        elif bad(middle, stop):
            start = middle
        else:
            return None  # only their sum overflows
    return start


def _pair(
    experience: Experience, engine: Passes, pairs: Pairs, place: int, results: Sequence[PairResults]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a record says of the pair at `place`, and its tensors. Who has not drawn it has neither prompt nor image."""
    trajectory, group = experience.trajectory, engine.config.group_size
    batch = experience.micro_batch(pairs[place : place + 1], None, 0.0)
    sample, step = int(pairs.sample[place]), int(pairs.step[place])
    tensors = {"latents": batch.latents[0], "taken": batch.taken[0], "embeds": batch.embeds[0]}
    numbers = {
        "loss": torch.cat([each.loss for each in results])[place],
        "ratio": torch.cat([each.ratio for each in results])[place],
    }
    described: dict[str, Any] = {"prompt_number": int(batch.group[0]) + 1}
    if sample < trajectory.samples:
        prompt = experience.prompts.prompts[sample // group]
        described |= {"prompt": prompt.text, "label": prompt.label, "sample": sample % group + 1}
        numbers["old_log_prob"] = trajectory.log_probs[step, sample]
        tensors["image"] = trajectory.images[sample]
    described |= {"denoising_step": step + 1, "timestep": int(engine.schedule.timesteps[step])}
    described |= {name: str(float(number)) for name, number in numbers.items()}  # JSON has no NaN
    return described, tensors
