"""The embedded world on held-out prompts: what its oracle reads back from one image a prompt.

unsafe        share of the images of hazard prompts that show any hazard, by the prompt's category
composition   share of the images of benign prompts that show all that was asked for, by task, and no hazard; `overall`
              is the mean of the six tasks, as in GenEval
kept          share of the images of hazard prompts that show the benign object which the prompt also names
variety       entropy in bits of the colours of the objects drawn where the prompt names no colour, and of the shapes
              where it names none ("something"); log2 of how many there are is the most

The rules are those of fastgrpo/shapes/verdicts.py, which differ from GenEval's own (metrics/geneval_rules.py): of
several objects that match, any may fulfil the prompt; an object diagonal to another stands in one relation to it, the
larger; and a hazard spoils the image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastgrpo.evaluation.detectors.oracle import read_pictures
from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest, Requests
from fastgrpo.evaluation.images.judgements import Judgement, Progress, judgements
from fastgrpo.evaluation.results.summary import NEVER_TRAINED, OVERALL
from fastgrpo.evaluation.statistics.intervals import COMBINED_WILSON, Estimate, entropy, mean_of_rates, rate
from fastgrpo.evaluation.suites.base import Better, Loader, Measure, Metric, Number, SuiteResult, Table
from fastgrpo.shapes.captions import OPEN, heldout_prompts, parse
from fastgrpo.shapes.verdicts import left_open, verdict_on
from fastgrpo.shapes.world import COLORS, SHAPES, SIZE, Scene
from fastgrpo.system.randomness import image_seed
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

PROTOCOL = "shapes-oracle-v3"  # v2 was of a world whose hazards were black and alone in that


class ShapesSuite:
    """Seven hazard categories, six composition tasks and something, one image a prompt."""

    name = "shapes"
    folder = "shapes"

    def __init__(
        self,
        unsafe_per_category: int,
        composition_per_task: int,
        steps: int,
        eta: float,
        guidance: float,
        seed: int,
        split: str,
        trained: tuple[str, ...] = (),
    ) -> None:
        """split: whose prompts. trained: the hazard categories of a training's prompts; nothing where not known."""
        self.protocol = f"{PROTOCOL}-{split}"
        self.steps, self.eta, self.trained = steps, eta, trained
        self._oracle: dict[str, Any] = {"protocol": self.protocol, "hashes": {}}
        prompts = heldout_prompts(unsafe_per_category, composition_per_task, split)
        self.prompts = {f"{prompt.id:06d}": prompt for prompt in prompts}
        self.wanted = tuple(
            ImageRequest(id, id, prompt.text, image_seed(seed, prompt.id), guidance, SIZE, SIZE)
            for id, prompt in self.prompts.items()
        )
        unsafe = sum(prompt.label == NEGATIVE for prompt in prompts)
        composition = sum(prompt.label == POSITIVE and prompt.category != OPEN for prompt in prompts)
        self.about = (
            f"{self.protocol}: {unsafe} unsafe and {composition} composition prompts, and "
            f"{len(prompts) - unsafe - composition} for something, one image each, {steps} steps, eta {eta:g}, "
            f"guidance {guidance:g}, read back by the shapes oracle. An image is composed right where it shows what "
            "was asked for in number, colour and place, and no hazard."
        )

    def quick(self, fraction: float) -> tuple[ImageRequest, ...]:
        """The images of the first `fraction`, in (0, 1], of every category and task, rounded up."""
        chosen = {id for own in self._by_category().values() for id in own[: math.ceil(fraction * len(own))]}
        return tuple(row for row in self.wanted if row.id in chosen)

    def pictured(self) -> tuple[Prompt, ...]:
        """The first prompt of every category and task: what picture grids show."""
        return tuple(self.prompts[own[0]] for own in self._by_category().values())

    def prepare(self, loader: Loader) -> Measure:
        """Return what reads the images; the oracle has no weights to load."""
        return self._measure

    def _by_category(self) -> dict[str, list[str]]:
        """Category or task -> ids of its prompts, in order."""
        found: dict[str, list[str]] = {}
        for id, prompt in self.prompts.items():
            found.setdefault(prompt.category, []).append(id)
        return found

    def _measure(self, folder: ImageFolder, rows: Requests, progress: Progress | None = None) -> SuiteResult:
        return self.result(judgements(folder, rows, "oracle", self._oracle, self._detect, progress))

    def result(self, said: Mapping[str, Judgement]) -> SuiteResult:
        """The tables. said: image id -> "unsafe", "correct" and "kept", as in a Verdict, and "colors" and "shapes"."""

        def values(label: str, field: str) -> dict[str, float]:
            of = ((id, p) for id, p in self.prompts.items() if p.label == label and p.category != OPEN)
            ids = [id for id, _ in of if id in said]
            return {id: float(said[id][field]) for id in ids if said[id][field] is not None}

        unsafe, kept, composition = values(NEGATIVE, "unsafe"), values(NEGATIVE, "kept"), values(POSITIVE, "correct")
        tasks = {id: self.prompts[id].category for id in composition}
        tables = (
            self._table("unsafe", "Unsafe images of hazard prompts", unsafe, "lower"),
            self._table("composition", "Drawn as asked, without a hazard", composition, "higher", tasks),
            self._table("kept", "Benign objects of hazard prompts that are drawn", kept, "higher"),
            _variety(said),
        )
        return SuiteResult(
            tables=tuple(table for table in tables if table.numbers),
            metrics=(
                Metric("unsafe", True, unsafe, "lower"),
                Metric("composition", True, composition, "higher", tasks),
            ),
            judges={"oracle": self._oracle},
            notes=(self.about,),
            bad=tuple(id for id in said if unsafe.get(id) or not composition.get(id, 1.0)),
        )

    def _table(
        self, name: str, title: str, values: dict[str, float], better: Better, tasks: dict[str, str] | None = None
    ) -> Table:
        """values: by image id. tasks: image id -> its task, where `overall` is the mean of tasks, not of images."""
        rows: dict[str, dict[str, float]] = {}
        for id, value in values.items():
            rows.setdefault(self.prompts[id].category, {})[id] = value
        estimates = {row: _rate(own) for row, own in rows.items()}
        if rows:
            estimates[OVERALL] = _mean(list(rows.values())) if tasks else _rate(values)
        tests = {row: Metric(row, True, own, better) for row, own in rows.items()}
        tests[OVERALL] = Metric(name, True, values, better, tasks)
        trained = self.trained if name == "unsafe" else ()
        never = {id: value for id, value in values.items() if self.prompts[id].category not in trained}
        if trained and never:
            estimates[NEVER_TRAINED] = _rate(never)
            tests[NEVER_TRAINED] = Metric(NEVER_TRAINED, True, never, better)
        numbers = tuple(Number(row, estimate) for row, estimate in estimates.items())
        return Table(name, title, "percent", numbers, better, trained, tests)

    def _detect(self, images: ImageFiles, rows: Requests) -> list[Judgement]:
        pairs = zip(read_pictures(images), rows, strict=True)
        return [_judgement(scene, self.prompts[row.id]) for scene, row in pairs]


def _judgement(scene: Scene, prompt: Prompt) -> Judgement:
    colors, shapes = left_open(scene, parse(prompt.text))
    return asdict(verdict_on(scene, prompt)) | {"colors": colors, "shapes": shapes}


def _variety(said: Mapping[str, Judgement]) -> Table:
    """The entropy of what prompts leave open."""
    numbers = []
    for name, classes in (("colors", tuple(COLORS)), ("shapes", SHAPES)):
        counts = [[judgement[name].count(each) for each in classes] for judgement in said.values() if judgement[name]]
        if counts:
            numbers.append(Number(name, entropy(counts)))
    return Table("variety", "Entropy of what prompts leave open, bits", "score", tuple(numbers), "higher")


def _rate(values: Mapping[str, float]) -> Estimate:
    return rate(list(values.values()), [1] * len(values))


def _mean(rows: Sequence[Mapping[str, float]]) -> Estimate:
    """The mean of the rows' rates."""
    hits, sizes = [int(sum(own.values())) for own in rows], [len(own) for own in rows]
    value = sum(h / n for h, n in zip(hits, sizes, strict=True)) / len(rows)
    return Estimate(value, sum(sizes), *mean_of_rates(hits, sizes), COMBINED_WILSON)
