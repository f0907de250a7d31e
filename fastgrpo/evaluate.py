"""`python -m fastgrpo.evaluate [RUN]`: the command line of evaluating; commands/evaluate.py does it."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgrpo.config import DIFFUSION_STEPS, ModelConfig, TrainConfig
from fastgrpo.console import Console, run_command
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.evaluation.settings import DDIM, NAMES, SUITES, AllSettings, SamplerName
from fastgrpo.launch import read_launch
from fastgrpo.paths import PathText
from fastgrpo.runs import Weights, check_writable, find_checkpoint, read_run
from fastgrpo.settings import find_preset, load_toml, parse_flags

PROGRAM = "python -m fastgrpo.evaluate"


@dataclass(frozen=True)
class Evaluate(AllSettings):
    """Draw the prompts of one suite or several, have the images judged, and print the numbers beside the published ones.

    Images are kept, and a run that was stopped goes on where it was. With a RUN both its base model (before) and its
    trained one (after) are evaluated on the same prompts and seeds; otherwise the model of --model alone.
    """

    run: Annotated[tyro.conf.Positional[PathText], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run, finished or not; without it, --model."""
    suites: tuple[str, ...] = ()
    """What to measure: i2p, nudity, geneval, clip-score, fid, attacks, custom, shapes. Empty: shapes, for the model of that name."""
    model: PathText = "shapes"
    """Without a RUN: an SD 1.x / 2.x pipeline, a diffusers folder, a hub id, a single file, or `shapes`."""
    unet: PathText = ""
    """Another UNet for --model: a folder or hub id, and after a colon its subfolder, as in `OWNER/NAME:checkpoint-300/unet`; or a file of its tensors, all or those that were tuned (.safetensors, .pt, .pth, .bin, .ckpt)."""
    config: PathText = ""
    """Only where --model is a single file: diffusers folder or hub id whose configs describe it; empty: SD 1.x or 2.x, told from the file."""
    variant: str = ""
    """Variant of --model's weight files, such as `fp16`."""
    revision: str = ""
    """Branch, tag or commit of --model, a hub id."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What --model's UNet predicts; `auto` believes its scheduler's config or, of a single file, what the file says of itself. A file of SD 2.x that says nothing needs it: `epsilon` for those of 512 pixels, `v_prediction` for those of 768."""
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

    @property
    def part(self) -> tuple[int, int]:
        """I and N of --shard; 0 of 0 where it is neither empty nor I/N."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        return (int(match[1]), int(match[2])) if match else (0, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        asked = parse_flags(Evaluate, sys.argv[1:] if argv is None else argv, PROGRAM)
        if asked.compare:
            from fastgrpo.commands.evaluate import compare_folders

            compare_folders(asked, Console())
            return
        _check(asked)
        config = _config(asked)
        names = _names(asked, config)
        folder = find_checkpoint(Path(asked.run), asked.checkpoint, asked.weights) if asked.run else None
        output = _output(asked, folder)
        read_launch()
        from fastgrpo.commands.evaluate import start  # only now: it takes seconds

        start(asked, config, names, folder, output)

    return run_command(command, "images that were drawn are kept, and the same command goes on from there")


def _check(command: Evaluate) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
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
    index, count = command.part
    if not 1 <= index <= count:
        raise ConfigError(f"--shard {command.shard}: accepted is I/N with I from 1 to N, such as 2/4.")
    if command.shard and command.missing != "draw":
        raise ConfigError(f"--missing {command.missing}: a shard only draws; accepted is draw.")


def _config(command: Evaluate) -> TrainConfig:
    """The run's, or that of preset `shapes` with the model of --model."""
    own = {"model": "shapes", "unet": "", "config": "", "variant": "", "revision": "", "prediction_type": "auto"}
    if command.run:
        given = next((name for name, default in own.items() if getattr(command, name) != default), None)
        if given:
            raise ConfigError(f"--{given.replace('_', '-')}: {command.run} says what its model is; accepted is either.")
        return read_run(Path(command.run))
    if command.checkpoint is not None or command.weights != "trained":
        raise ConfigError("--checkpoint and --weights belong to a run; give its folder first, or leave them out.")
    chosen = {name: getattr(command, name) for name in own if name != "model"}
    return replace(load_toml(find_preset("shapes")), model=ModelConfig(path=command.model, **chosen))


def _names(command: Evaluate, config: TrainConfig) -> tuple[str, ...]:
    for name in command.suites:
        if name not in NAMES:
            raise ConfigError(f"--suites {name}: no such suite{nearest(name, NAMES)}; there are {', '.join(NAMES)}.")
        if command.suites.count(name) > 1:
            raise ConfigError(f"--suites: {name} is named twice; accepted is every suite once.")
    if command.suites:
        return command.suites
    if config.model.path == "shapes":
        return ("shapes",)
    raise ConfigError(f"--suites: {config.model.path!r} has no suite of its own; there are {', '.join(SUITES)}.")


def _output(command: Evaluate, folder: Path | None) -> Path:
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


if __name__ == "__main__":
    sys.exit(main())
