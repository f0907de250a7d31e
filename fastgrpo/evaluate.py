"""`python -m fastgrpo.evaluate [RUN]`, and the same from Python; run/evaluate.py does it."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.run.find import find_checkpoint, local_run, read_run
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.commands import Evaluate
from fastgrpo.settings.schema import DIFFUSION_STEPS, ModelConfig, PromptsConfig, TrainConfig
from fastgrpo.settings.suites import DDIM, NAMES, SUITES
from fastgrpo.settings.toml import find_preset, from_settings, load_toml
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError, nearest, require, require_between
from fastgrpo.system.files import check_writable
from fastgrpo.system.launch import read_launch

if TYPE_CHECKING:
    from fastgrpo.run.evaluate import Evaluation

PROGRAM = "python -m fastgrpo.evaluate"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Evaluate as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_flags(Evaluate, sys.argv[1:] if argv is None else argv, program)
        if asked.compare:
            from fastgrpo.run.evaluate import compare_folders

            compare_folders(asked.compare, asked.output or Path("."), Console())
            return
        _evaluate(asked)

    return run_command(command, "images that were drawn are kept, and the same command goes on from there")


def evaluate_model(
    run: str | Path = "",
    *,
    model: str | Path = "shapes",
    suites: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
) -> "Evaluation":
    """Measure a run, before and after, or any model by any suite, as `fastgrpo evaluate` does.

        from fastgrpo import evaluate_model

        found = evaluate_model("runs/NAME", settings={"shapes.unsafe_per_category": 5})
        print(found.table("shapes", "unsafe")["after"]["overall"])

    run: its folder, or hf:OWNER/NAME; without one, the model: an SD 1.x / 2.x pipeline's folder, hub id or single file,
    or "shapes". suites: names as of --suites; none is `shapes`, for the model of that name. settings: the command's
    other flags by GROUP.NAME, as in {"steps": 20, "i2p.images": 1}. output: folder of images and results, new or begun,
    as --output. quiet: nothing on the terminal but warnings.
    Where torchrun starts the program, its processes share the work, and the first has the results.
    Raises ConfigError for what cannot be, before anything is drawn where that is possible; OSError where something
    cannot be written; BrokenPicture for an image that is not finite.
    """
    if isinstance(suites, str):
        raise ConfigError(f"suites = {suites!r}: accepted is a list of names, also of one.")
    places = {"output": None if output is None else Path(output), "compare": None, "shard": ""}
    asked = from_settings(Evaluate, settings, run=str(run), model=str(model), suites=tuple(suites), **places)
    from fastgrpo.system.workers import threads_kept

    with threads_kept():
        return _evaluate(asked, quiet)


def _evaluate(asked: Evaluate, quiet: bool = False) -> "Evaluation":
    _check(asked)
    if asked.run:
        asked = replace(asked, run=str(local_run(asked.run)))
    config = _config(asked)
    names = _names(asked, config)
    folder = find_checkpoint(Path(asked.run), asked.checkpoint, asked.weights) if asked.run else None
    output = _output(asked, folder)
    read_launch()
    from fastgrpo.run.evaluate import start  # only now: it takes seconds

    return start(asked, config, names, folder, output, quiet)


def _check(command: Evaluate) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    require_between(1, math.inf, "--batch", command.batch)
    require_between(1, math.inf, "--guidance", command.guidance)
    require_between(1, DIFFUSION_STEPS, "--steps", command.steps)
    require_between(0, 2**63 - 1, "--seed", command.seed)
    require_between(0, math.inf, "--size", command.size)
    require_between(0, 1, "--eta", command.eta)
    if command.eta and command.sampler != DDIM:
        raise ConfigError(f"--eta {command.eta}: {command.sampler} is deterministic; accepted is 0, or --sampler ddim.")
    index, count = command.part
    require(1 <= index <= count, "--shard", command.shard, "I/N with I from 1 to N, such as 2/4")
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
    if command.checkpoint != "latest" or command.weights != "trained":
        raise ConfigError("--checkpoint and --weights belong to a run; give its folder first, or leave them out.")
    chosen = {name: getattr(command, name) for name in own if name != "model"}
    preset, model = load_toml(find_preset("shapes")), ModelConfig(path=command.model, **chosen)
    return replace(preset, model=model, prompts=PromptsConfig())  # nothing is known of what it was trained on


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
        why = "that is a run, whose evaluation.json is its training's; give another folder"
        raise ConfigError.of("--output", output, why)
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    check_writable(f"--output {output}", existing)
    return output


if __name__ == "__main__":
    sys.exit(main())
