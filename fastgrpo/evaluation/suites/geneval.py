"""GenEval: is what a prompt names there, in number, colour and place? Rules in evaluation/geneval_rules.py.

The official protocol is 553 prompts of its metadata file, 4 images each, 50 steps, guidance 9. Without that file the
prompts are ours, in the same grammar and from combinations that training never sees; scores on the two differ.
"""

from collections.abc import Sequence

from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest
from fastgrpo.evaluation.images.judgements import Judgement, Progress, judgements
from fastgrpo.evaluation.metrics import geneval_rules
from fastgrpo.evaluation.metrics.geneval_rules import Metadata, evaluate_images
from fastgrpo.evaluation.results.summary import OVERALL
from fastgrpo.evaluation.statistics.intervals import plain_mean, rate
from fastgrpo.evaluation.suites.base import Loader, Measure, Metric, Number, SuiteResult, Table, tally
from fastgrpo.shapes.world import TASKS

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
        self.protocol = f"{geneval_rules.PROTOCOL}/{images}-image/{source}"

    def prepare(self, loader: Loader) -> Measure:
        """Load Mask2Former and CLIP."""
        from fastgrpo.evaluation.detectors.colours import load_clip_colours
        from fastgrpo.evaluation.detectors.mask2former import load_mask2former

        colours = load_clip_colours(self.colours, loader.device, field=loader.named("geneval.colours"))
        detector = load_mask2former(self.detector, loader.device, field=loader.named("geneval.detector"))
        key = {each.name: {"protocol": each.protocol, "hashes": each.hashes} for each in (detector, colours)}

        def detect(images: ImageFiles, rows: Sequence[ImageRequest]) -> list[Judgement]:
            wanted = [self.metadata[row.prompt] for row in rows]
            verdicts = evaluate_images(images, wanted, detector, colours)
            return [{"correct": verdict.correct, "reason": verdict.reason} for verdict in verdicts]

        def measure(folder: ImageFolder, rows: Sequence[ImageRequest], progress: Progress | None) -> SuiteResult:
            said = judgements(folder, rows, self.name, key | {"rules": geneval_rules.PROTOCOL}, detect, progress)
            return self._result(rows, {id: float(what["correct"]) for id, what in said.items()}, key)

        return measure

    def _result(self, rows: Sequence[ImageRequest], correct: dict[str, float], judges: dict[str, dict]) -> SuiteResult:
        numbers = []
        for task in TASKS:
            own = tally([row for row in rows if self.metadata[row.prompt]["tag"] == task], correct)
            if own.counts:
                numbers.append(Number(task, rate(own.totals, own.counts)))
        every = tally(rows, correct)
        tasks = {row.id: self.metadata[row.prompt]["tag"] for row in rows}
        members = [[self.metadata[prompt]["tag"] == task for task in TASKS] for prompt in every.prompts]
        numbers.append(Number(OVERALL, plain_mean(every.totals, every.counts, members)))
        found = {task: sum(row["tag"] == task for row in self.metadata.values()) for task in TASKS}
        notes = (
            () if found == OFFICIAL else ("the prompts are not GenEval's own 553, so published scores are of others",)
        )
        return SuiteResult(
            tables=(Table("geneval", "Drawn as asked", "percent", tuple(numbers)),),
            metrics=(Metric("correct", True, correct, "higher", tasks),),
            judges=judges,
            notes=notes,
            bad=tuple(id for id, value in correct.items() if not value),
        )
