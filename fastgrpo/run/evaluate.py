"""Evaluates a model, or a run's base model and what it became, by suites: `python -m fastgrpo.evaluate`."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, Shard, drawn_by
from fastgrpo.evaluation.images.painters import check_sizes, make_scheduler, model_hashes
from fastgrpo.evaluation.results import comparison, tables
from fastgrpo.evaluation.results import file as outcome
from fastgrpo.evaluation.results.before_after import AFTER, BEFORE
from fastgrpo.evaluation.sentences import Result
from fastgrpo.evaluation.suite_run import SuiteRun, draw, measure
from fastgrpo.evaluation.suites.base import Loader, Measure, Suite
from fastgrpo.evaluation.suites.registry import Overrides, make_suites
from fastgrpo.models.check import describe
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts.truncation import truncation_lines
from fastgrpo.run.checkpoint import load_unet
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.commands import Evaluate
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import DDIM, NAMES
from fastgrpo.system.console import Console
from fastgrpo.system.devices import DTYPE_NAMES, choose_device, choose_dtype
from fastgrpo.system.distributed import Ranks, join
from fastgrpo.system.errors import ConfigError, blaming, nearest
from fastgrpo.system.files import check_writable
from fastgrpo.system.pictures import write_png
from fastgrpo.system.workers import available_cores

BATCH = 16  # images drawn at once, where there is no run to say
ALONE = "model"  # the one stage, where there is no run


@dataclass(frozen=True)
class _Stage:
    """One model under its name in the results. model: what it is called."""

    name: str
    model: str
    policy: Policy


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Stages are "before" and "after" of a run, and "model" of a model alone.

    folder: where the files are. results: what evaluation.json in it holds, described in
    fastgrpo/evaluation/results/file.py; {} on other processes than the first, and where images were only drawn.
    images: the pictures that were looked at, suite -> stage -> id -> PNG.
    """

    folder: Path
    results: Result
    images: Mapping[str, Mapping[str, Mapping[str, Path]]]

    def table(self, suite: str, name: str) -> dict[str, dict[str, dict[str, Any]]]:
        """One of a suite's tables: stage -> row -> {"value", "n", "low", "high", ...}, rates in [0, 1] with intervals.

        Raises ConfigError where there is none of that name.
        """
        measured = self.results.get("suites", {})
        _require_name("suite", suite, measured)
        tables = {table["name"]: table["numbers"] for table in measured[suite]["tables"]}
        _require_name(f"table of suite {suite}", name, tables)
        return {stage: {row["name"]: row for row in rows} for stage, rows in tables[name].items()}


def _require_name(what: str, name: str, there: Mapping[str, Any]) -> None:
    if name not in there:
        raise ConfigError(f"{name!r}: no such {what}{nearest(name, there)}; there are {', '.join(there) or 'none'}.")


def start(
    command: Evaluate,
    config: TrainConfig,
    names: Sequence[str],
    checkpoint: Path | None,
    output: Path,
    quiet: bool = False,
) -> Evaluation:
    """Meet the other processes, if there are any, and evaluate.

    config: of the run, or of preset `shapes` with the model to evaluate. names: of the suites. checkpoint: the folder
    of the run's. output: where results go. quiet: nothing on the terminal.
    """
    with join(command.device) as ranks:
        console = Console(quiet=quiet or not ranks.first, every_phase=True)
        return evaluate(command, config, names, checkpoint, output, console, ranks)


def evaluate(
    command: Evaluate,
    config: TrainConfig,
    names: Sequence[str],
    checkpoint: Path | None,
    output: Path,
    console: Console,
    ranks: Ranks,
) -> Evaluation:
    """Draw what is missing, score it, print the tables and write evaluation.json and evaluation.md.

    Raises ConfigError before anything is drawn where that is possible, and OSError where it cannot be written.
    """
    index, count = command.part
    shard = Shard(index - 1, count)
    suites = make_suites(names, command, _overrides(command, config), config, console.say)
    device = ranks.device if ranks.count > 1 else choose_device(command.device)
    description = describe(config.model)
    console.say(*description.notes)
    of_all, rescale = (device, "--steps", True), config.rollout.guidance_rescale
    schedules = {s.name: make_schedule(description.scheduler, s.steps, s.eta, *of_all, rescale) for s in suites}
    if command.sampler != DDIM:
        make_scheduler(description.scheduler, command.sampler)
    disable_progress_bar()  # one per file read, gone in a blink
    torch.set_num_threads(1)  # each of the policy's workers is a thread already
    # Before the model: what is missing is said before anything is drawn.
    loader = Loader(command, device)
    measuring = not command.shard
    with console.waiting("loading"):
        measures = {suite.name: suite.prepare(loader) if measuring else None for suite in suites}
        stages = _stages(command, config, checkpoint, device)
        runs = _suite_runs(command, config, suites, measures, schedules, stages, output, ranks)
    if ranks.first:
        _claim(runs, command, output)
    ranks.agree("the folders are there")

    texts = list(dict.fromkeys(row.text for suite in suites for row in suite.wanted))
    console.say(*truncation_lines(texts, stages[0].policy.tokenizer))
    if command.missing == "draw":
        if command.sampler != DDIM:
            torch.set_num_threads(available_cores())  # diffusers' pipelines have no workers
        for stage in stages:
            draw(stage.name, stage.policy, runs, command.sampler, console, shard)
    if not measuring:
        if ranks.first:
            _say_drawn(command, runs, console)
        return Evaluation(output, {}, _images(runs))
    if ranks.first:
        _say_missing(command, runs)
    torch.set_num_threads(max(1, available_cores() // ranks.count))  # detectors have no workers
    found = measure(runs, output, console)
    if not ranks.first:
        return Evaluation(output, {}, _images(runs))
    drawings = _drawings(runs)
    result = outcome.assemble(drawings, found)
    suites = outcome.earlier(output, drawings) | result["suites"]
    whole = result | {"suites": {name: suites[name] for name in NAMES if name in suites}}
    outcome.write(output, whole)
    console.say(*tables.console_tables(result), f"results   {output / 'evaluation.json'}, {output / 'evaluation.md'}")
    return Evaluation(output, whole, _images(runs))


def compare_folders(folders: tuple[Path, Path], output: Path, console: Console) -> None:
    """Test the differences between two stages' folders, and write the pictures that changed most."""
    names = "in the first", "in the second"
    first, second = (comparison.find_stage(path) for path in folders)
    check_writable(f"--output {output}", output)
    for found in comparison.compare_stages(first, second):
        sheet = output / f"compare-{found.suite}.png"
        console.say(f"{found.suite}, {first} -> {second}")
        console.say(*(f"  {tables.compared_line(entry, names)}" for entry in found.compared))
        write_png(sheet, found.sheet)
        console.say(f"  pictures that changed most: {sheet}")


def _overrides(command: Evaluate, config: TrainConfig) -> Overrides:
    seed = config.eval.seed if command.seed is None else command.seed
    eta = command.eta if command.sampler == DDIM else 0.0
    return Overrides(seed, command.steps, eta, command.guidance, command.size)


def _stages(command: Evaluate, config: TrainConfig, folder: Path | None, device: torch.device) -> list[_Stage]:
    """The models, loaded: of a run the base model and the trained one, which share all but the UNet."""
    dtype = choose_dtype(command.dtype, device)
    workers = available_cores() if device.type == "cpu" else 1
    if folder is None:
        policy = load_policy(config.model, device, dtype, workers).rounded()
        return [_Stage(ALONE, " with the UNet of ".join(filter(None, (command.model, command.unet))), policy)]
    with blaming(Path(command.run) / "config.toml"):
        policy = load_policy(config.model, device, dtype, workers)
        tuned = replace(policy, unet=copy.deepcopy(policy.unet))
        load_unet(tuned.unet, folder, command.weights, config.model)
    name = f"{folder.parent.parent.resolve().name}/{folder.name}, {command.weights}"
    return [_Stage(BEFORE, config.model.path, policy.rounded()), _Stage(AFTER, name, tuned.rounded())]


def _suite_runs(
    command: Evaluate,
    config: TrainConfig,
    suites: Sequence[Suite],
    measures: dict[str, Measure | None],
    schedules: dict[str, Schedule],
    stages: Sequence[_Stage],
    output: Path,
    ranks: Ranks,
) -> list[SuiteRun]:
    dtype = DTYPE_NAMES[stages[0].policy.dtype]
    batch = command.batch or (config.rollout.decode_batch if command.run else BATCH)
    hashes = {stage.name: model_hashes(stage.policy) if ranks.first else {} for stage in stages}
    how = drawn_by(command.sampler, config.rollout.guidance_rescale)
    runs = []
    for suite in suites:
        check_sizes(stages[0].policy, suite.wanted)
        folders = {}
        for stage in stages:
            drawing = Drawing(stage.model, hashes[stage.name], suite.steps, suite.eta, dtype, batch, how)
            folders[stage.name] = ImageFolder(output / stage.name / suite.folder, drawing, suite.wanted, ranks)
        runs.append(SuiteRun(suite, measures[suite.name], schedules[suite.name], folders))
    return runs


def _claim(runs: Sequence[SuiteRun], command: Evaluate, output: Path) -> None:
    """Make the folders, none of them where one holds something else."""
    folders = [folder for each in runs for folder in each.folders.values()]
    outcome.earlier(output, _drawings(runs))
    for folder in folders:
        folder.check()
    if command.missing == "refuse":
        _say_missing(command, runs)
    os.makedirs(output, exist_ok=True)
    for folder in folders:
        folder.claim()


def _drawings(runs: Sequence[SuiteRun]) -> dict[str, Drawing]:
    """How each stage's images are drawn, by any suite: it names the stage's model."""
    return {name: folder.drawing for name, folder in runs[0].folders.items()}


def _images(runs: Sequence[SuiteRun]) -> dict[str, dict[str, dict[str, Path]]]:
    """Suite -> stage -> id -> the image that is there."""
    return {
        each.suite.name: {
            stage: {row.id: folder.file(row.id) for row in folder.present()} for stage, folder in each.folders.items()
        }
        for each in runs
    }


def _say_drawn(command: Evaluate, runs: Sequence[SuiteRun], console: Console) -> None:
    missing = sum(len(folder.missing()) for each in runs for folder in each.folders.values())
    rest = f"{missing} images of other parts are missing here" if missing else "all images are there"
    console.say(
        f"shard {command.shard} is drawn; {rest}: when they lie here, the same command without --shard scores them"
    )


def _say_missing(command: Evaluate, runs: Sequence[SuiteRun]) -> None:
    """Raise ConfigError where images are missing that are not to be skipped, or where there is none at all."""
    for each in runs:
        for folder in each.folders.values():
            missing = folder.missing()
            if missing and (command.missing != "skip" or len(missing) == len(folder.wanted)):
                few = ", ".join(row.id for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
                raise ConfigError(
                    f"{folder.path}: {len(missing)} of {len(folder.wanted)} images are missing ({few}); --missing draw "
                    "draws them, and --missing skip scores the others."
                )
