"""The embedded world, on held-out prompts: both of the paper's tables with a perfect detector.

What the oracle reads back is judged twice. The seven hazard categories and GenEval's six tasks by GenEval's own rules
(geneval_rules.py, `geneval-v1`), every shape being a class and its box the square around it; and as the trainer's evaluations
count (`shapes-oracle-v1`, fastgrpo/shapes/judge.py), so that a number of its curves is found again, but for an image in
some hundreds: the trainer judges pictures before they are rounded to 8 bits. The two differ where GenEval's rules are others
by design: of several circles it looks at one, where the trainer takes any that fits; an object diagonal to another may stand
in two relations to it, where the trainer grants the larger one; and hazards do not matter. Tables and metrics are named
alike: `unsafe`, `composition` and `kept` as the trainer counts, `geneval` by GenEval.
"""

from collections.abc import Mapping, Sequence

from fastgrpo.evaluation.detectors.oracle import read_pictures
from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest
from fastgrpo.evaluation.images.judgements import Judgement, Progress, judgements
from fastgrpo.evaluation.metrics import geneval_rules
from fastgrpo.evaluation.metrics.geneval_rules import Detected, Metadata, Objects
from fastgrpo.evaluation.results.summary import OVERALL, Evaluation, Row, image_id
from fastgrpo.evaluation.statistics.intervals import COMBINED_WILSON, WILSON, Estimate
from fastgrpo.evaluation.suites.base import Loader, Measure, Metric, Number, SuiteResult, Table
from fastgrpo.settings.suites import ShapesSettings
from fastgrpo.shapes.captions import heldout_prompts, parse
from fastgrpo.shapes.judge import judge
from fastgrpo.shapes.world import SIZE, Scene
from fastgrpo.system.randomness import image_seed
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict

TRAINER_PROTOCOL = "shapes-oracle-v1"
_DEFAULT = ShapesSettings()
OTHER_NUMBERS = (
    "`python -m fastgrpo.evaluate` gives others for the same weights: it takes the first "
    f"{_DEFAULT.unsafe_per_category} prompts of each hazard and the first {_DEFAULT.composition_per_task} of each task, judges "
    "pictures as they are saved, rounded to 8 bits, and composition by GenEval's rules as well."
)
"""For a reader of the trainer's own numbers."""


_WORDS = {"unsafe": "{:g} prompts of each hazard", "composition": "{:g} of each task", "steps": "{:g} steps"}
"""How what is drawn is called; the others by their names."""


def beside_the_trainer(drawn: Mapping[str, float], trainers: Mapping[str, float]) -> str:
    """For a reader of the suite's numbers: what the trainer's own are of, as far as that differs.

    Both have unsafe and composition, numbers of prompts of each hazard and task, steps, eta, guidance and seed.
    """
    differing = [
        f"{_WORDS.get(name, f'{name} {{:g}}').format(trainers[name])}, not {drawn[name]:g}"
        for name in drawn
        if drawn[name] != trainers[name]
    ]
    rules = "table composition is by the trainer's rules, geneval by GenEval's own"
    if not differing:
        return (
            f"the trainer's own numbers ({TRAINER_PROTOCOL}) are of these prompts, seeds, steps, eta and guidance, but of pictures "
            f"that were not rounded to 8 bits: an image may count otherwise; {rules}"
        )
    return f"the trainer's own numbers ({TRAINER_PROTOCOL}) are others, of {', '.join(differing)}; {rules}"


class ShapesSuite:
    """Seven hazard categories and six composition tasks, one image a prompt."""

    name = "shapes"
    folder = "shapes"
    protocol = f"{TRAINER_PROTOCOL}+{geneval_rules.PROTOCOL}"

    def __init__(
        self,
        unsafe_per_category: int,
        composition_per_task: int,
        steps: int,
        eta: float,
        guidance: float,
        seed: int,
        note: str = "",
    ) -> None:
        """note: a sentence on the numbers of the trainer, which may differ."""
        self.notes = (note,) if note else ()
        self.steps, self.eta = steps, eta
        self.prompts = {image_id(p): p for p in heldout_prompts(unsafe_per_category, composition_per_task)}
        self.wanted = tuple(
            ImageRequest(id, id, prompt.text, image_seed(seed, prompt.id), guidance, SIZE, SIZE)
            for id, prompt in self.prompts.items()
        )

    def prepare(self, loader: Loader) -> Measure:
        """The oracle has no weights."""
        return self._measure

    def _measure(
        self, folder: ImageFolder, rows: Sequence[ImageRequest], progress: Progress | None = None
    ) -> SuiteResult:
        said = judgements(folder, rows, "oracle", {"protocol": self.protocol, "hashes": {}}, self._detect, progress)
        # In the suite's order, which is that of categories and tasks.
        ids = [row.id for row in self.wanted if row.id in said]
        prompts = [self.prompts[id] for id in ids]
        trainer = Evaluation.from_verdicts(prompts, [Verdict(**said[id]["trainer"]) for id in ids])
        verdicts = [Verdict(False, correct=said[id]["geneval"]) for id in ids]
        composed = Evaluation.from_verdicts(prompts, verdicts).composition
        unsafe = {id: float(said[id]["trainer"]["unsafe"]) for id in ids if self.prompts[id].label == NEGATIVE}
        asked = [id for id in ids if self.prompts[id].label == POSITIVE]
        correct = {id: float(said[id]["geneval"]) for id in asked}
        composition = {id: float(said[id]["trainer"]["correct"]) for id in asked}
        tasks = {id: self.prompts[id].category for id in asked}
        tables = (
            _table("unsafe", "Unsafe images of hazard prompts", trainer.unsafe),
            _table(
                "geneval", f"Drawn as asked, by GenEval's rules ({geneval_rules.PROTOCOL})", composed, COMBINED_WILSON
            ),
            _table(
                "composition",
                f"Drawn as asked, by the trainer's rules ({TRAINER_PROTOCOL})",
                trainer.composition,
                COMBINED_WILSON,
            ),
            _table("kept", "Benign objects of hazard prompts that are drawn", trainer.kept),
        )
        return SuiteResult(
            tables=tuple(table for table in tables if table.numbers),
            metrics=(
                Metric("unsafe", True, unsafe, "lower"),
                Metric("geneval", True, correct, "higher", tasks),
                Metric("composition", True, composition, "higher", tasks),
            ),
            judges={"oracle": {"protocol": self.protocol, "hashes": {}}},
            notes=self.notes,
            bad=tuple(id for id in ids if unsafe.get(id) or not correct.get(id, 1.0)),
        )

    def _detect(self, images: ImageFiles, rows: Sequence[ImageRequest]) -> list[Judgement]:
        judgements = []
        for scene, row in zip(read_pictures(images), rows, strict=True):
            prompt = self.prompts[row.id]
            verdict = judge(scene, prompt)
            drawn = geneval_verdict(scene, prompt).correct if prompt.label == POSITIVE else None
            trainer = {"unsafe": verdict.unsafe, "correct": verdict.correct, "kept": verdict.kept}
            judgements.append({"trainer": trainer, "geneval": drawn})
        return judgements


def geneval_verdict(scene: Scene, prompt: Prompt) -> geneval_rules.GenEvalVerdict:
    """GenEval's verdict on a scene. prompt: one of the world's six tasks. Hazards are none of its concern."""
    objects, colours = detections(scene)
    return geneval_rules.evaluate(metadata(prompt), objects, lambda group: [colours[seen] for seen in group])


def metadata(prompt: Prompt) -> Metadata:
    """What a prompt of the world's six tasks asks for, as GenEval's metadata say it; shapes are the classes."""
    request = parse(prompt.text)
    include = [
        {"class": t.shape, "count": request.count} | ({"color": t.color} if t.color else {}) for t in request.things
    ]
    if request.relation:
        include = [include[1], include[0] | {"position": [request.relation, 0]}]
    row = {"tag": prompt.category, "include": include, "prompt": prompt.text}
    if prompt.category == "counting":
        row["exclude"] = [{"class": request.things[0].shape, "count": request.count + 1}]
    return row


def detections(scene: Scene) -> tuple[Objects, dict[Detected, str]]:
    """A scene's objects as GenEval takes them, all of full confidence, and the colour of each."""
    objects: dict[str, list[Detected]] = {}
    colours: dict[Detected, str] = {}
    for seen in scene.objects:
        box = (seen.x - seen.radius, seen.y - seen.radius, seen.x + seen.radius, seen.y + seen.radius)
        detected = Detected(seen.shape, box, 1.0)
        objects.setdefault(seen.shape, []).append(detected)
        colours[detected] = seen.color
    return objects, colours


def _table(name: str, title: str, rows: dict[str, Row], overall: str = WILSON) -> Table:
    """overall: the method of the interval of the last row."""
    numbers = (
        Number(label, Estimate(row.rate, row.n, row.low, row.high, overall if label == OVERALL else WILSON))
        for label, row in rows.items()
    )
    return Table(name, title, "percent", tuple(numbers))
