"""All that a run has written so far, in one file: a .tar.gz that is whole at any time."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

MOST = 2 * 2**20
"""Bytes of a file that are kept: of longer ones the end, which is what a log is read for."""


def pack(folder: Path, archive: Path) -> None:
    """Write the archive anew, with the files of the folder as they are now, and see it onto the disk.

    The one before stays until the new one is whole. Raises OSError.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with part.open("wb") as file:
        # A file that grows while it is read would break the archive: each is read first.
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for path in sorted(path for path in folder.rglob("*") if path.suffix != ".part"):
                try:
                    content, changed = _end_of(path), path.stat().st_mtime
                except (FileNotFoundError, IsADirectoryError):
                    continue
                except OSError as error:  # one file must not cost the others
                    content, changed = f"could not be read: {error}".encode(), 0
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size, entry.mtime = len(content), int(changed)
                tar.addfile(entry, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    part.replace(archive)


def unpack(archive: Path) -> Mapping[str, bytes]:
    """Name -> content. Raises OSError, and tarfile.TarError where it is none."""
    with tarfile.open(archive, "r:gz") as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar.getmembers() if entry.isfile()}


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:  # IsADirectoryError for a folder
        file.seek(max(0, path.stat().st_size - MOST))
        return file.read(MOST)
