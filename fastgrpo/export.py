"""`python -m fastgrpo.export RUN`: the command line of exporting; run/export.py does it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.run.find import find_checkpoint, read_run
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.commands import Export
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError, require
from fastgrpo.system.files import check_new_file, check_new_folder, check_writable

PROGRAM = "python -m fastgrpo.export"
_SUFFIX = ".safetensors"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Export as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_flags(Export, sys.argv[1:] if argv is None else argv, program)
        config = read_run(asked.run)
        _check(asked, config)
        folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
        from fastgrpo.run.export import export  # only now: it takes seconds

        export(asked, config, folder, Console())

    return run_command(command, "nothing was exported")


def _check(command: Export, config: TrainConfig) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    output = command.output
    if command.format == "lora" and not config.model.lora_rank:
        why = f"{command.run} trained the whole UNet and has no adapters; accepted are diffusers and single-file"
        raise ConfigError.of("--format", "lora", why)
    fitting = command.format != "single-file" or output.suffix == _SUFFIX
    require(fitting, "--output", output, f"the name of a file that ends in {_SUFFIX}")
    (check_new_file if command.format == "single-file" else check_new_folder)("--output", output)
    check_writable(f"--output {output}", Path(os.path.abspath(output)).parent)


if __name__ == "__main__":
    sys.exit(main())
