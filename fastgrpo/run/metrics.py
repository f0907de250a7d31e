"""Numbers over iterations: RUN/metrics.jsonl, one JSON object per iteration."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.system.files import naming, reading, sync, write_atomically

if TYPE_CHECKING:  # metrics are read back without torch, which takes seconds to import
    import torch


class MetricsLog:
    """Appends one line per iteration; a line is on disk before `write` returns."""

    def __init__(self, run: Path, finished: int):
        """finished: iterations that count; what the file says about later ones is cut off, they will be run again.

        Raises ConfigError where the file is damaged.
        """
        self.path = run / "metrics.jsonl"
        with reading(self.path):
            lines = _whole_lines(self.path, finished)
        write_atomically(self.path, lines)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, iteration: int, seconds: float, values: Mapping[str, float]) -> None:
        """Log one finished iteration (from 1); `seconds` of wall clock since the run began. NaN and inf become null."""
        record = {"iteration": iteration, "seconds": round(seconds, 3), **values}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with naming(self.path):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
            sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Stopwatch:
    """Wall clock of an iteration's stages; each waits for the device once, when it ends."""

    def __init__(self, device: "torch.device"):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        self.seconds[stage] = time.monotonic() - began

    def metrics(self, images: int) -> dict[str, float]:
        """time/<stage>_s, and throughput/images_per_s over all stages together."""
        times = {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
        return times | {"throughput/images_per_s": images / sum(self.seconds.values())}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, oldest first; a last line that a kill cut short does not count."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def _whole_lines(path: Path, finished: int) -> bytes:
    """The lines of the first `finished` iterations, byte for byte."""
    count = sum(record["iteration"] <= finished for record in read_metrics(path))
    return b"".join(path.read_bytes().splitlines(keepends=True)[:count]) if count else b""
