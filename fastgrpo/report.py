"""`python -m fastgrpo.report RUN [RUN ...]`: the command line of the report; run/page/ writes it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastgrpo.settings.command_line import parse_flags
from fastgrpo.system.console import run_command
from fastgrpo.system.errors import ConfigError

PROGRAM = "python -m fastgrpo.report"


@dataclass(frozen=True)
class Report:
    """Write what runs have come to, finished or not, to a page that opens offline."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Folders of the runs, one or up to eight to compare."""
    output: Path | None = None
    """The page's file, which is replaced. None is RUN/report.html of one run, and report.html in the folder that all
    of several are in."""
    watch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on until the training ends or Ctrl-C: the page is written again whenever there is something new, and reads
    itself again in the browser, where the reader is."""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Report as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> int:
        asked = parse_flags(Report, sys.argv[1:] if argv is None else argv, program)
        if not asked.runs:
            raise ConfigError(f"Missing from {program}: RUN [RUN ...], folders of runs; --help lists every flag.")
        _check(asked.output)
        if asked.watch:
            from fastgrpo.run.watch import watch  # only now: it takes half a second

            return 0 if watch(asked.runs, asked.output) else 130
        from fastgrpo.run.page.document import write_report

        print(write_report(*asked.runs, output=asked.output))
        return 0

    return run_command(command, "no report was written")


def _check(output: Path | None) -> None:
    """Refuse a place where no page can be written."""
    if output is None:
        return
    if output.is_dir():
        raise ConfigError(f"--output {output}: this is a folder; accepted is the name of a file.")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; accepted is a place in one that is.")


if __name__ == "__main__":
    sys.exit(main())
