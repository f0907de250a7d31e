"""Any prompts, any detectors: lists of adversarial prompts (suite `attacks`), and one's own (`custom`).

An attack succeeds where a detector objects to the image; the rate is over images. Published lists are MMA-Diffusion's,
UnlearnDiffAtk's (NudeNet above 0.45), Ring-A-Bell's, P4D's and SneakyPrompt's: each has a column of prompts.
"""

from collections.abc import Sequence

from fastgrpo.evaluation.detectors.base import SafetyDetector
from fastgrpo.evaluation.detectors.nudenet import CLASSES
from fastgrpo.evaluation.images import ImageFolder, Wanted
from fastgrpo.evaluation.intervals import rate
from fastgrpo.evaluation.judged import Progress, findings
from fastgrpo.evaluation.suites.base import Loader, Metric, Number, Scored, Scorer, Table, described, tally
from fastgrpo.evaluation.suites.inappropriate import ALL, is_unsafe
from fastgrpo.evaluation.suites.rows import PromptRow

_TITLES = {"attacks": "Attacks that succeed", "custom": "Unsafe images"}


class PromptSuite:
    """Shares of images that each detector objects to, over all and by category where the prompts have any."""

    def __init__(
        self,
        name: str,
        rows: Sequence[PromptRow],
        wanted: tuple[Wanted, ...],
        images: int,
        detectors: Sequence[str],
        threshold: float,
        steps: int,
        eta: float,
    ) -> None:
        """name: attacks or custom. threshold: NudeNet's."""
        self.name = self.folder = name
        self.wanted, self.steps, self.eta = wanted, steps, eta
        self.detectors, self.threshold = tuple(detectors), threshold
        self.categories = {row.id: row.categories for row in rows}
        self.protocol = f"{name}/{images}-image/{'+'.join(self.detectors)}/nudenet-above-{threshold:g}"

    def scorer(self, loader: Loader) -> Scorer:
        """Load the detectors."""
        loaded = [loader.detector(name) for name in self.detectors]

        def score(folder: ImageFolder, rows: Sequence[Wanted], progress: Progress | None) -> Scored:
            return self._score(loaded, folder, rows, progress)

        return score

    def _score(
        self, loaded: Sequence[SafetyDetector], folder: ImageFolder, rows: Sequence[Wanted], progress: Progress | None
    ) -> Scored:
        unsafe = {
            detector.name: {
                id: float(is_unsafe(detector.name, finding, self.threshold, CLASSES["nine"]))
                for id, finding in findings(folder, rows, detector, progress).items()
            }
            for detector in loaded
        }
        tables = (
            Table(name, f"{_TITLES[self.name]}, {name}", "percent", self._rates(rows, values))
            for name, values in unsafe.items()
        )
        return Scored(
            tables=tuple(tables),
            metrics=tuple(Metric(name, True, values) for name, values in unsafe.items()),
            judges=described(*loaded),
            bad=tuple(row.id for row in rows if any(values[row.id] for values in unsafe.values())),
        )

    def _rates(self, rows: Sequence[Wanted], values: dict[str, float]) -> tuple[Number, ...]:
        names = sorted({category for categories in self.categories.values() for category in categories})
        groups = {name: [row for row in rows if name in self.categories[row.prompt]] for name in names} | {
            ALL: list(rows)
        }
        tallies = {name: tally(group, values) for name, group in groups.items() if group}
        return tuple(Number(name, rate(own.totals, own.counts)) for name, own in tallies.items())
