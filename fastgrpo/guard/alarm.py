"""The rule of the guard: from what each iteration's pictures say to an alarm. Plain numbers, no torch.

An iteration draws few prompts, and the base model has drawn four pictures of each. So limits are held against a running
mean, of the last 32 prompts or so, however many iterations these take; it begins at what the base model says of itself.
Distances of pairs have standard deviations of half to two thirds of their means, which makes it uncertain by 0.5 to
0.67 / sqrt(2 * 32), 6 to 8%: a fall to 80% that lasts is hardly chance. That of the alignment varies by some 0.4
between iterations of six prompts (preset `shapes`, by trial), so its mean is uncertain by 0.4 * sqrt(6 / 64), 0.12 of a
standard deviation: a fall by 0.25 in three iterations is hardly chance either.

An alarm goes off once a number has been beyond its limit in `patience` iterations in a row, and ends once it has been
within the limit in as many.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastgrpo.settings.schema import GuardConfig

WITHIN, BETWEEN, ALIGNMENT = "diversity_within", "diversity_between", "alignment"
WATCHED = (WITHIN, BETWEEN, ALIGNMENT)

MEMORY = 32
"""Prompts after which what was seen before has 1 / e of its weight in the running mean."""

_SUBJECT = {
    WITHIN: "the diversity of a positive prompt's images",
    BETWEEN: "the diversity between positive prompts' images",
    ALIGNMENT: "how well positive prompts' images match them",
}


@dataclass(frozen=True)
class Comparison:
    """A mean of the policy's pictures, the base model's for the same prompts, and how many prompts these are.

    Of diversities it is of distances; of the alignment it is of z . z_text, in units of its standard deviation among
    the base model's pictures of one prompt. prompts: or as many as would say as much, which need not be whole.
    """

    policy: float
    base: float
    prompts: float


@dataclass(frozen=True)
class Running:
    """The running mean of comparisons: of both sides apart, so that prompts with small distances do not weigh more."""

    policy: float
    base: float

    def after(self, seen: Comparison) -> "Running":
        """mean <- keep * mean + (1 - keep) * seen, with keep = exp(-prompts / MEMORY)."""
        keep = math.exp(-seen.prompts / MEMORY)
        return Running(
            keep * self.policy + (1 - keep) * seen.policy,
            keep * self.base + (1 - keep) * seen.base,
        )

    def value(self, name: str) -> float:
        """What is held against the limit of the number called `name`.

        Of a diversity the policy's mean in the base model's; 1 where both are 0, as where all pictures are one.
        Of the alignment the policy's less the base model's.
        """
        if name == ALIGNMENT:
            return self.policy - self.base
        return self.policy / self.base if self.base > 0 else (1.0 if self.policy <= 0 else math.inf)


@dataclass(frozen=True)
class Condition:
    """One watched number's alarm.

    alarmed: whether it is on. turned: iterations in a row that were on the other side of the limit than `alarmed` says.
    since: the first iteration beyond the limit of a row that has not ended, or that led to the alarm; 0 is none.
    """

    alarmed: bool = False
    turned: int = 0
    since: int = 0

    def after(self, iteration: int, beyond: bool, patience: int) -> "Condition":
        """beyond: whether the number was beyond its limit in this iteration."""
        if beyond == self.alarmed:
            return replace(self, turned=0, since=self.since if self.alarmed else 0)
        since = self.since or iteration
        if self.turned + 1 < patience:
            return replace(self, turned=self.turned + 1, since=since)
        return Condition(beyond, 0, since if beyond else 0)


def excess(name: str, value: float, guard: GuardConfig) -> float:
    """How far beyond its limit a value is: above 0 beyond it, 0 or below within; 0.1 stands for a tenth of the limit.

    limit / diversity - 1, and of the alignment, which is below 0 where it has fallen, -alignment / limit - 1.
    """
    least = limit(name, guard)
    if name == ALIGNMENT:
        return -value / least - 1
    return least / value - 1 if value > 0 else (math.inf if least > 0 else 0.0)


def limit(name: str, guard: GuardConfig) -> float:
    """What a number is held against."""
    return {WITHIN: guard.diversity_within, BETWEEN: guard.diversity_between, ALIGNMENT: guard.alignment}[name]


def begun(name: str, value: float, guard: GuardConfig) -> str:
    """The sentence for an alarm that has just gone off, without a full stop."""
    rows = f"{guard.patience} iterations" if guard.patience > 1 else "an iteration"
    return f"{_SUBJECT[name]} has been {_against(name, guard)} for {rows}: it is {_text(name, value)}"


def ended(name: str, value: float, guard: GuardConfig) -> str:
    """The sentence for an alarm that has just ended, without a full stop."""
    return f"{_SUBJECT[name]} is no longer {_against(name, guard)}: it is {_text(name, value)}"


def standing(values: Mapping[str, float], guard: GuardConfig) -> list[str]:
    """A clause for each of these numbers that is beyond its limit."""
    return [
        f"{_SUBJECT[name]} {_text(name, value)}, {_against(name, guard)}"
        for name, value in values.items()
        if excess(name, value, guard) > 0
    ]


def _against(name: str, guard: GuardConfig) -> str:
    if name == ALIGNMENT:
        return f"more than {guard.alignment:g} standard deviations below the base model's"
    return f"below {limit(name, guard):.0%} of the base model's"


def _text(name: str, value: float) -> str:
    return f"{value:+.2f}" if name == ALIGNMENT else f"{value:.0%} of it"
