"""`python -m fastgrpo.report RUN`: the command line of the report; run/page.py writes it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastgrpo.settings.command_line import parse_flags
from fastgrpo.system.console import run_command

PROGRAM = "python -m fastgrpo.report"


@dataclass(frozen=True)
class Report:
    """Write a run's results to RUN/report.html, a page that opens offline."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, finished or not."""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Report as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_flags(Report, sys.argv[1:] if argv is None else argv, program)
        from fastgrpo.run.page import write_report  # only now: it takes half a second

        print(write_report(asked.run))

    return run_command(command, "no report was written")


if __name__ == "__main__":
    sys.exit(main())
