"""Standard output and error that stop no command, neither by lacking a character nor by going away."""

import codecs
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# What stands for the characters that the program itself shows. Most have one column, so that tables stay aligned.
_SUBSTITUTES = (
    {"→": "->", "±": "+-", "●": "*", "○": "o", "×": "x", "·": ".", "…": "~", "–": "-", "—": "-", "’": "'"}
    | dict(zip("▁▂▃▄▅▆▇█", "_..-=+*#", strict=True))
    | dict(zip("─━│┃┬┼┴├┤╭╮╰╯╸╺", "--||+++++++++--", strict=True))
)
_SUBSTITUTE = "fastgrpo.substitute"


def substitute(error: UnicodeError) -> tuple[str | bytes, int]:
    """A handler for `codecs`: replace the first character that cannot be encoded; a byte of a file's name stays."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, after = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), after
    return _SUBSTITUTES.get(character, "?"), after


codecs.register_error(_SUBSTITUTE, substitute)


@contextmanager
def steady_output() -> Iterator[None]:
    """Let the block print: what cannot be shown is substituted, and what nobody reads any more is dropped.

    So a command whose reader (`| head`) or terminal has gone away goes on to its end in silence.
    """
    _fill_standard_files()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_steady, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def say_in_handler(text: str) -> None:
    """Write to standard error from a signal handler, where print may find the stream half written."""
    with suppress(OSError):
        os.write(2, text.encode("ascii", _SUBSTITUTE))


class _Unfailing(io.RawIOBase):
    """A stream that writes to a file's descriptor and drops what cannot be written."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # some program that shares the pipe made it so; it is only full
                select.select([], [self._descriptor], [])
            except OSError:
                return memoryview(data).nbytes


def _steady(stream: TextIO | None) -> TextIO:
    """Make a stream steady; one that is no file, such as a test's, is returned as it is."""
    if stream is None or stream.closed:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        with suppress(OSError):
            stream.flush()
        raw = _Unfailing(stream.fileno(), stream.name)
    except (AttributeError, ValueError):  # the latter is what io.UnsupportedOperation is
        return stream
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, _SUBSTITUTE, line_buffering=True)


def _fill_standard_files() -> None:
    """Put the null device in place of closed standard files, lest the next file to be opened gets what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
