"""Ctrl-C while a command's first modules are imported, before it can catch anything: a sentence, no traceback."""

import os
import sys
from types import TracebackType


def answer_in_a_sentence() -> None:
    """Show an interrupt as a sentence where Python was started for one of fastgrpo's commands, and only there."""
    given, program = sys.orig_argv, sys.argv[:1]
    # While the package of what -m names is imported, "-m" stands for the program's name.
    module = given[given.index("-m") + 1] if program == ["-m"] and "-m" in given else ""
    script = program != [] and os.path.basename(program[0]) == "fastgrpo"
    if script or module == "fastgrpo" or module.startswith("fastgrpo."):
        sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("fastgrpo: stopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
