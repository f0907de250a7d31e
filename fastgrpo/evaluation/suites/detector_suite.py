"""What suites have in common that ask safety detectors about the images of prompts in categories."""

from collections.abc import Sequence

from fastgrpo.evaluation.detectors.base import Finding, SafetyDetector
from fastgrpo.evaluation.detectors.nudenet import CLASSES, counted, protocol
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest
from fastgrpo.evaluation.images.judgements import Progress, findings
from fastgrpo.evaluation.suites.base import Loader, Measure, SuiteResult, described
from fastgrpo.evaluation.suites.prompt_table import PromptRow

NUDENET = "nudenet"
ALL = "all images"


class DetectedSuite:
    """Unsafe or not, by any detectors. A suite says in `_result` what becomes of it.

    classes: of NudeNet's, which count, a key of CLASSES. categories: prompt id -> those it belongs to.
    """

    classes: str

    def __init__(
        self,
        name: str,
        rows: Sequence[PromptRow],
        wanted: tuple[ImageRequest, ...],
        images: int,
        detectors: Sequence[str],
        threshold: float,
        steps: int,
        eta: float,
    ) -> None:
        """images: of each prompt. detectors: their names. threshold: NudeNet's."""
        self.name = self.folder = name
        self.wanted, self.steps, self.eta = wanted, steps, eta
        self.detectors, self.threshold = tuple(detectors), threshold
        self.categories = {row.id: row.categories for row in rows}
        above = f"/nudenet-above-{threshold:g}" if NUDENET in self.detectors else ""
        self.protocol = f"{name}/{images}-image/{'+'.join(self.detectors)}{above}"

    def prepare(self, loader: Loader) -> Measure:
        """Load the detectors."""
        loaded = [loader.detector(name) for name in self.detectors]

        def measure(folder: ImageFolder, rows: Sequence[ImageRequest], progress: Progress | None) -> SuiteResult:
            verdicts = {
                detector.name: {
                    id: float(self._is_unsafe(detector.name, finding))
                    for id, finding in findings(folder, rows, detector, progress).items()
                }
                for detector in loaded
            }
            return self._result(loaded, rows, verdicts)

        return measure

    def _result(
        self, loaded: Sequence[SafetyDetector], rows: Sequence[ImageRequest], unsafe: dict[str, dict[str, float]]
    ) -> SuiteResult:
        """unsafe: detector -> image id -> 1 or 0."""
        raise NotImplementedError

    def _is_unsafe(self, name: str, finding: Finding) -> bool:
        """A detector's verdict; NudeNet's by the suite's own threshold and classes, whatever it was loaded with."""
        if name != NUDENET:
            return finding.unsafe
        return bool(counted(finding.scores, self.threshold, CLASSES[self.classes]))


def judges(loaded: Sequence[SafetyDetector], threshold: float, classes: str) -> dict[str, dict]:
    """For `SuiteResult.judges`: NudeNet's protocol is that of the threshold and classes that count, whatever it was loaded with."""
    found = described(*loaded)
    if NUDENET in found:
        found[NUDENET]["protocol"] = protocol(threshold, classes)
    return found
