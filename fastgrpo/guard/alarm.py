"""The rule of the guard: from what each iteration's pictures say to an alarm. Plain numbers, no torch.

An iteration draws few prompts, and the base model's distance within one prompt is that of two pictures. So limits are
held against a running mean, of the last 32 prompts or so, however many iterations these take; it begins at what the
base model says of itself. Distances of pairs have standard deviations of half to two thirds of their means, which
makes it uncertain by 0.5 to 0.67 / sqrt(2 * 32), 6 to 8%: a fall to 80% that lasts is hardly chance.

An alarm goes off once a number has been beyond its limit in `patience` iterations in a row, and ends once it has been
within the limit in as many.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastgrpo.settings.schema import GuardConfig

WITHIN, BETWEEN, DRIFT = "diversity_within", "diversity_between", "drift"
WATCHED = (WITHIN, BETWEEN, DRIFT)

MEMORY = 32
"""Prompts after which what was seen before has 1 / e of its weight in the running mean."""

_SUBJECT = {
    WITHIN: "the diversity of a positive prompt's images",
    BETWEEN: "the diversity between positive prompts' images",
    DRIFT: "the distance of positive prompts' images from the base model's",
}
_BEYOND = {WITHIN: "below", BETWEEN: "below", DRIFT: "above"}
_WHOLE = {
    WITHIN: "the base model's",
    BETWEEN: "the base model's",
    DRIFT: "that between the base model's own",
}


@dataclass(frozen=True)
class Comparison:
    """A mean distance of the policy's pictures, the base model's for the same prompts, and how many prompts these are.

    Of the drift, `policy` is the distance between the two models' pictures, `base` that between the base model's own.
    """

    policy: float
    base: float
    prompts: int


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

    @property
    def ratio(self) -> float:
        """The policy's mean in the base model's; 1 where both are 0, as where all pictures are one."""
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


def excess(name: str, ratio: float, guard: GuardConfig) -> float:
    """How far beyond its limit a ratio is: above 0 beyond it, 0 or below within; 0.1 stands for a tenth of the limit.

    drift / limit - 1, and limit / diversity - 1.
    """
    if name == DRIFT:
        return ratio / guard.drift - 1
    return guard.diversity / ratio - 1 if ratio > 0 else (math.inf if guard.diversity > 0 else 0.0)


def limit(name: str, guard: GuardConfig) -> float:
    """The ratio that a number is held against."""
    return guard.drift if name == DRIFT else guard.diversity


def begun(name: str, ratio: float, guard: GuardConfig) -> str:
    """The sentence for an alarm that has just gone off, without a full stop."""
    rows = f"{guard.patience} iterations" if guard.patience > 1 else "an iteration"
    return f"{_SUBJECT[name]} has been {_against(name, guard)} for {rows}: it is {ratio:.0%} of it"


def ended(name: str, ratio: float, guard: GuardConfig) -> str:
    """The sentence for an alarm that has just ended, without a full stop."""
    return f"{_SUBJECT[name]} is no longer {_against(name, guard)}: it is {ratio:.0%} of it"


def standing(ratios: Mapping[str, float], guard: GuardConfig) -> list[str]:
    """A clause for each of these numbers that is beyond its limit."""
    return [
        f"{_SUBJECT[name]} {ratio:.0%}, {_BEYOND[name]} {limit(name, guard):.0%} of {_WHOLE[name]}"
        for name, ratio in ratios.items()
        if excess(name, ratio, guard) > 0
    ]


def _against(name: str, guard: GuardConfig) -> str:
    return f"{_BEYOND[name]} {limit(name, guard):.0%} of {_WHOLE[name]}"
