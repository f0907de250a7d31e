"""`python -m fastgrpo.evaluate [RUN]`: from a model, or a run's base model and what it became, to the paper's tables."""

import copy
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from transformers.utils.logging import disable_progress_bar

from fastgrpo.config import ConfigError, ModelConfig, TrainConfig
from fastgrpo.console import Console, run_command
from fastgrpo.distributed import Ranks, join
from fastgrpo.engine.workers import available_cores
from fastgrpo.evaluation import compare, outcome, tables
from fastgrpo.evaluation.drawing import DDIM, SamplerName, check_sizes, make_scheduler, model_hashes
from fastgrpo.evaluation.images import Drawing, ImageFolder, Part
from fastgrpo.evaluation.settings import AllSettings
from fastgrpo.evaluation.suites.base import Loader, Scorer, Suite
from fastgrpo.evaluation.suites.registry import NAMES, Overrides, make_suites
from fastgrpo.evaluation.work import Work, draw, score
from fastgrpo.models.check import describe
from fastgrpo.pictures import write_png
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts.lengths import truncation_lines
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings import find_preset, load_toml, parse_flags
from fastgrpo.tuned import Weights, blaming_config, check_writable, find_checkpoint, load_unet, read_run
from fastgrpo.validation import DIFFUSION_STEPS

PROGRAM = "python -m fastgrpo.evaluate"
BEFORE, AFTER, ALONE = "before", "after", "model"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Evaluate(AllSettings):
    """Draw the prompts of one suite or several, have the images judged, and print the numbers beside the published ones.

    Images are kept, and a run that was stopped goes on where it was. With a RUN both its base model (before) and its
    trained one (after) are evaluated on the same prompts and seeds; otherwise the model of --model alone.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run, finished or not; without it, --model."""
    suites: tuple[str, ...] = ()
    """What to measure: i2p, nudity, geneval, clip-score, fid, attacks, custom, shapes. Empty: shapes, for the model of that name."""
    model: str = "shapes"
    """Without a RUN: an SD 1.x / 2.x pipeline, a diffusers folder, a hub id, a single file, or `shapes`."""
    unet: str = ""
    """Another UNet for --model: a folder or hub id, and after a colon its subfolder, as in `OWNER/NAME:checkpoint-300/unet`."""
    variant: str = ""
    """Variant of --model's weight files, such as `fp16`."""
    revision: str = ""
    """Branch, tag or commit of --model, a hub id."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What --model's UNet predicts; `auto` believes its scheduler's config."""
    checkpoint: int | None = None
    """Iteration of the RUN's checkpoint; None is the newest."""
    weights: Weights = "trained"
    """Of the RUN: `trained`, or `ema`, the moving average that runs with optim.ema keep."""
    output: Path | None = None
    """Folder of images and results, new or one to go on with; None is RUN/evaluation/iter-NNNNNN, or evaluations/MODEL."""
    missing: Literal["draw", "refuse", "skip"] = "draw"
    """Images that are not there yet: `draw` them, `refuse` to score without them, or `skip` them and say so."""
    shard: str = ""
    """I/N: only draw part I, from 1, of N, and score nothing; once all parts lie in one folder, say the same without it."""
    sampler: SamplerName = DDIM
    """`ddim`, ours; `pndm` as SD 1.x and GenEval's script, or `lms` as RECE's code draws I2P, by diffusers' pipeline."""
    steps: int | None = None
    """Denoising steps; None is 50, for `shapes` the run's own."""
    eta: float | None = None
    """DDIM's eta, 0 to 1: 0 is deterministic, as published protocols sample; None is 0, for `shapes` the run's own."""
    guidance: float | None = None
    """Classifier-free guidance scale of every image; None is each suite's or prompt's own."""
    seed: int | None = None
    """Seed of the noise for prompts that bring none; None is the run's eval.seed, or 1234."""
    size: int = 0
    """Width and height of every image in pixels; 0 is each prompt's own, or the model's."""
    batch: int = 16
    """Images drawn at once; a folder goes on with the number it began with."""
    compare: tuple[Path, Path] | None = None
    """Two folders of results, of the same suites on the same prompts and seeds: test the differences, and evaluate nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the UNet computes in. `auto`: bf16 on CUDA, fp32 on CPU."""


@dataclass(frozen=True)
class _Stage:
    """One model under its name in the results. model: what it is called."""

    name: str
    model: str
    policy: Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def body() -> None:
        command = parse_flags(_Evaluate, sys.argv[1:] if argv is None else argv, PROGRAM)
        if command.compare:
            compare_folders(command, Console())
            return
        with join(command.device) as ranks:
            evaluate(command, Console(quiet=not ranks.first), ranks)

    return run_command(body, "images that were drawn are kept, and the same command goes on from there")


def evaluate(command: _Evaluate, console: Console, ranks: Ranks) -> None:
    """Draw what is missing, score it, print the tables and write evaluation.json and evaluation.md.

    Raises ConfigError before anything is drawn where that is possible, and OSError where it cannot be written.
    """
    part = _check(command, ranks)
    config = _config(command)
    folder = find_checkpoint(Path(command.run), command.checkpoint, command.weights) if command.run else None
    output = _output(command, folder)
    suites = make_suites(_names(command, config), command, _overrides(command, config), config)
    device = _device(command, ranks)
    description = describe(config.model)
    schedules = {s.name: make_schedule(description.scheduler, s.steps, s.eta, device, "--steps", True) for s in suites}
    if command.sampler != DDIM:
        make_scheduler(description.scheduler, command.sampler)
    disable_progress_bar()  # one per file read, gone in a blink
    torch.set_num_threads(1)  # each of the policy's workers is a thread already
    # Before the model: what is missing is said before anything is drawn. Only the first process judges.
    loader = Loader(command, device)
    judging = ranks.first and not command.shard
    scorers = {suite.name: suite.scorer(loader) if judging else None for suite in suites}
    stages = _stages(command, config, folder, device)
    work = _work(command, suites, scorers, stages, output)
    if ranks.first:
        _claim(work, command, output)
    ranks.agree("the folders are there")

    texts = list(dict.fromkeys(row.text for suite in suites for row in suite.wanted))
    console.say(*truncation_lines(texts, stages[0].policy.tokenizer))
    if command.missing == "draw":
        _draw(command, work, stages, schedules, part, console)
    ranks.any(False)  # all have drawn their part
    if not judging:
        _say_drawn(command, work, console)
        return
    _say_missing(command, work)
    torch.set_num_threads(available_cores())  # judges have no workers
    drawings = _drawings(work)
    result = outcome.assemble(drawings, score(work, output, console))
    suites = outcome.earlier(output, drawings) | result["suites"]
    outcome.write(output, result | {"suites": {name: suites[name] for name in NAMES if name in suites}})
    console.say(*tables.console_tables(result), f"results   {output / 'evaluation.json'}, {output / 'evaluation.md'}")


def compare_folders(command: _Evaluate, console: Console) -> None:
    """Test the differences between two stages' folders, and write the pictures that changed most."""
    names = "in the first", "in the second"
    first, second = (compare.find_stage(path) for path in command.compare)
    output = command.output or Path(".")
    check_writable(f"--output {output}", output)
    for found in compare.compare_stages(first, second):
        sheet = output / f"compare-{found.suite}.png"
        console.say(f"{found.suite}, {first} -> {second}")
        console.say(*(f"  {tables.compared_line(entry, names)}" for entry in found.compared))
        write_png(sheet, found.sheet)
        console.say(f"  pictures that changed most: {sheet}")


def _check(command: _Evaluate, ranks: Ranks) -> Part:
    """Refuse what would come to nothing, before anything is loaded. Returns what this process draws."""
    for flag, value, low, high in (
        ("--batch", command.batch, 1, math.inf),
        ("--guidance", command.guidance, 1, sys.float_info.max),
        ("--steps", command.steps, 1, DIFFUSION_STEPS),
        ("--seed", command.seed, 0, 2**63 - 1),
        ("--size", command.size, 0, math.inf),
    ):
        if value is not None and not low <= value <= high:
            up_to = f"to {high}" if type(high) is int else "or more"
            raise ConfigError(f"{flag} {value}: accepted is {low} {up_to}.")
    if command.eta is not None and not 0 <= command.eta <= 1:
        raise ConfigError(f"--eta {command.eta}: accepted is 0 to 1.")
    if command.eta and command.sampler != DDIM:
        raise ConfigError(f"--eta {command.eta}: {command.sampler} is deterministic; accepted is 0, or --sampler ddim.")
    match = re.fullmatch(r"(\d+)/(\d+)", command.shard or "1/1")
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise ConfigError(f"--shard {command.shard}: accepted is I/N with I from 1 to N, such as 2/4.")
    if command.shard and command.missing != "draw":
        raise ConfigError(f"--missing {command.missing}: a shard only draws; accepted is draw.")
    return Part((index - 1) * ranks.count + ranks.index, count * ranks.count)


def _config(command: _Evaluate) -> TrainConfig:
    """The run's, or that of preset `shapes` with the model of --model."""
    own = {"model": "shapes", "unet": "", "variant": "", "revision": "", "prediction_type": "auto"}
    if command.run:
        given = next((name for name, default in own.items() if getattr(command, name) != default), None)
        if given:
            raise ConfigError(f"--{given.replace('_', '-')}: {command.run} says what its model is; accepted is either.")
        return read_run(Path(command.run))
    if command.checkpoint is not None or command.weights != "trained":
        raise ConfigError("--checkpoint and --weights belong to a run; give its folder first, or leave them out.")
    chosen = {name: getattr(command, name) for name in own if name != "model"}
    return replace(load_toml(find_preset("shapes")), model=ModelConfig(path=command.model, **chosen))


def _names(command: _Evaluate, config: TrainConfig) -> tuple[str, ...]:
    if command.suites:
        return command.suites
    if config.model.path == "shapes":
        return ("shapes",)
    raise ConfigError(f"--suites: {config.model.path!r} has no suite of its own; there are {', '.join(NAMES[:-1])}.")


def _overrides(command: _Evaluate, config: TrainConfig) -> Overrides:
    seed = config.eval.seed if command.seed is None else command.seed
    eta = command.eta if command.sampler == DDIM else 0.0
    return Overrides(seed, command.steps, eta, command.guidance, command.size)


def _output(command: _Evaluate, folder: Path | None) -> Path:
    """Where results go; it need not exist yet."""
    if command.output:
        output = command.output
    elif folder:
        average = "-ema" if command.weights == "ema" else ""
        output = Path(command.run) / "evaluation" / f"{folder.name}{average}"
    else:
        name = re.sub(r"[^\w.-]+", "-", f"{command.model} {command.unet}".strip()).strip("-.") or "model"
        output = Path("evaluations") / name
    if (output / "config.toml").is_file():
        raise ConfigError(
            f"--output {output}: that is a run, whose evaluation.json is its training's; give another folder."
        )
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    check_writable(f"--output {output}", existing)
    return output


def _device(command: _Evaluate, ranks: Ranks) -> torch.device:
    if ranks.count > 1:
        return ranks.device
    if command.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device here; accepted are auto and cpu.")
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if command.device == "auto" else command.device
    )


def _dtype(command: _Evaluate, device: torch.device) -> str:
    return ("bf16" if device.type == "cuda" else "fp32") if command.dtype == "auto" else command.dtype


def _stages(command: _Evaluate, config: TrainConfig, folder: Path | None, device: torch.device) -> list[_Stage]:
    """The models, loaded: of a run the base model and the trained one, which share all but the UNet."""
    dtype = _DTYPES[_dtype(command, device)]
    workers = available_cores() if device.type == "cpu" else 1
    if folder is None:
        policy = load_policy(config.model, device, dtype, workers).rounded()
        return [_Stage(ALONE, " with the UNet of ".join(filter(None, (command.model, command.unet))), policy)]
    with blaming_config(Path(command.run)):
        policy = load_policy(config.model, device, dtype, workers)
        tuned = replace(policy, unet=copy.deepcopy(policy.unet))
        load_unet(tuned.unet, folder, command.weights, config.model)
    name = f"{folder.parent.parent.resolve().name}/{folder.name}, {command.weights}"
    return [_Stage(BEFORE, config.model.path, policy.rounded()), _Stage(AFTER, name, tuned.rounded())]


def _work(
    command: _Evaluate,
    suites: Sequence[Suite],
    scorers: dict[str, Scorer | None],
    stages: Sequence[_Stage],
    output: Path,
) -> list[Work]:
    dtype = _dtype(command, stages[0].policy.device)
    hashes = {stage.name: model_hashes(stage.policy) for stage in stages}
    work = []
    for suite in suites:
        check_sizes(stages[0].policy, suite.wanted)
        folders = {}
        for stage in stages:
            model, batch = (stage.model, hashes[stage.name]), command.batch
            drawing = Drawing(*model, suite.steps, suite.eta, dtype, batch, command.sampler)
            folders[stage.name] = ImageFolder(output / stage.name / suite.folder, drawing, suite.wanted)
        work.append(Work(suite, scorers[suite.name], folders))
    return work


def _claim(work: Sequence[Work], command: _Evaluate, output: Path) -> None:
    """Make the folders, none of them where one holds something else."""
    folders = [folder for each in work for folder in each.folders.values()]
    outcome.earlier(output, _drawings(work))
    for folder in folders:
        folder.check()
    if command.missing == "refuse":
        _say_missing(command, work)
    os.makedirs(output, exist_ok=True)
    for folder in folders:
        folder.claim()


def _drawings(work: Sequence[Work]) -> dict[str, Drawing]:
    """How each stage's images are drawn, by any suite: it names the stage's model."""
    return {name: folder.drawing for name, folder in work[0].folders.items()}


def _draw(
    command: _Evaluate,
    work: Sequence[Work],
    stages: Sequence[_Stage],
    schedules: dict[str, Schedule],
    part: Part,
    console: Console,
) -> None:
    """Draw what is missing of this process's part."""
    if command.sampler != DDIM:
        torch.set_num_threads(available_cores())  # diffusers' pipelines have no workers
    for stage in stages:
        draw(stage.name, stage.policy, work, command.sampler, schedules, console, part)


def _say_drawn(command: _Evaluate, work: Sequence[Work], console: Console) -> None:
    missing = sum(len(folder.missing()) for each in work for folder in each.folders.values())
    rest = f"{missing} images of other parts are missing here" if missing else "all images are there"
    console.say(
        f"shard {command.shard} is drawn; {rest}: when they lie here, the same command without --shard scores them"
    )


def _say_missing(command: _Evaluate, work: Sequence[Work]) -> None:
    """Raise ConfigError where images are missing that are not to be skipped, or where there is none at all."""
    for each in work:
        for folder in each.folders.values():
            missing = folder.missing()
            if missing and (command.missing != "skip" or len(missing) == len(folder.wanted)):
                few = ", ".join(row.id for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
                raise ConfigError(
                    f"{folder.path}: {len(missing)} of {len(folder.wanted)} images are missing ({few}); --missing draw "
                    "draws them, and --missing skip scores the others."
                )


if __name__ == "__main__":
    sys.exit(main())
