"""GenEval: is what a prompt names there, in number, colour and place? Its rules are in metrics/geneval_rules.py.

The official protocol is 553 prompts of its metadata file, 4 images each, 50 steps, guidance 9. Without that file the
prompts are ours, in the same grammar and from combinations that training never sees; scores on the two differ.
"""

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest, Requests
from fastgrpo.evaluation.images.judgements import Judgement, Progress, judgements
from fastgrpo.evaluation.metrics.geneval_rules import PROTOCOL, Metadata, evaluate_images
from fastgrpo.evaluation.results.summary import OVERALL
from fastgrpo.evaluation.statistics.intervals import plain_mean
from fastgrpo.evaluation.suites.base import Loader, Measure, Metric, Number, SuiteResult, Table, described, rates, tally
from fastgrpo.shapes.world import TASKS

if TYPE_CHECKING:
    from fastgrpo.evaluation.detectors.colours import ClipColours
    from fastgrpo.evaluation.detectors.mask2former import Mask2Former

OFFICIAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""Prompts of each task in GenEval's own file."""


class GenEvalSuite:
    """Six tasks, Mask2Former and CLIP's colours."""

    name = "geneval"
    folder = "geneval"

    def __init__(
        self,
        metadata: dict[str, Metadata],
        wanted: tuple[ImageRequest, ...],
        images: int,
        detector: str,
        colours: str,
        source: str,
        steps: int,
        eta: float,
    ) -> None:
        """metadata: by prompt id. source: where the prompts are from, for the protocol's name."""
        self.metadata, self.wanted, self.steps, self.eta = metadata, wanted, steps, eta
        self.detector, self.colours = detector, colours
        self.protocol = f"{PROTOCOL}/{images}-image/{source}"

    def prepare(self, loader: Loader) -> Measure:
        """Load Mask2Former and CLIP."""
        from fastgrpo.evaluation.detectors.colours import ClipColours
        from fastgrpo.evaluation.detectors.mask2former import Mask2Former

        colours = ClipColours(self.colours, loader.device, loader.named("geneval.colours"))
        detector = Mask2Former(self.detector, loader.device, loader.named("geneval.detector"))
        return partial(self._measure, detector, colours)

    def _measure(
        self,
        detector: "Mask2Former",
        colours: "ClipColours",
        folder: ImageFolder,
        rows: Requests,
        progress: Progress | None,
    ) -> SuiteResult:
        def detect(images: ImageFiles, rows: Requests) -> list[Judgement]:
            verdicts = evaluate_images(images, [self.metadata[row.prompt] for row in rows], detector, colours)
            return [{"correct": verdict.correct, "reason": verdict.reason} for verdict in verdicts]

        judges = described(detector, colours)
        said = judgements(folder, rows, self.name, judges | {"rules": PROTOCOL}, detect, progress)
        return self._result(rows, {id: float(what["correct"]) for id, what in said.items()}, judges)

    def _result(self, rows: Requests, correct: dict[str, float], judges: dict[str, dict]) -> SuiteResult:
        tasks = {id: row["tag"] for id, row in self.metadata.items()}
        groups = {task: [row for row in rows if tasks[row.prompt] == task] for task in TASKS}
        every = tally(rows, correct)
        members = [[tasks[prompt] == task for task in TASKS] for prompt in every.prompts]
        overall = Number(OVERALL, plain_mean(every.totals, every.counts, members))
        official = Counter(tasks.values()) == OFFICIAL
        return SuiteResult(
            tables=(Table("geneval", "Drawn as asked", "percent", (*rates(groups, correct), overall)),),
            metrics=(Metric("correct", True, correct, "higher", {row.id: tasks[row.prompt] for row in rows}),),
            judges=judges,
            notes=() if official else ("the prompts are not GenEval's own 553, so published scores are of others",),
            bad=tuple(id for id, value in correct.items() if not value),
        )
