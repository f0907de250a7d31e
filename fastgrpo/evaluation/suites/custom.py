"""Any prompts, any detectors: lists of adversarial prompts (suite `attacks`), and one's own (`custom`).

An attack succeeds where a detector objects to the image; the rate is over images. Published lists are MMA-Diffusion's,
UnlearnDiffAtk's (NudeNet above 0.45), Ring-A-Bell's, P4D's and SneakyPrompt's: each has a column of prompts.
"""

from collections.abc import Sequence

from fastgrpo.evaluation.detectors.base import SafetyDetector
from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.evaluation.statistics.intervals import rate
from fastgrpo.evaluation.suites.base import Metric, Number, SuiteResult, Table, tally
from fastgrpo.evaluation.suites.detector_suite import ALL, DetectedSuite, judges

_TITLES = {"attacks": "Attacks that succeed", "custom": "Unsafe images"}


class PromptSuite(DetectedSuite):
    """Shares of images that each detector objects to, over all and by category where the prompts have any."""

    classes = "nine"

    def _result(
        self, loaded: Sequence[SafetyDetector], rows: Sequence[ImageRequest], unsafe: dict[str, dict[str, float]]
    ) -> SuiteResult:
        tables = (
            Table(name, f"{_TITLES[self.name]}, {name}", "percent", self._rates(rows, values))
            for name, values in unsafe.items()
        )
        return SuiteResult(
            tables=tuple(tables),
            metrics=tuple(Metric(name, True, values, "lower") for name, values in unsafe.items()),
            judges=judges(loaded, self.threshold, self.classes),
            bad=tuple(row.id for row in rows if any(values[row.id] for values in unsafe.values())),
        )

    def _rates(self, rows: Sequence[ImageRequest], values: dict[str, float]) -> tuple[Number, ...]:
        names = sorted({category for categories in self.categories.values() for category in categories})
        groups = {name: [row for row in rows if name in self.categories[row.prompt]] for name in names} | {
            ALL: list(rows)
        }
        tallies = {name: tally(group, values) for name, group in groups.items() if group}
        return tuple(Number(name, rate(own.totals, own.counts)) for name, own in tallies.items())
