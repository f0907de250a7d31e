"""A diffusers folder, on this machine or on the Hugging Face hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import visible_files

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one on the Hugging Face hub, and no folder on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


@dataclass(frozen=True)
class Repository:
    """A folder or hub repository that holds models in diffusers' layout.

    field: the setting that names it, for error messages. name: a folder, or a hub id OWNER/NAME.
    revision: branch, tag or commit on the hub; empty: main. A folder has none.
    layout: what to give in its place where there is no network, for error messages.
    """

    field: str
    name: str
    revision: str = ""
    layout: str = "diffusers folder"

    def fetch(self, patterns: Iterable[str]) -> Path:
        """The folder with the files that match `patterns` (as in fnmatch), downloaded first where they are not here.

        Without a network, what the hub's cache on this machine holds. Raises ConfigError that tells what is in the way.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        if not _HUB_ID.fullmatch(self.name):
            raise ConfigError(f"{self.field} is {self.name!r}, but there is no such folder or file.")
        try:
            return Path(snapshot_download(self.name, revision=self.revision or None, allow_patterns=list(patterns)))
        except (HTTPError, OSError, ValueError) as error:
            raise ConfigError(f"{self.field} is {self.name!r}, {self._in_the_way(error)}.") from error

    def files(self) -> frozenset[str]:
        """Names of all files, relative to the folder; without a network, of those in the hub's cache."""
        if not Path(self.name).is_dir() and _HUB_ID.fullmatch(self.name):
            try:
                return frozenset(HfApi().list_repo_files(self.name, revision=self.revision or None))
            except (HTTPError, OSError, ValueError):
                pass  # fetch knows whether the cache will do, and what to say where it will not
        folder = self.fetch([])
        return frozenset(file.relative_to(folder).as_posix() for file in visible_files(folder) if file.is_file())

    def _in_the_way(self, error: Exception) -> str:
        if isinstance(error, GatedRepoError):
            return "a gated repository on the Hugging Face hub: accept its terms there, then `hf auth login`"
        if isinstance(error, RevisionNotFoundError):
            return f"which has no revision {self.revision!r} on the Hugging Face hub (model.revision)"
        if isinstance(error, RepositoryNotFoundError):
            return (
                "but there is neither such a folder nor such a repository on the Hugging Face hub "
                "(one that is private needs `hf auth login`)"
            )
        if isinstance(error, LocalEntryNotFoundError):
            return (
                "but there is no such folder, the Hugging Face hub cannot be reached, and its cache on this machine "
                f"does not hold all of it; where there is no network, give a {self.layout}"
            )
        return f"which the Hugging Face hub did not deliver: {' '.join(str(error).split())[:300]}"
