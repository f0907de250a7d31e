"""`python -m fastgrpo.report RUN`: the command line of the report; run/page.py writes it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastgrpo.run.page import write_report
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.system.console import run_command

PROGRAM = "python -m fastgrpo.report"


@dataclass(frozen=True)
class _Report:
    """Write a run's results to RUN/report.html, a page that opens offline."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, finished or not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Report as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        print(write_report(parse_flags(_Report, sys.argv[1:] if argv is None else argv, PROGRAM).run))

    return run_command(command, "no report was written")


if __name__ == "__main__":
    sys.exit(main())
