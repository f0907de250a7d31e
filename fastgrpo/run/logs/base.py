"""What a sink is: a place beside metrics.jsonl that a run's numbers, pictures and tables are logged to."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastgrpo.settings.schema import LogConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading, write_atomically

Row = tuple[str, ...]


@dataclass(frozen=True)
class LoggedTable:
    """A table as a person reads it: as many cells in a row as there are columns."""

    columns: Row
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Entry:
    """What is logged of one iteration.

    step: the iteration, 0 being before training. values: as in metrics.jsonl; they need not be finite. pictures: from a
    name to a PNG file that stays where it is. tables: by name.
    """

    step: int
    values: Mapping[str, float]
    pictures: Mapping[str, Path] = field(default_factory=dict)
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)


@dataclass(frozen=True)
class LoggedRun:
    """The run that is logged.

    folder: its own. finished: iterations done when this process began; above 0 it was resumed, and what a sink has of
    later ones does not count. name: what sinks call it. settings: where to. config: every setting, JSON-able and
    without secrets. version: of fastgrpo. commit: git's, where the code's is known, or "".
    """

    folder: Path
    finished: int
    name: str
    settings: LogConfig
    config: Mapping[str, Any]
    version: str
    commit: str = ""

    @property
    def code(self) -> dict[str, str]:
        """The version of the code, as entries beside the config."""
        return {"fastgrpo_version": self.version} | ({"git_commit": self.commit} if self.commit else {})

    def kept(self, sink: str) -> dict[str, str]:
        """What `keep` wrote for a sink, or {}. Raises ConfigError where the file is damaged."""
        path = self._kept_file(sink)
        if not path.is_file():
            return {}
        with reading(path):
            return {str(name): str(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}

    def keep(self, sink: str, names: Mapping[str, str]) -> None:
        """Write what a resumed run is to go on with in a sink, such as an id, to RUN/SINK.json."""
        write_atomically(self._kept_file(sink), (json.dumps(dict(names), indent=2) + "\n").encode())

    def _kept_file(self, sink: str) -> Path:
        return self.folder / f"{sink}.json"


class Sink(Protocol):
    """An open sink. Its worker's thread alone calls it, and may wait in it, or catch what it raises, forever."""

    where: str
    """Where a person sees it, such as an address or a command; "" says nothing."""

    def write(self, entry: Entry) -> None:
        """Log one iteration; steps rise, and after a resume begin again behind the last checkpoint."""

    def close(self, failed: bool) -> None:
        """End the run, and write what is not yet written. failed: whether training ended with an error."""


@dataclass(frozen=True)
class SinkKind:
    """A sink that can be named in log.to.

    check: raises ConfigError where its library or its login is missing; asks no server. open: may wait or raise; on a
    worker's thread. abandon: called, on another thread, when `open`, `write` or `close` have not returned in time;
    afterwards nothing of the sink may keep the program from ending.
    """

    check: Callable[[LogConfig], None]
    open: Callable[[LoggedRun], Sink]
    abandon: Callable[[], None] = lambda: None


def require_library(sink: str) -> None:
    """Raise ConfigError where the library of a sink, of the same name, is not installed."""
    found = importlib.util.find_spec(sink)
    # A folder of that name in the working directory, as wandb itself leaves one, has no origin and is no library.
    if found is None or found.origin is None:
        raise ConfigError.of("log.to", sink, f"{sink} is not installed; pip install 'fastgrpo[{sink}]'")
