"""`python -m fastgrpo.train`: the command line of training; training.py does it."""

import sys
from collections.abc import Sequence

from fastgrpo.settings.command_line import PROGRAM, parse_command
from fastgrpo.settings.toml import run_config
from fastgrpo.system.console import run_command
from fastgrpo.system.launch import read_launch


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Train as the command line says. program: what --help calls the command.

    Returns 0 when done, 1 failed, 2 refused, 3 or 128 + n stopped. 3: by the guard; n: by signal n.
    """

    def command() -> int:
        config, preset, resumed, instead = parse_command(sys.argv[1:] if argv is None else argv, program)
        from fastgrpo.validation import validate  # only now: it needs NumPy

        validate(config)
        launch = read_launch()
        if instead == "print-config":
            print(run_config(config) if launch.index == 0 else "", end="")
            return 0
        if launch.index == 0:  # the others log nothing
            from fastgrpo.run.logs.registry import check_sinks

            check_sinks(config.log)
        # Only now: these take seconds.
        if instead == "dry-run":
            from fastgrpo.run.dry_run import dry_run

            return dry_run(config, preset, resumed)
        from fastgrpo.training import start

        return start(config, preset, resumed)

    return run_command(command, "no iteration was begun")


if __name__ == "__main__":
    sys.exit(main())
