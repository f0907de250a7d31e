"""`python -m fastgrpo.export RUN`: the command line of exporting; run/export.py does it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.run.find import find_checkpoint, local_run, read_run
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.commands import Export
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError, require
from fastgrpo.system.files import check_new_file, check_new_folder, check_writable
from fastgrpo.system.shared_run import is_repository

if TYPE_CHECKING:
    from fastgrpo.run.card import Card

PROGRAM = "python -m fastgrpo.export"
_SUFFIX = ".safetensors"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Export as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """
    exported: list[Callable[[], int]] = []

    def command() -> None:
        asked = parse_flags(Export, sys.argv[1:] if argv is None else argv, program)
        asked = replace(asked, run=local_run(asked.run))
        config = read_run(asked.run)
        _check(asked, config)
        folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
        from fastgrpo.run.export import export  # only now: it takes seconds

        card = export(asked, config, folder, Console())
        if asked.push:
            exported.append(lambda: _push(asked, card, folder))

    code = run_command(command, "nothing was exported")
    return exported[0]() if exported else code


def _push(asked: Export, card: "Card", folder: Path) -> int:
    """Upload the finished export of the checkpoint in `folder`. Returns the exit code, as `main`."""
    from fastgrpo.run.upload import upload

    undone = f"nothing was uploaded, and the export stays in {asked.output}"
    return run_command(lambda: upload(asked, card, folder, Console()), undone)


def _check(command: Export, config: TrainConfig) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    output = command.output
    if command.format == "lora" and not config.model.lora_rank:
        why = f"{command.run} trained the whole UNet and has no adapters; accepted are diffusers and single-file"
        raise ConfigError.of("--format", "lora", why)
    if command.layout == "kohya" and command.format != "lora":
        raise ConfigError.of(
            "--layout", "kohya", f"a layout of adapters, not of {command.format}; accepted is diffusers"
        )
    fitting = not command.is_file or output.suffix == _SUFFIX
    require(fitting, "--output", output, f"the name of a file that ends in {_SUFFIX}")
    (check_new_file if command.is_file else check_new_folder)("--output", output)
    check_writable(f"--output {output}", Path(os.path.abspath(output)).parent)
    for flag, given in (("--public", command.public), ("--with-checkpoint", command.with_checkpoint)):
        if given and not command.push:
            raise ConfigError(f"{flag}: nothing is uploaded; it is accepted beside --push OWNER/NAME.")
    if command.push:
        what = "OWNER/NAME, both of letters, digits, -, _ and ., without -- and .., such as me/safer-sd15"
        require(is_repository(command.push), "--push", command.push, what)
        from huggingface_hub import get_token  # only now: other exports do without

        if not get_token():
            why = "there is no token for the Hugging Face hub; `hf auth login` or HF_TOKEN gives one"
            raise ConfigError.of("--push", command.push, why)


if __name__ == "__main__":
    sys.exit(main())
