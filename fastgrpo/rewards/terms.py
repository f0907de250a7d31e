"""The terms of a reward as the settings name them, and the exception for a term that breaks.

Settings are checked here before anything is loaded: this module needs neither torch nor open_clip, and runs no file.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastgrpo.settings.suites import DETECTORS
from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

BUILT_IN = (
    "steering",
    "clip",
    "hpsv2",
    "pickscore",
    "aesthetic",
    "compressibility",
    "incompressibility",
    "oracle",
)
"""The terms with a name of their own; registry.py says what they are."""

_SAFETY, _SERVICE, _GIVEN = "safety", "service", "given"
_SAFETY_TERMS = tuple(f"{_SAFETY}:{detector}" for detector in DETECTORS)
_BLIND = ("compressibility", "incompressibility", "oracle")
_SEEING = ("q16", "open-clip")  # the detectors that share an encoder with other terms

# What metrics.jsonl already has under reward/: the total's own entries and the parts of `steering`.
_TAKEN = ("mean", "std", "positive_mean", "negative_mean", "alignment", "safety", "steered")
_IMAGEREWARD = (
    "'imagereward' cannot be had here: no maintained package has its code, and the last image-reward, 1.5 of 2023, "
    "does not import beside transformers 5; accepted are pickscore, hpsv2, or FILE.py:FUNCTION with a function of "
    "yours that asks an ImageReward elsewhere."
)
_ACCEPTED = (
    f"{', '.join(BUILT_IN)}, {_SAFETY}:DETECTOR, {_SERVICE}:NAME, FILE.py:FUNCTION and MODULE:FUNCTION, each with or "
    "without =WEIGHT"
)


@dataclass(frozen=True)
class Term:
    """One summand of the reward.

    name: a built-in's name, safety:DETECTOR, service:NAME, FILE.py:FUNCTION, MODULE:FUNCTION or given:NAME. weight:
    finite, not 0.
    """

    name: str
    weight: float = 1.0

    @property
    def place(self) -> str:
        """The file or module of a function of the user's own; empty for other terms."""
        return "" if self.detector or self.service or self.given else self.name.rpartition(":")[0]

    @property
    def detector(self) -> str:
        """The safety detector whose score it is; empty for other terms."""
        return self.name.removeprefix(f"{_SAFETY}:") if self.name in _SAFETY_TERMS else ""

    @property
    def service(self) -> str:
        """The name of the score that servers have; empty for other terms."""
        place, _, name = self.name.rpartition(":")
        return name if place == _SERVICE else ""

    @property
    def given(self) -> str:
        """The name of a function that a program hands to its training; empty for other terms."""
        place, _, name = self.name.rpartition(":")
        return name if place == _GIVEN else ""

    @property
    def label(self) -> str:
        """What its values are called in metrics and `Rewards.parts`: the built-in's, detector's or function's name."""
        return (self.detector or self.service).replace("-", "_") or self.name.rpartition(":")[2]

    @property
    def has_encoder(self) -> bool:
        """Whether it sees images through an encoder that other terms and the guard share."""
        if self.detector:
            return self.detector in _SEEING
        return not (self.place or self.service or self.given or self.name in _BLIND)


class RewardFunction(Protocol):
    """Computes a term: images [N, 3, h, w] float32 in [0, 1] and their N prompts -> rewards [N]."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor: ...


class BrokenReward(RuntimeError):
    """A term failed or returned what no reward can be.

    message: one sentence with the term, the prompt and the value.
    prompt, image: the first concerned; the image is [3, h, w] float32 in [0, 1].
    """

    def __init__(self, message: str, prompt: Prompt, image: Tensor):
        super().__init__(message)
        self.message, self.prompt, self.image = message, prompt, image


class ServiceFailed(RuntimeError):
    """No server gives an answer, after all tries. The message is one sentence with the servers and what they said."""


def parse_terms(terms: tuple[str, ...]) -> tuple[Term, ...]:
    """Parse texts `NAME` or `NAME=WEIGHT`, in their order.

    Raises ConfigError where there is none, for a name that is no term, a file or module that is not there, a weight
    that is 0 or no finite number, and for two terms that would go by the same name.
    """
    if not terms:
        raise ConfigError(f"reward.terms = []: at least one is needed; accepted are {_ACCEPTED}.")
    parsed = tuple(_parse(text) for text in terms)
    seen: dict[str, Term] = {}
    for term in parsed:
        if (other := seen.setdefault(term.label, term)) is not term:
            raise ConfigError(
                f"reward.terms: {other.name!r} and {term.name!r} are both called {term.label}; accepted is every name "
                "once."
            )
    return parsed


def _parse(text: str) -> Term:
    # Only what follows the last colon may hold a weight: a folder's name may have an equals sign.
    place, colon, rest = text.rpartition(":")
    function, equals, weight = (part.strip() for part in rest.partition("="))
    term = Term(place.strip() + colon + function, _weight(text, weight) if equals else 1.0)
    if place.strip() == _SAFETY or term.name == _SAFETY:
        _check_detector(term, function)
    elif place.strip() == _SERVICE or term.name == _SERVICE:
        _check_service(term)
    elif place.strip() == _GIVEN:
        _check_function(term)
    elif term.name == "imagereward":
        raise ConfigError(f"reward.terms: {_IMAGEREWARD}")
    elif colon:
        _check_plugin(term)
    elif term.name not in BUILT_IN:
        raise ConfigError(
            f"reward.terms: {term.name!r} is no term{nearest(term.name, BUILT_IN)}; accepted are {_ACCEPTED}."
        )
    return term


def _weight(text: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise ConfigError(
            f"reward.terms: {text!r} has the weight {weight!r}; accepted is a finite number other than 0."
        )
    return value


def _check_detector(term: Term, name: str) -> None:
    if not term.detector:
        asked = "" if term.name == _SAFETY else f" {name!r}{nearest(name, DETECTORS)}"
        raise ConfigError(
            f"reward.terms: {term.name!r} names no detector{asked}; accepted are {', '.join(_SAFETY_TERMS)}."
        )


def _check_service(term: Term) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", term.service):
        raise ConfigError(
            f"reward.terms: {term.name!r} names no score of a server; accepted is {_SERVICE}:NAME, a name of letters, "
            "digits, dots, hyphens and underscores, with or without =WEIGHT."
        )
    if term.label in _TAKEN:
        raise ConfigError(
            f"reward.terms: {term.name!r} cannot be called {term.label!r}, which metrics have already; let the server "
            "give the score another name."
        )


def _check_function(term: Term) -> None:
    """Refuse a function's name that is none, or that metrics have already."""
    if not term.label.isidentifier():
        raise ConfigError(f"reward.terms: {term.name!r} names no function after the colon; accepted are {_ACCEPTED}.")
    if term.label in BUILT_IN + _TAKEN:
        raise ConfigError(
            f"reward.terms: {term.name!r} cannot be called {term.label!r}, which metrics have already; rename the "
            "function."
        )


def _check_plugin(term: Term) -> None:
    """Refuse a function's file or module that is not there, without running it."""
    _check_function(term)
    if term.place.endswith(".py"):
        if not Path(term.place).is_file():
            raise ConfigError(f"reward.terms: {term.name!r} needs the file {term.place!r}, which is not there.")
    elif not all(part.isidentifier() for part in term.place.split(".")):
        raise ConfigError(
            f"reward.terms: {term.name!r} has {term.place!r} before the colon; accepted are FILE.py and MODULE."
        )
    # Looking for a submodule would import its package.
    elif importlib.util.find_spec(term.place.split(".")[0]) is None:
        raise ConfigError(f"reward.terms: {term.name!r} needs the module {term.place!r}, which is not installed.")
