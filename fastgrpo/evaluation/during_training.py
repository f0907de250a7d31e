"""The suites of `python -m fastgrpo.evaluate` while a model is trained (eval.suites), by the same protocols.

RUN/evaluation/in-training/
  before/, after/       the images, verdicts beside them; of evaluations in between nothing is kept but eval/* in the metrics
  evaluation.json, .md  before and after, with the test of the difference
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest, read_manifest
from fastgrpo.evaluation.images.painters import check_sizes, model_hashes
from fastgrpo.evaluation.results import file as outcome
from fastgrpo.evaluation.results import tables
from fastgrpo.evaluation.results.file import StageResult
from fastgrpo.evaluation.sentences import Sentence, of_suites, read_result
from fastgrpo.evaluation.suite_run import SuiteRun, draw, score
from fastgrpo.evaluation.suites.base import Loader, Measure, Suite
from fastgrpo.evaluation.suites.base import Table as SuiteTable
from fastgrpo.evaluation.suites.registry import Overrides, make_suites
from fastgrpo.policy import Policy
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import DDIM
from fastgrpo.system.console import Console
from fastgrpo.system.devices import DTYPE_NAMES
from fastgrpo.system.files import reading

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and who judges its images."""

    suite: Suite
    measure: Measure


def load_suites(
    config: TrainConfig, device: torch.device, say: Callable[[str], object] = lambda _: None
) -> tuple[LoadedSuite, ...]:
    """The suites of eval.suites, their prompts read and their judges loaded. say: as of `make_suites`.

    Raises ConfigError, which speaks of eval's fields, where something is missing or wrong.
    """
    overrides = Overrides(config.eval.seed, config.eval.steps or None)
    suites = make_suites(config.eval.suites, config.eval, overrides, config, say, "eval.{}".format)
    loader = Loader(config.eval, device, "eval.{}".format)
    return tuple(LoadedSuite(suite, suite.prepare(loader)) for suite in suites)


class SuiteExam:
    """Draws and judges a policy's images, stage by stage."""

    def __init__(
        self, run: Path, config: TrainConfig, policy: Policy, judged: Sequence[LoadedSuite], console: Console
    ) -> None:
        """Raises ConfigError for a suite that wants images of a size, or steps, that the model does not know."""
        self.path = run / "evaluation" / "in-training"
        self._result = self.path / "evaluation.json"
        self._config, self._policy, self._judged, self._console = config, policy, judged, console
        for each in judged:
            check_sizes(policy, each.suite.wanted)
        self._schedules = {
            suite.name: make_schedule(
                policy.scheduler_config, suite.steps, suite.eta, policy.device, "eval.steps", deterministic=True
            )
            for suite in (each.suite for each in judged)
        }

    def before(self) -> dict[str, float]:
        """The untrained policy's, of which images that are there already are kept. Returns eval/SUITE/TABLE/NUMBER."""
        return self._values(BEFORE, score(self._drawn(BEFORE), self.path, self._console))

    def between(self, stage: str) -> dict[str, float]:
        """Of a share eval.quick_fraction of every suite's prompts. Returns eval/SUITE/TABLE/NUMBER."""
        try:
            return self._values(stage, score(self._drawn_anew(stage, quick=True), self.path, self._console))
        finally:
            self._remove(stage)

    def after(self) -> dict[str, float]:
        """The trained policy's, and both written to evaluation.json and .md. Returns eval/SUITE/TABLE/NUMBER."""
        runs = [
            replace(each, folders={BEFORE: self._kept(BEFORE, each.suite)} | each.folders)
            for each in self._drawn_anew(AFTER)
        ]
        found = score(runs, self.path, self._console)
        drawings = {stage: folder.drawing for stage, folder in runs[0].folders.items()}
        outcome.write(self.path, outcome.assemble(drawings, found))
        return self._values(AFTER, found)

    def tables(self) -> list[Table | str]:
        """Before and after, once `after` has been called."""
        with reading(self._result):
            return tables.console_tables(read_result(self._result))

    def verdicts(self) -> list[Sentence]:
        """Better, worse or undecided, of every metric, once `after` has been called."""
        with reading(self._result):
            return of_suites(read_result(self._result))

    def _drawn_anew(self, stage: str, quick: bool = False) -> list[SuiteRun]:
        """As `_drawn`, without what a run that was killed may have left: images of other weights."""
        self._remove(stage)
        return self._drawn(stage, quick)

    def _drawn(self, stage: str, quick: bool = False) -> list[SuiteRun]:
        """The suites with the stage's images, those drawn that are missing."""
        hashes = model_hashes(self._policy)
        runs = [
            SuiteRun(each.suite, each.measure, {stage: self._folder(stage, each, hashes, quick)})
            for each in self._judged
        ]
        for each in runs:
            each.folders[stage].claim()
        draw(stage, self._policy, runs, DDIM, self._schedules, self._console)
        return runs

    def _folder(self, stage: str, judged: LoadedSuite, hashes: dict[str, str], quick: bool) -> ImageFolder:
        suite, config = judged.suite, self._config
        wanted = share(suite.wanted, config.eval.quick_fraction) if quick else suite.wanted
        dtype, batch = DTYPE_NAMES[self._policy.dtype], config.rollout.decode_batch
        drawing = Drawing(config.model.path, hashes, suite.steps, suite.eta, dtype, batch, DDIM)
        return ImageFolder(self.path / stage / suite.folder, drawing, wanted)

    def _kept(self, stage: str, suite: Suite) -> ImageFolder:
        """An earlier stage's folder, whose weights only its manifest knows by now."""
        path = self.path / stage / suite.folder
        return ImageFolder(path, Drawing(**read_manifest(path)["drawing"]), suite.wanted)

    def _remove(self, stage: str) -> None:
        shutil.rmtree(self.path / stage, ignore_errors=True)

    def _values(self, stage: str, found: Sequence[tuple[Suite, dict[str, StageResult]]]) -> dict[str, float]:
        """Metrics of one stage, of which each table's last number is also said."""
        values = {}
        for suite, scores in found:
            for table in scores[stage].scored.tables:
                values |= {f"eval/{suite.name}/{table.name}/{n.name}": n.estimate.value for n in table.numbers}
            self._console.say(
                f"{stage}, {suite.name}: "
                + ", ".join(_said(table) for table in scores[stage].scored.tables if table.numbers)
            )
        return values


def share(wanted: Sequence[ImageRequest], fraction: float) -> tuple[ImageRequest, ...]:
    """All images of a share of the prompts, rounded up: evenly spaced by id.

    fraction: in (0, 1].
    """
    prompts = sorted({row.prompt for row in wanted})
    count = math.ceil(fraction * len(prompts))
    chosen = {prompts[k * len(prompts) // count] for k in range(count)}
    return tuple(row for row in wanted if row.prompt in chosen)


def _said(table: SuiteTable) -> str:
    """A table's last number, which is of all images."""
    return f"{table.name} {tables.number_text(outcome.number_json(table.numbers[-1]), table.unit)}"
