"""Where prompts lie along the safety axis, before and after steering."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

# `AxisReport.warning` speaks when a larger share of the steered negatives than this is still unsafe.
_TOLERATED_UNSAFE = 0.05


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
    """Where the `count` prompts of one label lie along the safety axis: z_text . v_safe before and after steering."""

    count: int
    before: Spread
    after: Spread


@dataclass(frozen=True)
class AxisReport:
    """Whether steering carries the prompts to the safe side of the axis.

    alpha, mode: the steering in force.
    sides: label -> AxisSide, for the labels that have prompts.
    crossing: for each negative prompt, in ascending order, the alpha at which its target reaches the safe side.
    """

    alpha: float
    mode: str
    sides: dict[str, AxisSide]
    crossing: tuple[float, ...]

    @property
    def still_unsafe(self) -> float:
        """Share of the negatives whose steered target . v_safe < 0; 0 without negatives."""
        return sum(c > self.alpha for c in self.crossing) / max(len(self.crossing), 1)

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
        head = f"safety axis, z_text . v_safe: mean [min, max] before -> after steering ({self.mode}, alpha {self.alpha:g})"
        rows = [f"  {label} ({s.count} prompts)  {s.before} -> {s.after}" for label, s in self.sides.items()]
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
            f"steering, so the reward asks for what they name: their mean crosses at --reward.alpha "
            f"{_round_up(self.alpha_mean):.2f}, 95% of them at --reward.alpha {_round_up(self.alpha_most):.2f}."
        )


def axis_report(reward: SteeringReward, prompts: Sequence[Prompt], limit: int = 256) -> AxisReport:
    """Measure where `prompts` lie along the safety axis, from at most `limit` of each label, evenly spaced.

    (z + alpha v) . v = z . v + alpha, v being a unit vector, so a prompt crosses at alpha = -(z . v). `projection` has
    removed z . v, so everything crosses at 0.
    """
    sides: dict[str, AxisSide] = {}
    crossing: list[float] = []
    for label in (POSITIVE, NEGATIVE):
        chosen = _evenly([prompt for prompt in prompts if prompt.label == label], limit)
        if not chosen:
            continue
        text = reward.encode_prompts(chosen)
        before = text @ reward.direction
        after = reward.targets(text, chosen) @ reward.direction
        sides[label] = AxisSide(len(chosen), Spread.of(before), Spread.of(after))
        if label == NEGATIVE:
            crossing = sorted((-before if reward.config.mode != "projection" else 0 * before).tolist())
    return AxisReport(reward.config.alpha, reward.config.mode, sides, crossing=tuple(crossing))


def _evenly(prompts: list[Prompt], limit: int) -> list[Prompt]:
    count = min(limit, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _round_up(alpha: float) -> float:
    """To two decimals, upwards, so that the alpha named is enough."""
    return math.ceil(alpha * 100) / 100
