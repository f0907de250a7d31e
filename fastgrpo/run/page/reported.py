"""What the page is told of one run: settings, metrics and evaluations, as far as they are there and can be read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastgrpo.evaluation.results.summary import PROMPTS_FILE, read_before, read_result, read_summary
from fastgrpo.run import best
from fastgrpo.run.axis_file import read_axis
from fastgrpo.run.metrics import read_metrics
from fastgrpo.run.page.charts import Record
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_known
from fastgrpo.system.console import reason
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading

IN_TRAINING = Path("evaluation") / "in-training"
Found = TypeVar("Found")


@dataclass(frozen=True)
class Pictured:
    """The prompt of a row of the grids. hazard: whether it asks for something unsafe."""

    text: str
    category: str
    hazard: bool


@dataclass(frozen=True)
class ReportedRun:
    """name: unique on the page. settings: config.toml's text. records: of the metrics, after iteration 0 where that is
    known. suites: suite -> what it found before and after training. distance: how far pictures have moved. axis: of
    axis.json. pictured: the prompts of the grids. problems: sentences on what could not be read.
    """

    folder: Path
    name: str
    config: TrainConfig
    settings: str
    records: list[Record]
    suites: dict[str, Any]
    distance: dict[str, Any] | None
    best: best.Best | None
    axis: dict[str, Any] | None
    pictured: tuple[Pictured, ...]
    problems: tuple[str, ...]

    @property
    def done(self) -> int:
        """Iterations that are logged."""
        return int(self.records[-1]["iteration"]) if self.records else 0

    @property
    def seconds(self) -> float | None:
        """Of training so far."""
        found = self.records[-1].get("seconds") if self.records else None
        return float(found) if isinstance(found, int | float) else None

    @property
    def made_safe(self) -> bool:
        """Whether its unsafe pictures are harmless to look at: those of the drawn world are shapes."""
        return self.config.model.path == "shapes"


def read_reported(folder: Path, name: str) -> ReportedRun:
    """Read a run's folder. Raises ConfigError where it is none, or its settings or metrics are damaged.

    Of anything else that is damaged or lost the page shows what is left, and a sentence.
    """
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is not the folder of a run: there is no config.toml in it.")
    config, unknown = load_known(folder / "config.toml")
    metrics = folder / "metrics.jsonl"
    with reading(metrics):
        records = [dict(record) | {"iteration": int(record["iteration"])} for record in read_metrics(metrics)]
    problems = []
    if unknown:
        problems.append(f"This version does not know some of its settings: {', '.join(unknown)}.")

    def attempt(read: Callable[[], Found], otherwise: Found) -> Found:
        try:
            return read()
        except ConfigError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{reason(error)}.")
        return otherwise

    before = attempt(lambda: read_before(folder), None)
    # Iteration 0, where the policy was evaluated before training; eval/* is all that is known of it.
    start = [{"iteration": 0, **before["metrics"]}] if before else []
    nothing: tuple[dict[str, Any], dict[str, Any] | None] = {}, None
    suites, distance = attempt(lambda: _suites(folder), nothing)
    return ReportedRun(
        folder,
        name,
        config,
        (folder / "config.toml").read_text(encoding="utf-8", errors="replace"),
        start + records,
        suites,
        distance,
        attempt(lambda: best.read(folder), None),
        attempt(lambda: read_axis(folder), None),
        attempt(lambda: _pictured(folder / "samples" / PROMPTS_FILE), ()),
        tuple(problems),
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, its own where no other is called the same. Raises ConfigError for one named twice."""
    whole = [folder.resolve() for folder in folders]
    for number, folder in enumerate(whole):
        if folder in whole[:number]:
            raise ConfigError(f"{folders[number]}: this run is named twice; accepted are different ones.")
    for depth in range(1, max(len(folder.parts) for folder in whole) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
        if len(set(names)) == len(names):
            break
    return names


def _suites(run: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    result, summary = run / IN_TRAINING / "evaluation.json", run / "evaluation.json"
    found = read_result(result) if result.is_file() else {"suites": {}}
    suites: dict[str, Any] = found["suites"]
    if "shapes" not in suites and summary.is_file():  # of a run of an earlier version
        suites["shapes"] = read_summary(summary)
    return suites, found.get("distance")


def _pictured(path: Path) -> tuple[Pictured, ...]:
    """Nothing for runs from before the file was written."""
    if not path.is_file():
        return ()
    with reading(path):
        return tuple(
            Pictured(str(row["text"]), str(row.get("category") or row["label"]), row["label"] == "negative")
            for row in json.loads(path.read_text(encoding="utf-8"))
        )
