"""Runs to log, sinks that behave as asked, and what sinks wrote, read back by other means than wrote it."""

import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgrpo.run.logs.base import Entry, LoggedRun, LoggedTable, SinkKind
from fastgrpo.run.logs.run import logged_run
from fastgrpo.settings.schema import LogConfig, TrainConfig

_BLOCK = 32768  # of a LevelDB log, as which wandb writes its offline runs
TABLE = LoggedTable(
    ("Unsafe images, %", "before", "after"), (("● violence", "50.0 [20, 80]", "10.0"), ("overall", "–", "1|2"))
)


def a_run(folder: Path, *to: str, finished: int = 0, config: TrainConfig | None = None, **log: Any) -> LoggedRun:
    """The run in `folder`, logged to the sinks `to`. log: further fields of LogConfig."""
    settings = LogConfig(to=to, **log)
    return logged_run(folder, replace(config or TrainConfig(), log=settings), finished)


def entry(step: int, **more: Any) -> Entry:
    return Entry(step, {"reward/mean": step / 4}, **more)


@dataclass
class Recorded:
    """A sink that keeps what it is given. act: is called with every entry first, and may raise or wait."""

    act: Callable[[Entry], object] = lambda entry: None
    opening: Callable[[], object] = lambda: None
    entries: list[Entry] = field(default_factory=list)
    runs: list[LoggedRun] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    abandoned: threading.Event = field(default_factory=threading.Event)
    where: str = ""

    @property
    def kind(self) -> SinkKind:
        return SinkKind(lambda settings: None, self._open, self.abandoned.set)

    @property
    def steps(self) -> list[int]:
        return [entry.step for entry in self.entries]

    def _open(self, run: LoggedRun) -> "Recorded":
        self.runs.append(run)
        self.opening()
        return self

    def write(self, entry: Entry) -> None:
        self.act(entry)
        self.entries.append(entry)

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


def wandb_records(file: Path) -> Iterator[Any]:
    """The protocol buffers of an offline run's .wandb file: after a header of 7 bytes chunks, none across blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            break
        chunk = data[place + 7 : place + 7 + length]
        assert checksum == zlib.crc32(chunk, zlib.crc32(bytes([kind]))), "a checksum"
        whole = whole + chunk if kind in (3, 4) else chunk  # 1 whole, 2 first, 3 middle, 4 last
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record


def values_of(items: Any) -> dict[str, str]:
    """From names to JSON, of a record's items."""
    return {item.key or "/".join(item.nested_key): item.value_json for item in items}


def texts_in(folder: Path) -> Mapping[Path, bytes]:
    """Of every file in a folder and below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
