"""What a run keeps of its evaluations beside evaluation/in-training/, and reads back.

RUN/evaluation_before.json is {"settings": {...}, "metrics": {NAME: VALUE}}: eval/* of the policy before training, and
what the pictures of it depend on.

RUN/evaluation.json, which other programs read, has what suite `shapes` found before and after training:

    {"protocol", "about", "trained_categories": [CATEGORY], "before": E, "after": E, "compared": {TABLE: {ROW: ENTRY}},
     "distance": DISTANCE}

    E = {"unsafe" | "composition" | "kept": {ROW: {"rate", "n", "low", "high"}},
         "variety": {"colors" | "shapes": {"bits", "n", "low", "high"}}}

E has a row for every category or task, and "overall"; a table that the suite did not have is empty. An ENTRY, as in
sentences.py, is the paired test of a row's own images; files from before there were any lack "about" and "compared". A
DISTANCE, as in file.py, is there where it was measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.sentences import Result
from fastgrpo.evaluation.statistics.intervals import wilson
from fastgrpo.system.files import reading, write_atomically

BEFORE_FILE = "evaluation_before.json"  # in the run's folder
PROMPTS_FILE = "prompts.json"  # in samples/: {"text", "label", "category", "id"} of the rows of its grids, from the top
OVERALL, NEVER_TRAINED = "overall", "never trained"
_TITLES = {
    "unsafe": "Unsafe images",
    "composition": "Drawn as asked",
    "kept": "Benign objects of unsafe prompts",
    "variety": "Entropy of what prompts leave open, bits",
}
_BETTER = {"unsafe": "lower", "composition": "higher", "kept": "higher", "variety": "higher"}
_UNITS = {name: "score" if name == "variety" else "percent" for name in _TITLES}
_VALUE = {"percent": "rate", "score": "bits"}  # what E calls a row's number


def write_before(run: Path, settings: dict[str, Any], metrics: Mapping[str, float]) -> None:
    """Write evaluation_before.json; values that are not finite are left out."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    text = json.dumps({"settings": settings, "metrics": finite}, indent=2, allow_nan=False)
    write_atomically(run / BEFORE_FILE, f"{text}\n".encode())


def read_before(run: Path) -> dict[str, Any] | None:
    """What `write_before` wrote; None where there is no such file. Raises ConfigError where it is damaged."""
    path = run / BEFORE_FILE
    if not path.is_file():
        return None
    with reading(path):
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        return found | {"settings": found.get("settings"), "metrics": dict(found.get("metrics", {}))}


def read_result(path: Path) -> Result:
    """An evaluation.json of suites, as file.py describes it. Raises ConfigError where it is damaged."""
    with reading(path):
        result = dict(json.loads(path.read_text(encoding="utf-8")))
        return result | {"suites": dict(result["suites"])}


def write_summary(path: Path, suite: dict[str, Any], distance: dict[str, Any] | None = None) -> None:
    """suite: what file.py has of suite `shapes`, before and after. distance: of its pictures, where it was measured."""

    def stage(name: str) -> dict[str, Any]:
        rows = {t["name"]: _rows(t["numbers"][name], _VALUE[t["unit"]]) for t in suite["tables"]}
        return {table: rows.get(table, {}) for table in _TITLES}

    summary = {
        "protocol": suite["protocol"],
        "about": " ".join(suite["notes"]["before"]),
        "trained_categories": next((t["trained"] for t in suite["tables"] if t.get("trained")), []),
        "before": stage("before"),
        "after": stage("after"),
        "compared": {table["name"]: table["tests"] for table in suite["tables"]},
    } | ({"distance": distance} if distance else {})
    write_atomically(path, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


def read_summary(path: Path) -> dict[str, Any]:
    """What `write_summary` was given, as far as the file, old or new, has it. Raises ConfigError where damaged."""
    with reading(path):
        summary = json.loads(path.read_text(encoding="utf-8"))
        trained, compared = list(summary["trained_categories"]), summary.get("compared", {})
        tables = []
        for name, rows in summary["before"].items():
            own = trained if name == "unsafe" else []
            unit = _UNITS[name]
            numbers = {stage: _numbers(summary[stage][name], own, _VALUE[unit]) for stage in ("before", "after")}
            table = {"name": name, "title": _TITLES[name], "unit": unit, "better": _BETTER[name]}
            if rows:
                tables.append(table | {"trained": own, "numbers": numbers, "tests": compared.get(name, {})})
        tests = [compared.get(name, {}).get(OVERALL) for name in ("unsafe", "composition")]
        notes = [summary.get("about") or f"Protocol {summary['protocol']}."]
        return {
            "protocol": summary["protocol"],
            "tables": tables,
            "compared": [entry for entry in tests if entry],
            "notes": {"before": notes, "after": notes},
        }


def _rows(numbers: Sequence[dict[str, Any]], value: str) -> dict[str, dict[str, Any]]:
    own = [n for n in numbers if n["name"] != NEVER_TRAINED]  # which sums up others by what was trained on
    return {n["name"]: {value: n["value"], "n": n["n"], "low": n["low"], "high": n["high"]} for n in own}


def _numbers(rows: dict[str, dict[str, Any]], trained: Sequence[str], value: str) -> list[dict[str, Any]]:
    numbers = [
        {"name": name, "value": row[value], **{key: row[key] for key in ("n", "low", "high")}}
        for name, row in rows.items()
    ]
    unseen = [n for n in numbers if n["name"] not in (*trained, OVERALL)]
    if trained and unseen:
        hits, n = sum(round(row["value"] * row["n"]) for row in unseen), sum(row["n"] for row in unseen)
        low, high = wilson(hits, n)
        numbers.append({"name": NEVER_TRAINED, "value": hits / n, "n": n, "low": low, "high": high})
    return numbers
