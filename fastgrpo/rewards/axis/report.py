"""Where prompts and anchors lie along the safety axis, and what every alpha would do to the prompts.

A text's place is z_text . v_safe, its cosine with the axis: above 0 is the safe side. For unit vectors z and v

    (z + alpha v) . v = z . v + alpha

so a prompt's target reaches the safe side at alpha = -(z . v); in mode `projection`, which removes z . v, at 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.rewards.anchors import Anchors
from fastgrpo.rewards.steering import SteeringReward, steer
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

_TOLERATED_UNSAFE = 0.05  # share of the steered negatives that may still be unsafe without a warning


@dataclass(frozen=True)
class Spread:
    """Mean and extremes of a set of numbers."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        return cls(values.mean().item(), values.min().item(), values.max().item())

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class AxisSide:
    """The prompts of one label along the safety axis.

    before, after: [N] float32 on the CPU, z_text . v_safe of the N prompts, and the same of their steered targets.
    """

    prompts: tuple[Prompt, ...]
    before: Tensor
    after: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def categories(self) -> dict[str, "AxisSide"]:
        """Category -> its prompts, in alphabetical order; a prompt of several, separated by commas, is in each."""
        of_prompt = [{name.strip() for name in prompt.category.split(",")} - {""} for prompt in self.prompts]
        return {
            name: self._take([i for i, names in enumerate(of_prompt) if name in names])
            for name in sorted(set().union(*of_prompt))
        }

    def lowest(self, count: int) -> "AxisSide":
        """The `count` different texts with the smallest values after steering, smallest first."""
        return self._first(self.after.argsort(stable=True), count)

    def nearest(self, count: int) -> "AxisSide":
        """The `count` different texts nearest 0 after steering, on either side of it, nearest first."""
        return self._first(self.after.abs().argsort(stable=True), count)

    def _first(self, order: Tensor, count: int) -> "AxisSide":
        first_of_text: dict[str, int] = {}
        for i in order.tolist():
            first_of_text.setdefault(self.prompts[i].text, i)
        return self._take(list(first_of_text.values())[:count])

    def _take(self, indices: list[int]) -> "AxisSide":
        return AxisSide(tuple(self.prompts[i] for i in indices), self.before[indices], self.after[indices])


@dataclass(frozen=True)
class AxisReport:
    """Whether steering carries the prompts to the safe side of the axis.

    alpha, mode: the steering in force. sides: label -> AxisSide, for the labels that have prompts.
    crossing: for each negative prompt, in ascending order, the alpha at which its target reaches the safe side.
    """

    alpha: float
    mode: str
    sides: dict[str, AxisSide]
    crossing: tuple[float, ...]

    def unsafe_at(self, alpha: float) -> float:
        """Share of the negatives whose target, steered with `alpha`, has a negative z . v_safe; 0 without negatives."""
        return sum(c > alpha for c in self.crossing) / max(len(self.crossing), 1)

    @property
    def still_unsafe(self) -> float:
        """`unsafe_at` the alpha in force."""
        return self.unsafe_at(self.alpha)

    @property
    def alpha_mean(self) -> float:
        """The alpha at which the mean of the negatives' z + alpha v reaches the safe side."""
        return sum(self.crossing) / len(self.crossing)

    @property
    def alpha_most(self) -> float:
        """The smallest alpha at which at least 95% of the negatives are on the safe side."""
        return self.crossing[-1 - int(_TOLERATED_UNSAFE * len(self.crossing))]

    def lines(self) -> list[str]:
        """A small table for the terminal: mean [min, max]."""
        steering = f"({self.mode}, alpha {self.alpha:g})"
        head = f"safety axis, z_text . v_safe: mean [min, max] before -> after steering {steering}"
        rows = [
            f"  {label} ({len(side)} prompts)  {Spread.of(side.before)} -> {Spread.of(side.after)}"
            for label, side in self.sides.items()
        ]
        if NEGATIVE in self.sides:
            rows.append(f"  steered negatives still on the unsafe side: {self.still_unsafe:.0%}")
        return [head, *rows]

    @property
    def warning(self) -> str | None:
        """One sentence when more than 5% of the steered negatives are still unsafe, else None."""
        if self.still_unsafe <= _TOLERATED_UNSAFE:
            return None
        return (
            f"{self.still_unsafe:.0%} of the negative prompts are still on the unsafe side of the safety axis after "
            "steering, so the reward asks for what they name: their mean crosses at --reward.alpha "
            f"{round_up(self.alpha_mean):.2f}, 95% of them at --reward.alpha {round_up(self.alpha_most):.2f}."
        )


def axis_report(reward: SteeringReward, prompts: Sequence[Prompt], limit: int = 256) -> AxisReport:
    """Measure where `choose_prompts(prompts, limit)` lie along the safety axis."""
    sides = {}
    for label in (POSITIVE, NEGATIVE):
        chosen = [prompt for prompt in choose_prompts(prompts, limit) if prompt.label == label]
        if chosen:
            text = reward.encode_prompts(chosen)
            before, after = text @ reward.direction, reward.targets(text, chosen) @ reward.direction
            sides[label] = AxisSide(tuple(chosen), before.cpu(), after.cpu())
    crossing = -sides[NEGATIVE].before if NEGATIVE in sides else torch.empty(0)
    if reward.config.mode == "projection":
        crossing = torch.zeros_like(crossing)
    return AxisReport(reward.config.alpha, reward.config.mode, sides, tuple(sorted(crossing.tolist())))


def choose_prompts(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """At most `limit` prompts of each label, evenly spaced, positives first; 0 is all of them."""
    chosen: list[Prompt] = []
    for label in (POSITIVE, NEGATIVE):
        pool = [prompt for prompt in prompts if prompt.label == label]
        count = min(limit or len(pool), len(pool))
        chosen += [pool[i * len(pool) // count] for i in range(count)]
    return chosen


def round_up(alpha: float) -> float:
    """To two decimals, upwards, so that the alpha named is enough."""
    return math.ceil(alpha * 100) / 100


@dataclass(frozen=True)
class Shift:
    """How far steering moves the targets of one label from their texts: mean cosine and mean angle of the two."""

    cosine: float
    degrees: float


@dataclass(frozen=True)
class SweepRow:
    """The effect of one alpha on the prompts of a report.

    unsafe: share of the negatives still on the unsafe side. shifts: label -> Shift, for the labels that have prompts.
    """

    alpha: float
    unsafe: float
    shifts: dict[str, Shift]


def sweep(reward: SteeringReward, report: AxisReport, alphas: Sequence[float]) -> list[SweepRow]:
    """Measure the effect of each of `alphas` on the prompts of `report`, in the reward's mode."""
    texts = {label: reward.encode_prompts(side.prompts) for label, side in report.sides.items()}
    return [
        SweepRow(alpha, report.unsafe_at(alpha), {label: _shift(reward, z, label, alpha) for label, z in texts.items()})
        for alpha in alphas
    ]


def _shift(reward: SteeringReward, text: Tensor, label: str, alpha: float) -> Shift:
    negative = torch.full((len(text),), label == NEGATIVE, device=text.device)
    target = steer(text, reward.direction, alpha, reward.config.mode, negative)
    # The angle from the chord between two unit vectors: acos would make a degree's fiftieth of float32's rounding.
    angle = 2 * torch.asin(((target - text).norm(dim=-1) / 2).clamp(max=1))
    return Shift((target * text).sum(-1).mean().item(), math.degrees(angle.mean().item()))


@dataclass(frozen=True)
class AnchorReport:
    """How well an encoder tells the safe anchors from the unsafe ones.

    distance: length of mean(z_safe) - mean(z_unsafe), 0 to 2; of mean(z_unsafe) where there are no safe anchors.
    cosine: between the two means; None where there are no safe anchors.
    safe, unsafe: the anchors' own z . v_safe; `safe` is None where there are none.
    """

    distance: float
    cosine: float | None
    safe: Spread | None
    unsafe: Spread

    @property
    def warning(self) -> str | None:
        """One sentence where the two sets overlap on the axis, else None."""
        if self.safe is None or self.safe.low > self.unsafe.high:
            return None
        return (
            f"the anchors overlap on their own axis, the lowest safe one at {self.safe.low:+.2f} and the highest "
            f"unsafe one at {self.unsafe.high:+.2f}: this encoder does not tell all of them apart."
        )


def anchor_report(reward: SteeringReward, anchors: Anchors) -> AnchorReport:
    """Measure the anchors that span the reward's axis."""
    unsafe = reward.encoder.encode_text(anchors.unsafe)
    away = -unsafe.mean(0)
    if not anchors.safe:
        return AnchorReport(away.norm().item(), None, None, Spread.of(unsafe @ reward.direction))
    safe = reward.encoder.encode_text(anchors.safe)
    return AnchorReport(
        distance=(safe.mean(0) + away).norm().item(),
        cosine=F.cosine_similarity(safe.mean(0), unsafe.mean(0), dim=0).item(),
        safe=Spread.of(safe @ reward.direction),
        unsafe=Spread.of(unsafe @ reward.direction),
    )


@dataclass(frozen=True)
class Bins:
    """Equal bins of a histogram, from a whole tenth to a whole tenth, so that 0 is an edge.

    low, high: in tenths. per_tenth: bins in each tenth.
    """

    low: int
    high: int
    per_tenth: int

    @classmethod
    def covering(cls, values: Tensor, most: int) -> "Bins":
        """As many bins as fit in `most` that hold 0 and all `values`, which lie in [-1, 1]; most: at least 22."""
        low = min(math.floor(10 * values.min().item()), 0)
        high = max(math.floor(10 * values.max().item()) + 1, 0)  # above the largest, so that no bin is closed
        return cls(low, high, most // (high - low))

    def __len__(self) -> int:
        return (self.high - self.low) * self.per_tenth

    def edges(self) -> list[float]:
        """The len + 1 edges, ascending."""
        return [(self.low + i / self.per_tenth) / 10 for i in range(len(self) + 1)]

    def count(self, values: Tensor) -> list[int]:
        """How many of `values` are in each bin; a value on an edge is in the bin above it."""
        places = ((10 * values.double() - self.low) * self.per_tenth).floor().long().clamp(0, len(self) - 1)
        return torch.bincount(places, minlength=len(self)).tolist()
