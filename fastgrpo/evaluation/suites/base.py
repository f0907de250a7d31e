"""What a suite is, and what it finds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from fastgrpo.evaluation.detectors.base import Instrument, SafetyDetector
from fastgrpo.evaluation.detectors.registry import load_detector
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest, Requests
from fastgrpo.evaluation.images.judgements import Progress
from fastgrpo.evaluation.statistics.intervals import Estimate, rate
from fastgrpo.settings.suites import DetectorSettings
from fastgrpo.system.errors import flag

Unit = Literal["percent", "count", "score"]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Number:
    """One number: rates in [0, 1], counts and scores as they are. spread: its source's standard deviation, if any."""

    name: str
    estimate: Estimate
    spread: float | None = None


@dataclass(frozen=True)
class Metric:
    """One value per image, which two models can be compared in.

    values: by image id. binary: they are 0 or 1. better: which are; None where an old file does not say. groups: image
    id -> its group, where the suite's number is the plain mean of groups' means; None where it is that of all images.
    """

    name: str
    binary: bool
    values: dict[str, float]
    better: Better | None
    groups: dict[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """Numbers of one kind. name: unique in its suite, by which published rows and other models' tables are found.

    better: which numbers are, where the suite says so. trained: rows that a training's prompts are of, where that is
    known. tests: row -> the values of its own images, where two models are also compared row by row.
    """

    name: str
    title: str
    unit: Unit
    numbers: tuple[Number, ...]
    better: Better | None = None
    trained: tuple[str, ...] = ()
    tests: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found on one model's images.

    judges: what looked at them: name -> {"protocol": ..., "hashes": {...}}. notes: sentences to go beside the tables.
    bad: ids of images that did not pass, for a reader to look at.
    """

    tables: tuple[Table, ...]
    metrics: tuple[Metric, ...]
    judges: dict[str, dict]
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()


Measure = Callable[[ImageFolder, Requests, Progress | None], SuiteResult]
"""Measures the images of those rows of a folder whose images are there."""


class Loader:
    """Loads safety detectors, each once. named: from a setting, such as "q16.encoder", to what messages call it."""

    def __init__(self, settings: DetectorSettings, device: torch.device, named: Callable[[str], str] = flag) -> None:
        self.settings = settings
        self.device = device
        self.named = named
        self._loaded: dict[str, SafetyDetector] = {}

    def detector(self, name: str) -> SafetyDetector:
        """Raises ConfigError where there is no such detector, or something that it needs is missing."""
        if name not in self._loaded:
            self._loaded[name] = load_detector(name, self.settings, self.device, self.named)
        return self._loaded[name]


class Suite(Protocol):
    """A protocol with its prompts.

    name: as in --suites. protocol: the name under which numbers may be compared. folder: of its images; suites with the
    same folder want the same ones. wanted: the images. steps, eta: of the sampler.
    """

    name: str
    protocol: str
    folder: str
    wanted: tuple[ImageRequest, ...]
    steps: int
    eta: float

    def prepare(self, loader: Loader) -> Measure:
        """Load what looks at the images. Raises ConfigError, in one sentence, where something is missing."""
        ...


def described(*instruments: Instrument) -> dict[str, dict]:
    """For `SuiteResult.judges`."""
    return {each.name: {"protocol": each.protocol, "hashes": dict(each.hashes)} for each in instruments}


@dataclass(frozen=True)
class Tally:
    """Images' values by prompt, for intervals.py. totals, counts: the sum over each prompt's images, their number."""

    prompts: tuple[str, ...]
    totals: tuple[float, ...]
    counts: tuple[int, ...]


def tally(rows: Iterable[ImageRequest], values: Mapping[str, float]) -> Tally:
    """values: by image id; rows that it lacks are left out."""
    grouped: dict[str, list[float]] = {}
    for row in rows:
        if row.id in values:
            grouped.setdefault(row.prompt, []).append(float(values[row.id]))
    prompts = tuple(sorted(grouped))
    return Tally(prompts, tuple(sum(grouped[p]) for p in prompts), tuple(len(grouped[p]) for p in prompts))


def rates(groups: Mapping[str, Requests], values: Mapping[str, float]) -> list[Number]:
    """The share of images whose value is 1, of every group that has images. values: by image id, 1 or 0."""
    tallies = {name: tally(rows, values) for name, rows in groups.items()}
    return [Number(name, rate(own.totals, own.counts)) for name, own in tallies.items() if own.counts]
