"""Evaluates a policy before, during and after its training: by suites, as `fastgrpo.evaluate` does, and in pictures.

All processes draw and measure a share. The first alone has the run's folder, reads it and writes to it.

RUN/
  evaluation_before.json  eval/* of the policy before training, so that a resumed run knows them
  evaluation.json         suite `shapes` before and after, for other programs (results/summary.py)
  samples/                picture grids (samples.py)
  evaluation/in-training/
    before/, after/       images and what was read from them; of evaluations in between only eval/* in the metrics stays
    evaluation.json, .md  all suites before and after, with the tests of the differences
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from fastgrpo.engine.trainable import Ema
from fastgrpo.evaluation.feature_distance import FeatureDistance, PictureFeatures
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, drawn_by, read_manifest
from fastgrpo.evaluation.images.painters import check_sizes, model_hashes
from fastgrpo.evaluation.results import file as outcome
from fastgrpo.evaluation.results import summary, tables
from fastgrpo.evaluation.results.before_after import AFTER, BEFORE
from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.evaluation.samples import BEFORE_AFTER, SampleGrids, first_of_each_label
from fastgrpo.evaluation.sentences import Sentence, of_distance, of_suites
from fastgrpo.evaluation.shared_prompts import Found, SharedPrompts, benign, quick_share
from fastgrpo.evaluation.suite_run import SuiteRun, draw, measure
from fastgrpo.evaluation.suites.base import Loader, Measure, Suite
from fastgrpo.evaluation.suites.base import Table as SuiteTable
from fastgrpo.evaluation.suites.registry import Overrides, make_suites
from fastgrpo.evaluation.suites.shapes import ShapesSuite
from fastgrpo.policy import Policy
from fastgrpo.rewards.encoder import OpenClipEncoder
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import DDIM
from fastgrpo.system.console import Console
from fastgrpo.system.devices import DTYPE_NAMES
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import Prompt


@dataclass(frozen=True)
class LoadedSuite:
    """A suite, and what measures its images, with the weights that it needs."""

    suite: Suite
    measure: Measure


def load_suites(
    config: TrainConfig, device: torch.device, say: Callable[[str], object] = lambda _: None
) -> tuple[LoadedSuite, ...]:
    """The suites of eval.suites, and `shapes` where its world is trained; say: as of `make_suites`.

    Raises ConfigError, which speaks of eval's fields, where something is missing or wrong.
    """
    in_world = config.model.path == "shapes" or (config.prompts.positive, config.prompts.negative) == ("shapes",) * 2
    names = (*config.eval.suites, *(["shapes"] if in_world else []))
    overrides = Overrides(config.eval.seed, config.eval.steps or None)
    suites = make_suites(names, config.eval, overrides, config, say, "eval.{}".format)
    loader = Loader(config.eval, device, "eval.{}".format)
    return tuple(LoadedSuite(suite, suite.prepare(loader)) for suite in suites)


@dataclass(frozen=True)
class Subject:
    """Whose images are evaluated, and with what.

    ema: the moving average of the policy's weights, if one is kept. prompts: all of the training. schedule: the steps
    of pictures. held_out: measures the pictures, where eval.encoder names an encoder. encoder: compares those of benign
    prompts with what they were before training.
    """

    policy: Policy
    ema: Ema | None
    prompts: tuple[Prompt, ...]
    schedule: Schedule
    suites: tuple[LoadedSuite, ...] = ()
    held_out: HeldOutReward | None = None
    encoder: OpenClipEncoder | None = None


@dataclass(frozen=True)
class Evaluation:
    """values: eval/*. evaluated: what the best checkpoint is chosen by; None where unsafe images are not counted."""

    values: dict[str, float]
    evaluated: Evaluated | None


class TrainingEvaluation:
    """Evaluates one run's policy, stage by stage. All processes are to call `before`, `after`, `between` and `of`."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        subject: Subject,
        console: Console,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> None:
        """Raises ConfigError for a suite that wants images of a size, or steps, that the model does not know."""
        self._run, self._config, self._console, self._ranks = run, config, console, ranks
        self._policy, self._suites = subject.policy, subject.suites
        ema = subject.ema if config.eval.weights == "ema" else None
        self._weights = ema.in_place if ema else nullcontext
        self._folder = run / "evaluation" / "in-training"
        self._result = self._folder / "evaluation.json"
        self._schedules = {}
        for suite in (each.suite for each in subject.suites):
            check_sizes(self._policy, suite.wanted)
            model = self._policy.scheduler_config, suite.steps, suite.eta, self._policy.device
            self._schedules[suite.name] = make_schedule(*model, "eval.steps", True, config.rollout.guidance_rescale)
        world = next((each.suite for each in subject.suites if isinstance(each.suite, ShapesSuite)), None)
        prompts = world.pictured() if world else first_of_each_label(subject.prompts)
        drawing = self._policy, subject.schedule, prompts
        self._grids = SampleGrids(run, config, *drawing, subject.held_out, console, ranks)
        self._features = PictureFeatures(subject.encoder) if subject.encoder else None
        spec = self._features.spec if self._features else ""
        self._shared = SharedPrompts([each.suite for each in subject.suites], config.eval, spec)
        self._before: Found = ()

    def before(self) -> dict[str, float]:
        """Evaluate the untrained policy, as far as this run has not done so already. Returns eval/*."""
        metrics = self._kept_before()
        if metrics is None:
            metrics = self._grids.draw(BEFORE)
            self._write_before(metrics)  # suites may take hours
        self._before = self._measured(self._drawn(BEFORE))
        metrics = metrics | self._values(BEFORE, self._before)
        self._write_before(metrics)
        return metrics

    def due(self, iteration: int) -> bool:
        """Whether the policy is to be evaluated after this iteration."""
        every = self._config.eval.every
        return iteration == self._config.iterations or (every > 0 and iteration % every == 0)

    def of(self, iteration: int) -> Evaluation | None:
        """What is found after an iteration that is evaluated, with time/eval_s; None after the others."""
        if not self.due(iteration):
            return None
        began = time.monotonic()
        found = self.after() if iteration == self._config.iterations else self.between(iteration)
        return replace(found, values=found.values | {"time/eval_s": time.monotonic() - began})

    def between(self, iteration: int) -> Evaluation:
        """A grid, and a share eval.quick_fraction of every suite's prompts. To be called after `before`."""
        stage = _stage(iteration)
        with self._weights():
            pictured = self._grids.draw(stage)
            try:
                found = self._measured(self._drawn_anew(stage, quick=True))
                return self._evaluation(iteration, stage, found, pictured, self._moved(stage, found))
            finally:
                self._remove(stage)

    def after(self) -> Evaluation:
        """All of it beside what was before: grids side by side, and evaluation.json. To be called after `before`."""
        with self._weights():
            metrics = self._grids.draw(AFTER)
            if self._ranks.first:
                self._grids.join()
            drawn = self._drawn_anew(AFTER)
            runs = [replace(each, folders={BEFORE: self._kept(each.suite)} | each.folders) for each in drawn]
            found = self._measured(runs)
        moved = self._moved(AFTER, found)
        if runs and self._ranks.first:
            drawings = {stage: folder.drawing for stage, folder in runs[0].folders.items()}
            result = outcome.assemble(drawings, found)
            if moved.distance and self._features:
                named = {"suite": moved.suite, "encoder": self._features.spec}
                result |= {"distance": named | moved.distance.to_json()}
            outcome.write(self._folder, result)
            if "shapes" in result["suites"]:
                summary.write_summary(self._run / "evaluation.json", result["suites"]["shapes"], result.get("distance"))
        return self._evaluation(self._config.iterations, AFTER, found, metrics, moved)

    def pictures(self, iteration: int) -> dict[str, Path]:
        """The grids of an iteration's policy by what they show, where it was evaluated; 0 is before training."""
        if iteration == self._config.iterations:
            return {"samples": self._grids.file(AFTER), "before_after": self._grids.file(BEFORE_AFTER)}
        if iteration and not self.due(iteration):
            return {}
        return {"samples": self._grids.file(_stage(iteration) if iteration else BEFORE)}

    def plain_tables(self) -> dict[str, list[list[str]]]:
        """Before and after as texts, as `tables.plain_tables`, once `after` has been called."""
        return tables.plain_tables(summary.read_result(self._result)) if self._suites else {}

    def tables(self) -> list[Table | str]:
        """Before and after, once `after` has been called."""
        return tables.console_tables(summary.read_result(self._result)) if self._suites else []

    def sentences(self) -> list[Sentence]:
        """Better, worse or undecided, of every metric, once `after` has been called."""
        if not self._suites:
            return []
        result = summary.read_result(self._result)
        return [*of_suites(result), *of_distance(result.get("distance"))]

    def _moved(self, stage: str, found: Found) -> "_Moved":
        """How far benign prompts' pictures have moved, where a suite has such prompts and there is an encoder."""
        here = benign(self._before, BEFORE)
        if here is None or self._features is None:
            return _Moved("", None, None)
        suite, metric = here
        before, now = (
            next(results[name].folder for each, results in of if each.name == suite.name)
            for name, of in ((BEFORE, self._before), (stage, found))
        )
        with self._console.bar(f"{stage}, features"):
            pairs = self._features.pairs(before, now, metric.values.keys())
        ids = self._shared.ids(suite)
        whole = pairs.distance()
        all_shared = all(row.id in ids for row in pairs.rows)
        return _Moved(suite.name, whole, whole if all_shared else pairs.distance(ids))

    def _evaluation(
        self, iteration: int, stage: str, found: Found, pictured: dict[str, float], moved: "_Moved"
    ) -> Evaluation:
        values = pictured | self._values(stage, found) | (moved.distance.metrics() if moved.distance else {})
        return Evaluation(values, self._shared.evaluated(iteration, self._before, (stage, found), moved.shared))

    def _measured(self, runs: Sequence[SuiteRun]) -> Found:
        return measure(runs, self._folder, self._console)

    def _drawn_anew(self, stage: str, quick: bool = False) -> list[SuiteRun]:
        """As `_drawn`, without what a run that was killed may have left: images of other weights."""
        self._remove(stage)
        return self._drawn(stage, quick)

    def _remove(self, stage: str) -> None:
        """Remove a stage's images and what was found in them."""
        if self._ranks.first:
            shutil.rmtree(self._folder / stage, ignore_errors=True)

    def _kept_before(self) -> dict[str, float] | None:
        """eval/* of the pictures before training, where this run has measured them; the same on all processes."""
        kept = summary.read_before(self._run) if self._ranks.first else None
        if kept and kept.get("verdicts"):
            self._console.say(
                "evaluation_before.json is of an earlier version: the model before training is measured anew"
            )
        same = kept and kept["settings"] == self._grids.settings and self._grids.file(BEFORE).is_file()
        found: dict[str, float] | None = json.loads(
            self._ranks.agree(json.dumps(kept["metrics"] if kept and same else None))
        )
        return found

    def _write_before(self, metrics: dict[str, float]) -> None:
        if self._ranks.first:
            summary.write_before(self._run, self._grids.settings, metrics)

    def _drawn(self, stage: str, quick: bool = False) -> list[SuiteRun]:
        """The suites with the stage's images, those drawn that are missing."""
        hashes = model_hashes(self._policy) if self._suites and self._ranks.first else {}
        runs = []
        for each in self._suites:
            folder = self._claimed(stage, each.suite, hashes, quick)
            runs.append(SuiteRun(each.suite, each.measure, self._schedules[each.suite.name], {stage: folder}))
        draw(stage, self._policy, runs, DDIM, self._console)
        return runs

    def _claimed(self, stage: str, suite: Suite, hashes: dict[str, str], quick: bool) -> ImageFolder:
        """The folder of a suite's images of a stage, or of a share of them, made where it is not there."""
        config, wanted = self._config, suite.wanted
        if quick:
            wanted = quick_share(suite, config.eval.quick_fraction)
        dtype, batch = DTYPE_NAMES[self._policy.dtype], config.rollout.decode_batch
        sampler = drawn_by(DDIM, config.rollout.guidance_rescale)
        drawing = Drawing(config.model.path, hashes, suite.steps, suite.eta, dtype, batch, sampler)
        folder = ImageFolder(self._folder / stage / suite.folder, drawing, wanted, self._ranks)
        if not self._ranks.first:
            return folder
        try:
            folder.check()
        except ConfigError:
            if not isinstance(suite, ShapesSuite):  # whose images take seconds, and of others perhaps hours
                raise
            shutil.rmtree(folder.path)
        folder.claim()
        return folder

    def _kept(self, suite: Suite) -> ImageFolder:
        """The folder of before, whose weights only its manifest knows by now."""
        before = next(results[BEFORE].folder for each, results in self._before if each is suite)
        if not self._ranks.first:
            return before
        return ImageFolder(before.path, Drawing(**read_manifest(before.path)["drawing"]), suite.wanted, self._ranks)

    def _values(self, stage: str, found: Found) -> dict[str, float]:
        """eval/* of one stage; what the line of an iteration does not show is also said: each table's last number."""
        values: dict[str, float] = {}
        for suite, results in found:
            shown = results[stage].found.tables
            for table in shown:
                named = ((_metric_name(suite, table, n.name), n.estimate.value) for n in table.numbers)
                values |= {name: value for name, value in named if name}
            if not isinstance(suite, ShapesSuite):
                said = ", ".join(_said(table) for table in shown if table.numbers)
                self._console.say(f"{stage}, {suite.name}: {said}")
        return values


def _stage(iteration: int) -> str:
    return f"iter-{iteration:06d}"


@dataclass(frozen=True)
class _Moved:
    """suite: whose pictures. distance: of all that the stage drew. shared: of those that every evaluation draws."""

    suite: str
    distance: FeatureDistance | None
    shared: FeatureDistance | None


def _metric_name(suite: Suite, table: SuiteTable, number: str) -> str:
    """eval/SUITE/TABLE/NUMBER; of `shapes` eval/TABLE, eval/TABLE_CATEGORY, or "" for what is not logged."""
    if not isinstance(suite, ShapesSuite):
        return f"eval/{suite.name}/{table.name}/{number}"
    if number == summary.OVERALL:
        return f"eval/{table.name}"
    logged = table.name != "kept" and number != summary.NEVER_TRAINED
    return f"eval/{table.name}_{number.replace(' ', '_').replace('-', '_')}" if logged else ""


def _said(table: SuiteTable) -> str:
    """A table's last number, which is of all images."""
    return f"{table.name} {tables.number_text(outcome.number_json(table.numbers[-1]), table.unit)}"
