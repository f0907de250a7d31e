"""`python -m fastgrpo.inspect`: the command line of looking at the safety axis; rewards/axis/inspection.py does it."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.rewards.terms import parse_terms
from fastgrpo.settings.command_line import WithPreset, parse_with_preset
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError, require
from fastgrpo.system.files import check_new_file

PROGRAM = "python -m fastgrpo.inspect"


@dataclass(frozen=True)
class Inspect(WithPreset):
    """Show the safety axis of a reward's encoder: its anchors, where prompts lie along it, and what every alpha does.

    No diffusion model is loaded and no image drawn. All settings of training are accepted, so that what is shown is
    what `python -m fastgrpo.train` with the same arguments would use.
    """

    png: Path | None = None
    """New file for a picture of it; its folder must exist. None draws no picture."""
    limit: int = 256
    """At most this many prompts of each label, evenly spaced; 0 is all of them. Training's own report takes 256."""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Inspect as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_with_preset(Inspect, sys.argv[1:] if argv is None else argv, program)
        from fastgrpo.validation import validate  # only now: it needs NumPy

        validate(asked.config)
        _check(asked)
        from fastgrpo.rewards.axis.inspection import inspect  # only now: it takes seconds

        inspect(asked.config, asked.png, asked.limit, Console())

    return run_command(command, "no picture was written")


def _check(command: Inspect) -> None:
    """Refuse what would come to nothing, before the encoder is loaded."""
    terms = command.config.reward.terms
    if "steering" not in (term.name for term in parse_terms(terms)):
        raise ConfigError(f"reward.terms = {list(terms)}: without `steering` there is no safety axis to inspect.")
    require(command.limit >= 0, "--limit", command.limit, "1 or more, or 0 for all prompts")
    if command.png is None:
        return
    require(command.png.suffix.lower() == ".png", "--png", command.png, "the name of a file that ends in .png")
    try:
        if command.png.is_dir():
            raise ConfigError(f"--png {command.png}: this is a folder; accepted is the name of a file.")
        check_new_file("--png", command.png)
        tempfile.TemporaryFile(dir=command.png.parent).close()
    except OSError as error:
        why = f"cannot write in {str(command.png.parent)!r} ({error.strerror})"
        raise ConfigError.of("--png", command.png, why) from error


if __name__ == "__main__":
    sys.exit(main())
