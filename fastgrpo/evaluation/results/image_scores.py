"""SUITE.verdicts.json beside a stage's images: one value per image and metric, for comparing models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.suites.base import Metric, Suite, SuiteResult
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading, write_atomically

FORMAT = 1
SUFFIX = ".verdicts.json"


def write_verdicts(folder: Path, suite: Suite, result: SuiteResult) -> None:
    """folder: of the images."""
    data = {"format": FORMAT, "suite": suite.name, "protocol": suite.protocol, "judges": result.judges}
    data["metrics"] = [_metric_json(metric) for metric in result.metrics]
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


def _metric_json(metric: Metric) -> dict[str, Any]:
    entry = {"name": metric.name, "binary": metric.binary, "better": metric.better}
    grouped = {} if metric.groups is None else {"groups": dict(sorted(metric.groups.items()))}
    return entry | grouped | {"values": dict(sorted(metric.values.items()))}


def _metric(entry: dict[str, Any]) -> Metric:
    values = {id: float(value) for id, value in dict(entry["values"]).items()}
    better = entry.get("better")  # files from before verdicts had a word for them lack it
    if better not in (None, "lower", "higher"):
        raise ValueError(f"better is {better!r}")
    groups = dict(entry["groups"]) if "groups" in entry else None
    return Metric(entry["name"], entry["binary"], values, better, groups)
