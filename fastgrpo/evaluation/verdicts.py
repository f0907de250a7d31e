"""SUITE.verdicts.json beside a stage's images: one value per image and metric, which other models can be compared in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import ConfigError
from fastgrpo.evaluation.suites.base import Metric, Scored, Suite
from fastgrpo.files import reading, write_atomically

FORMAT = 1
SUFFIX = ".verdicts.json"


def write_verdicts(folder: Path, suite: Suite, scored: Scored) -> None:
    """folder: of the images."""
    metrics = [{"name": m.name, "binary": m.binary, "values": dict(sorted(m.values.items()))} for m in scored.metrics]
    data = {
        "format": FORMAT,
        "suite": suite.name,
        "protocol": suite.protocol,
        "judges": scored.judges,
        "metrics": metrics,
    }
    path = folder / f"{suite.name}{SUFFIX}"
    write_atomically(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Verdicts:
    """What `write_verdicts` wrote."""

    suite: str
    protocol: str
    judges: dict[str, Any]
    metrics: tuple[Metric, ...]


def read_verdicts(path: Path) -> Verdicts:
    """Raises ConfigError where the file is damaged or of another version."""
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data["format"]
        if found == FORMAT:
            return Verdicts(data["suite"], data["protocol"], data["judges"], tuple(map(_metric, data["metrics"])))
    raise ConfigError(f"{path} is of format {found!r}; {FORMAT} is accepted.")


def _metric(entry: dict[str, Any]) -> Metric:
    return Metric(entry["name"], entry["binary"], {id: float(value) for id, value in dict(entry["values"]).items()})
