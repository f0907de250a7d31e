"""Text files as people's editors and spreadsheets write them: UTF-8 with or without a byte order mark, any line ends."""

import os
from pathlib import Path

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",  # begins with UTF-16's, so it is looked for first
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class NoText(ValueError):
    """A file's bytes are no UTF-8 text. The message is what follows the file's name in a sentence."""


def read_text(path: str | os.PathLike[str]) -> str:
    r"""The content of a text file, without a byte order mark, every line end a "\n" (Windows' is "\r\n", old Macs' "\r").

    Raises OSError where it cannot be read, and NoText where it is in another encoding or no text at all.
    """
    data = Path(path).read_bytes()
    if encoding := _other_encoding(data):
        raise NoText(f"is {encoding}; save it as UTF-8")
    if b"\0" in data:
        raise NoText(f"is binary, with a NUL byte in line {_line(data, data.index(0))}; UTF-8 text is needed")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
        raise NoText(
            f"is not UTF-8: byte 0x{data[start]:02x} in line {_line(data, start)}, offset {start} of the file; save it "
            "as UTF-8"
        ) from error
    return _one_kind_of_line_end(text.removeprefix("\ufeff"))


def _other_encoding(data: bytes) -> str:
    """UTF-16 or UTF-32 where the file says or shows that it is; else empty."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    # Without a mark: of Latin letters every other byte is 0.
    begin = data[: min(len(data), 1000) // 2 * 2]
    even, odd = begin[0::2], begin[1::2]
    sparse, full = sorted((even.count(0), odd.count(0)))
    return "UTF-16" if len(even) >= 2 and sparse == 0 and full > 0.7 * len(even) else ""


def _line(data: bytes, offset: int) -> int:
    """The number, from 1, of the line that a byte is in."""
    return _one_kind_of_line_end(data[:offset].decode("latin-1")).count("\n") + 1


def _one_kind_of_line_end(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
