"""`python -m fastgrpo.train`: the command line of training; training.py does it."""

import sys
from collections.abc import Sequence

from fastgrpo.settings.command_line import parse_command
from fastgrpo.system.console import run_command
from fastgrpo.system.launch import read_launch
from fastgrpo.validation import validate


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns 0 when done, 1 failed, 2 refused, 3 or 128 + n stopped.

    3: by the guard; n: by signal n.
    """

    def command() -> int:
        config, preset, resumed = parse_command(sys.argv[1:] if argv is None else argv)
        validate(config)
        read_launch()
        from fastgrpo.training import start  # only now: it takes seconds

        return start(config, preset, resumed)

    return run_command(command, "no iteration was begun")


if __name__ == "__main__":
    sys.exit(main())
