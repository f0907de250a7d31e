"""Ctrl-C while a command's first modules are imported: before it can catch anything itself, `python -m fastgrpo.train` shows one
sentence and no traceback."""

import sys
from types import TracebackType


def answer_in_a_sentence() -> None:
    """Where one of fastgrpo's commands is what Python was started for; in any other program nothing changes."""
    given = sys.orig_argv
    # While the package of what -m names is imported, "-m" stands for the program's name.
    if sys.argv[:1] == ["-m"] and "-m" in given and given[given.index("-m") + 1].startswith("fastgrpo."):
        sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("fastgrpo: stopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
