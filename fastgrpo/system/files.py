"""Files: written so that a kill or a power cut leaves the old content or the whole new one, and read as text.

Text is what editors and spreadsheets write: UTF-8 with or without a byte order mark, with any line ends.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fastgrpo.system.errors import ConfigError

# Some file systems cannot make a file durable, and CIFS, vboxsf and others no folder, which some do not even open.
# Nothing can be done about it, and everything else works there.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_FOLDER_SYNC = _NO_SYNC | {errno.EACCES, errno.EBADF, errno.EISDIR, errno.EPERM}

PARTIAL_SUFFIX = ".partial"
"""Ends the name of what is still being written."""

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",  # begins with UTF-16's, so it is looked for first
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name `path` where it names no file, as those of a write or an fsync."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a block raises over the content of the file `path` into a ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder, which appears at `path` once the block has written all of it.

    What a killed process left there is removed first. A file at `path` is replaced, a folder must be empty.
    Raises OSError, which names a path, where something cannot be written; then `path` is as it was.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    remove(partial)
    try:
        with naming(path):
            yield partial
            sync_tree(partial)
            os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
    finally:
        with suppress(OSError):
            remove(partial)  # on a full disk it would be in the way of everything else
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds `data`; a reader sees the old file or the whole new one.

    Raises OSError, which names a path, where it cannot be written; then nothing is left beside the old file.
    """
    write_all_atomically({path: data})


def write_all_atomically(files: Mapping[Path, bytes]) -> None:
    """Write files of one folder, each as `write_atomically` does, but ten times as fast where there are many."""
    partials = {path: path.with_name(path.name + PARTIAL_SUFFIX) for path in files}
    try:
        for path, data in files.items():
            with naming(path):
                partials[path].write_bytes(data)
        for path, partial in partials.items():
            with naming(path), open(partial, "rb+") as file:
                sync(file.fileno())
            os.replace(partial, path)
    except OSError:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
        raise
    for folder in {path.parent for path in files}:
        sync_folder(folder)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; one that is not there is no error."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(descriptor: int) -> None:
    """Make what was written to an open file durable, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable, where the file system can."""
    try:
        with naming(folder):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_tree(path: Path) -> None:
    """Make a file, or all of a folder, durable, where the file system can."""
    for each in [*path.rglob("*"), path]:
        if each.is_dir():
            sync_folder(each)
        else:
            with naming(each), open(each, "rb+") as file:
                sync(file.fileno())


def visible_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files in a folder and those below it, also behind links, but for names that begin with a dot.

    Such are macOS's `._x.png`, which is no image, beside a copied `x.png`, and notebooks' `.ipynb_checkpoints`.
    above: the folders that this one is in, without links, since a link may lead back to one of them.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from visible_files(Path(entry.path), (*above, real))
        else:
            yield Path(entry.path)


def check_new_file(flag: str, path: Path) -> None:
    """Raise ConfigError, naming the `flag` that asks for it, where writing `path` would replace something."""
    if path.exists():
        raise ConfigError(f"{flag} {path}: it is there already; accepted is a new file.")


def check_new_folder(flag: str, path: Path) -> None:
    """Raise ConfigError, naming the `flag` that asks for it, for a folder that is there and not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{flag} {path}: it is there already; accepted is a folder that is new or empty.")


def check_writable(flag: str, folder: Path) -> None:
    """Raise ConfigError, naming the `flag` that asks for it, where no file can be made in `folder`."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{flag}: cannot write in {str(folder)!r} ({error.strerror}); accepted is a place in a folder that exists "
            "and can be written."
        ) from error


def require_room(path: Path, needed: int) -> None:
    """Raise OSError, which names `path`, where the disk that it is to be written to has fewer than `needed` bytes left.

    A file system that does not say how large it is, as some on networks, counts as one with room.
    """
    folder = next(each for each in path.absolute().parents if each.is_dir())
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return
    if disk.total and disk.free < needed:
        sizes = f"{_size(needed)} are needed and {_size(disk.free)} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {sizes}", str(path))


def _size(count: int) -> str:
    """A number of bytes, such as "3.44 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class NoText(ValueError):
    """A file's bytes are no UTF-8 text. The message is what follows the file's name in a sentence."""


def read_text(path: str | os.PathLike[str]) -> str:
    r"""The content of a text file, without a byte order mark and with "\n" for Windows' and old Macs' line ends.

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
    """UTF-16 or UTF-32 where the file's mark or content shows that; else empty."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    begin = data[: min(len(data), 1000) // 2 * 2]
    even, odd = begin[0::2], begin[1::2]  # without a mark: of Latin letters every other byte is 0
    sparse, full = sorted((even.count(0), odd.count(0)))
    return "UTF-16" if len(even) >= 2 and sparse == 0 and full > 0.7 * len(even) else ""


def _line(data: bytes, offset: int) -> int:
    """The number, from 1, of the line that a byte is in."""
    return _one_kind_of_line_end(data[:offset].decode("latin-1")).count("\n") + 1


def _one_kind_of_line_end(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
