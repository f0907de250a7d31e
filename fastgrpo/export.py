"""`python -m fastgrpo.export RUN`: the command line of exporting; commands/export.py does it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgrpo.config import TrainConfig
from fastgrpo.console import Console, run_command
from fastgrpo.errors import ConfigError
from fastgrpo.runs import Weights, check_new_file, check_new_folder, check_writable, find_checkpoint, read_run
from fastgrpo.settings import parse_flags

PROGRAM = "python -m fastgrpo.export"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Export:
    """Write the Stable Diffusion that a run trained, complete or as adapters, in a form that other programs load."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, finished or not."""
    format: Literal["diffusers", "single-file", "lora"]
    """`diffusers`, a complete pipeline folder; `single-file`, a .safetensors file in the original layout of SD 1.x / 2.x; `lora`, for runs with adapters, a folder with these alone."""
    output: Path
    """Where to write it: a folder that is new or empty, or a new file for `single-file`."""
    checkpoint: int | None = None
    """Iteration of the checkpoint to take; None is the newest."""
    weights: Weights = "trained"
    """`trained`, or `ema`, the moving average that runs with optim.ema keep."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of what is written; training is in fp32."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        asked = parse_flags(Export, sys.argv[1:] if argv is None else argv, PROGRAM)
        config = read_run(asked.run)
        _check(asked, config)
        folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
        from fastgrpo.commands.export import export  # only now: it takes seconds

        export(asked, config, folder, Console())

    return run_command(command, "nothing was exported")


def _check(command: Export, config: TrainConfig) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    output = command.output
    if command.format == "lora" and not config.model.lora_rank:
        raise ConfigError(
            f"--format lora: {command.run} trained the whole UNet and has no adapters; accepted are diffusers and "
            "single-file."
        )
    if command.format == "single-file" and output.suffix != _SUFFIX:
        raise ConfigError(f"--output {output}: accepted is the name of a file that ends in {_SUFFIX}.")
    (check_new_file if command.format == "single-file" else check_new_folder)("--output", output)
    check_writable(f"--output {output}", Path(os.path.abspath(output)).parent)


if __name__ == "__main__":
    sys.exit(main())
