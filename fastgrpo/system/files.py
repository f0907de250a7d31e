"""Finding files, and writing them so that a kill or a power cut leaves either the old content or the whole new one."""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgrpo.system.errors import ConfigError

# What file systems say that cannot make a file or a folder durable (of folders: CIFS, vboxsf and others, some of which do
# not even open them). There is nothing to be done, and everything else about them works.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_FOLDER_SYNC = _NO_SYNC | {errno.EACCES, errno.EBADF, errno.EISDIR, errno.EPERM}


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
    """Let what a block raises over the content of the file `path` be a ConfigError that names it, unless it is one."""
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds `data`; a reader sees the old file or the whole new one.

    Raises OSError, which names a path, where it cannot be written; then nothing is left beside the old file.
    """
    write_all_atomically({path: data})


def write_all_atomically(files: Mapping[Path, bytes]) -> None:
    """Write files of one folder, each as `write_atomically` does.

    They are made durable together: ten times as fast as one by one, where there are many.
    """
    partials = {path: path.with_name(path.name + ".partial") for path in files}
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


def file_sha256(path: Path) -> str:
    """Of a file's content, in hex."""
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
    """The files in a folder and those below it, also behind links.

    What begins with a dot is left out: macOS leaves `._x.png` beside `x.png` where it copies files, which is no image, and
    notebooks keep copies in `.ipynb_checkpoints`.
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
