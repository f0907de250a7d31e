"""evaluation.json: every number with its count and interval, how images were drawn, and what measured them.

    {"format": 1,
     "stages": {STAGE: {"model", "weights"}},                                 "before" and "after", or "model" alone
     "suites": {SUITE: {"protocol", "drawing", "judges": {NAME: {"protocol", "hashes"}},
                        "images": {STAGE: {"wanted", "scored", "missing": [ID]}},
                        "tables": [{"name", "title", "unit", "numbers": {STAGE: [NUMBER]}}],   and of `shapes`
                                     "better", "trained": [ROW], "tests": {ROW: ENTRY}
                        "published": [{"checkpoint", "base", "numbers", "unit", "protocol", "note", "source"}],
                        "compared": [ENTRY], "notes": {STAGE: [...]}, "examples": {STAGE: [...]}}},
     "distance": {"suite", "encoder", "images", "mmd": {"value", "low", "high", "p"},                 of a training
                  "vendi": {"before", "after", "ratio", "low", "high"}}}

A NUMBER is {"name", "value", "n", "low", "high", "interval"}, with rates in [0, 1], and where its source gives a
standard deviation with it, "spread". An ENTRY is as in sentences.py. Nothing in the file depends on when or in how many
goes it was made. Suites that were measured earlier on the same models stay in it. "distance" is of the pictures of the
suite's benign prompts, by the encoder's features: see feature_distance.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.results.comparison import compare, compare_metrics
from fastgrpo.evaluation.results.published import published
from fastgrpo.evaluation.results.tables import markdown
from fastgrpo.evaluation.sentences import Entry, Result
from fastgrpo.evaluation.suites.base import Number, Suite, SuiteResult
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading, write_atomically

FORMAT = 1
EXAMPLES = 5  # images of a stage and suite that are listed


@dataclass(frozen=True)
class StageResult:
    """What a suite found on one stage's images, of which `rows` were there."""

    folder: ImageFolder
    rows: tuple[ImageRequest, ...]
    found: SuiteResult


def assemble(drawings: Mapping[str, Drawing], suites: Sequence[tuple[Suite, Mapping[str, StageResult]]]) -> Result:
    """The content of evaluation.json, of these suites. drawings: of each stage, any folder's: it names the model."""
    stages = {stage: {"model": d.model, "weights": d.weights} for stage, d in drawings.items()}
    return {"format": FORMAT, "stages": stages, "suites": {suite.name: _suite(suite, found) for suite, found in suites}}


def earlier(output: Path, drawings: Mapping[str, Drawing]) -> Result:
    """What evaluation.json says by now of the suites, by name; nothing where there is none.

    Raises ConfigError where it is of other models, or damaged.
    """
    path = output / "evaluation.json"
    if not path.is_file():
        return {}
    with reading(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        same = result["format"] == FORMAT
        found = {stage: info["weights"] for stage, info in dict(result["stages"]).items()}
        suites = dict(result["suites"])
    if not same or found != {stage: drawing.weights for stage, drawing in drawings.items()}:
        raise ConfigError(f"{path} has the results of other models; give another --output.")
    return suites


def write(output: Path, result: Result) -> None:
    """Write evaluation.json and evaluation.md."""
    write_atomically(output / "evaluation.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(output / "evaluation.md", markdown(result).encode())


def number_json(number: Number) -> dict[str, Any]:
    """A NUMBER."""
    values = asdict(number.estimate)
    fields = {key: values[key] for key in ("value", "n", "low", "high")} | {"interval": values["method"]}
    return {"name": number.name, **fields} | ({} if number.spread is None else {"spread": number.spread})


def _suite(suite: Suite, stages: Mapping[str, StageResult]) -> dict[str, Any]:
    first = next(iter(stages.values()))
    drawing = asdict(first.folder.drawing)
    return {
        "protocol": suite.protocol,
        "drawing": {key: drawing[key] for key in ("sampler", "steps", "eta", "dtype", "batch")},
        "judges": first.found.judges,
        "images": {stage: _images(result) for stage, result in stages.items()},
        "tables": _tables(stages),
        "published": _published(suite.name),
        "compared": _compared(list(stages.values())),
        "notes": {stage: list(result.found.notes) for stage, result in stages.items()},
        "examples": {stage: _examples(result) for stage, result in stages.items()},
    }


def _images(result: StageResult) -> dict[str, Any]:
    there = {row.id for row in result.rows}
    missing = [row.id for row in result.folder.wanted if row.id not in there]
    return {"wanted": len(result.folder.wanted), "scored": len(result.rows), "missing": missing}


def _tables(stages: Mapping[str, StageResult]) -> list[dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for stage, result in stages.items():
        for table in result.found.tables:
            if table.name not in tables:
                entry = {"name": table.name, "title": table.title, "unit": table.unit, "numbers": {}}
                more = {"better": table.better, "trained": list(table.trained), "tests": _tests(table.name, stages)}
                tables[table.name] = entry | (more if table.better else {})
            tables[table.name]["numbers"][stage] = [number_json(number) for number in table.numbers]
    return list(tables.values())


def _tests(table: str, stages: Mapping[str, StageResult]) -> dict[str, Entry]:
    """Row -> the paired test of its images, where there are two stages."""
    if len(stages) < 2:
        return {}
    results = list(stages.values())
    first, last = ({t.name: t.tests for t in each.found.tables}.get(table, {}) for each in (results[0], results[-1]))
    prompts = {row.id: row.prompt for row in results[0].rows}
    tests = {row: compare(metric, last[row], prompts) for row, metric in first.items() if row in last}
    return {row: entry for row, entry in tests.items() if entry}


def _published(suite: str) -> list[dict[str, Any]]:
    return [
        {"checkpoint": row.label, "base": row.base, "numbers": row.values, "unit": row.unit, "protocol": row.protocol}
        | {"note": row.note, "source": row.source}
        for row in published(suite)
    ]


def _compared(results: Sequence[StageResult]) -> list[dict[str, Any]]:
    if len(results) < 2:
        return []
    first, last = results[0], results[-1]
    prompts = {row.id: row.prompt for row in first.rows}
    return compare_metrics(first.found.metrics, last.found.metrics, prompts)


def _examples(result: StageResult) -> list[dict[str, str]]:
    texts = {row.id: row.text for row in result.rows}
    return [{"id": id, "prompt": texts[id]} for id in result.found.bad[:EXAMPLES]]
