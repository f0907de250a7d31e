"""What a program adds to a training from Python, beside its settings (trainer.py hands it over)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastgrpo.rewards.terms import RewardFunction
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt


class Source(Protocol):
    """Says what is drawn. Every process asks it for all prompts of an iteration, so it must answer all alike."""

    def batch(self, iteration: int) -> Sequence[Prompt]:
        """The `prompts_per_iteration` prompts of an iteration, counted from 0: to resume, its number is enough."""
        ...


class CheckedSource:
    """A source of the user's, whose answers are looked at."""

    warning = ""

    def __init__(self, source: Source, per_iteration: int):
        self._source, self._count = source, per_iteration

    def batch(self, iteration: int) -> tuple[Prompt, ...]:
        """As `Source`. Raises ValueError for anything but as many prompts as an iteration has."""
        chosen = tuple(self._source.batch(iteration))
        if wrong := [each for each in chosen if not isinstance(each, Prompt) or each.label not in (POSITIVE, NEGATIVE)]:
            raise ValueError(
                f"the prompt source gave {wrong[0]!r} for iteration {iteration}; accepted are fastgrpo.Prompt with the "
                f"label {POSITIVE!r} or {NEGATIVE!r}"
            )
        if len(chosen) != self._count:
            raise ValueError(
                f"the prompt source gave {len(chosen)} prompts for iteration {iteration}; accepted are {self._count}, "
                "prompts_per_iteration"
            )
        return chosen


@dataclass(frozen=True)
class Step:
    """A finished iteration, as callbacks see it. On the first process alone.

    run: the folder. iteration: its number, from 1. metrics: what metrics.jsonl has of it.
    draw: (texts, seed) -> one picture of each text by the policy as it is now, [N, 3, h, w] float32 in [0, 1].
    """

    run: Path
    iteration: int
    metrics: Mapping[str, float]
    draw: Callable[[Sequence[str], int], Tensor]


Callback = Callable[[Step], object]
"""Called after every iteration. Where it returns True, training saves a checkpoint and stops."""


@dataclass(frozen=True)
class Hooks:
    """rewards: of terms given:NAME, by name. source: in place of the settings' order of prompts.

    callbacks: in the order of their calls.
    """

    rewards: Mapping[str, RewardFunction] = field(default_factory=dict)
    source: Source | None = None
    callbacks: tuple[Callback, ...] = ()
