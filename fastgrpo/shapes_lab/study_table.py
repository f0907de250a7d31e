"""The study's tables: what finished runs in the shapes world left, a row a run, and the mean of each variant's."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastgrpo.evaluation.results.before_after import changes
from fastgrpo.evaluation.results.summary import NEVER_TRAINED, OVERALL, read_before, read_summary
from fastgrpo.evaluation.sentences import WORSE
from fastgrpo.run import best

SAFER = 0.25  # of the unsafe images before training, by whose reaching time is told
_NONE = "–"
_COLUMNS = (
    "variant",
    "seed",
    "unsafe, %",
    "change",
    "never trained, change",
    "composition, %",
    "points",
    "tasks worse",
    "kept, %",
    "colours, bits",
    "shapes, bits",
    "held-out reward",
    "composition fell",
    "alarm",
    f"s to -{1 - SAFER:.0%}",
)

Pair = tuple[float, float]
"""A number before and after training."""


@dataclass(frozen=True)
class Row:
    """What one run left, or what several left on average; None is what they lack.

    unsafe, never_trained, composition, kept: shares of images. colors, shapes: entropy of what prompts leave open, in
    bits. held_out: mean reward under the held-out encoder. interval: 95%, of the difference of composition, by pairs.
    worse: tasks whose composition is significantly worse. fell: the first evaluated iteration whose composition was
    below the low end of its interval before training. alarm: the first iteration with the guard's alarm.
    seconds: from the start until an evaluation found a quarter (SAFER) of the unsafe images before.
    """

    unsafe: Pair | None
    never_trained: Pair | None
    composition: Pair | None
    kept: Pair | None
    colors: Pair | None
    shapes: Pair | None
    held_out: Pair | None
    interval: Pair | None
    worse: tuple[str, ...]
    fell: int | None
    alarm: int | None
    seconds: float | None


def summary(runs: Mapping[int, Path]) -> list[str]:
    """A Markdown table's lines: what several runs of one variant left on average, and the seeds' lowest and highest.

    runs: seed -> folder of a finished run, at least one. Raises ConfigError for damage.
    """
    pairs = [read_pairs(folder) for folder in runs.values()]
    shared = [key for key in pairs[0] if all(key in own for own in pairs)]
    header = (f"mean of {len(runs)} training seeds", "before", "after", "change, and the lowest and highest seed's")
    lines = [_line(header), "|---|---|---|---|"]
    for section in _SECTIONS:
        names = [name for own, name in shared if own == section.table]
        names.sort(key=(OVERALL, NEVER_TRAINED).__contains__, reverse=True)  # the sums first
        lines += [_line(_summary_cells(section, name, [own[section.table, name] for own in pairs])) for name in names]
    return lines


@dataclass(frozen=True)
class _Section:
    """Rows of `summary`. table: of the results. form, scale: of numbers. change: as what it is told."""

    table: str
    label: str
    form: str
    scale: float
    change: Literal["relative", "points", "share", "difference"]


_SECTIONS = (
    _Section("unsafe", "unsafe images, %", ".1f", 100, "relative"),
    _Section("composition", "composition, %", ".1f", 100, "points"),
    _Section("kept", "benign objects of hazard prompts drawn, %", ".1f", 100, "points"),
    _Section("variety", "entropy of what prompts leave open, bits", ".2f", 1, "share"),
    _Section("held-out reward", "held-out reward", ".3f", 1, "difference"),
)


def _summary_cells(section: _Section, name: str, pairs: Sequence[Pair]) -> list[str]:
    before, after = (statistics.fmean(own) for own in zip(*pairs, strict=True))
    label = section.label if name == OVERALL else f"{section.label}: {name.replace('_', ' ')}"

    def change(pair: Pair) -> float:
        if section.change in ("relative", "share"):
            return 100 * (pair[1] / pair[0] - (section.change == "relative")) if pair[0] else math.nan
        return section.scale * (pair[1] - pair[0])

    form = {"relative": "+.0f", "points": "+.1f", "share": ".0f", "difference": "+.3f"}[section.change]
    unit = {"relative": "%", "points": " points", "share": "% of before", "difference": ""}[section.change]
    own = [change(pair) for pair in pairs]
    told = f"{change((before, after)):{form}}{unit} ({min(own):{form}} to {max(own):{form}})"
    return [label, *(f"{section.scale * value:{section.form}}" for value in (before, after)), told]


def table(runs: Mapping[str, Mapping[int, Path]]) -> list[str]:
    """A Markdown table's lines. runs: variant -> seed -> folder of a finished run. Raises ConfigError for damage."""
    lines = [_line(_COLUMNS), "|" + "---|" * len(_COLUMNS)]
    for variant, seeds in runs.items():
        rows = {seed: read_row(folder) for seed, folder in sorted(seeds.items())}
        lines += [_line((variant, str(seed), *_cells(row))) for seed, row in rows.items()]
        if rows:
            lines.append(_line((variant, "mean", *_mean_cells(list(rows.values())))))
    return lines


def read_row(folder: Path) -> Row:
    """What the run in this folder left. Raises ConfigError where it is damaged."""
    pairs = read_pairs(folder)
    tables = {each["name"]: each for each in read_summary(folder / "evaluation.json")["tables"]}
    tests = tables["composition"]["tests"] if "composition" in tables else {}
    overall = tests.get(OVERALL, {})
    interval = (overall["low"], overall["high"]) if overall.get("low") is not None else None
    before = (read_before(folder) or {"metrics": {}})["metrics"]
    logged = _logged(folder)
    alarms = [line["iteration"] for line in logged if line.get("guard/alarm")]
    chosen = best.read(folder)
    fell = [iteration for iteration, fails in (chosen.fails if chosen else {}).items() if best.COMPOSITION in fails]
    return Row(
        pairs.get(("unsafe", OVERALL)),
        pairs.get(("unsafe", NEVER_TRAINED)),
        pairs.get(("composition", OVERALL)),
        pairs.get(("kept", OVERALL)),
        pairs.get(("variety", "colors")),
        pairs.get(("variety", "shapes")),
        pairs.get(("held-out reward", OVERALL)),
        interval,
        tuple(task for task, entry in tests.items() if task != OVERALL and entry["verdict"] == WORSE),
        fell[0] if fell else None,
        alarms[0] if alarms else None,
        seconds_until_safer(before, logged),
    )


def read_pairs(folder: Path) -> dict[tuple[str, str], Pair]:
    """(table, name) -> a number of a finished run before and after training. Raises ConfigError for damage."""
    pairs: dict[tuple[str, str], Pair] = {}
    for each in read_summary(folder / "evaluation.json")["tables"]:
        for change in changes(each):
            if change.before and change.after:
                pairs[each["name"], change.name] = change.before["value"], change.after["value"]
    before = (read_before(folder) or {"metrics": {}})["metrics"]
    held = [line["eval/held_out_mean"] for line in _logged(folder) if "eval/held_out_mean" in line]
    if held and "eval/held_out_mean" in before:
        pairs["held-out reward", OVERALL] = before["eval/held_out_mean"], held[-1]
    return pairs


def _logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def seconds_until_safer(before: Mapping[str, float], logged: Sequence[Mapping[str, float]]) -> float | None:
    """Seconds at the first evaluated iteration with at most SAFER of the unsafe images before; None where none has.

    before: eval/* before training. logged: the lines of metrics.jsonl.
    """
    if "eval/unsafe" not in before:
        return None
    few = SAFER * before["eval/unsafe"]
    return next((line["seconds"] for line in logged if line.get("eval/unsafe", float("inf")) <= few), None)


def _cells(row: Row) -> list[str]:
    """Columns from "unsafe" on, of one run."""
    seconds = _NONE if row.seconds is None else f"{row.seconds:.0f}"
    fell, alarm = (_NONE if iteration is None else str(iteration) for iteration in (row.fell, row.alarm))
    return _both(row, ", ".join(row.worse) or _NONE, fell, alarm, seconds)


def _mean_cells(rows: Sequence[Row]) -> list[str]:
    """The same of several runs: means; how many tasks were worse, how many runs fell, were alarmed, became so safe."""
    reached = [row.seconds for row in rows if row.seconds is not None]
    seconds = f"{statistics.fmean(reached):.0f} ({len(reached)} of {len(rows)})" if reached else _NONE
    fell, alarm = (
        f"{sum(value is not None for value in own)} of {len(rows)}"
        for own in ([row.fell for row in rows], [row.alarm for row in rows])
    )
    worse = sum(len(row.worse) for row in rows)
    pairs = {name: _mean([getattr(row, name) for row in rows]) for name in _PAIRS}
    mean: dict[str, Any] = pairs | {"interval": None, "worse": (), "fell": None, "alarm": None, "seconds": None}
    return _both(Row(**mean), f"{worse} in {len(rows)} runs" if worse else _NONE, fell, alarm, seconds)


_PAIRS = ("unsafe", "never_trained", "composition", "kept", "colors", "shapes", "held_out")


def _mean(pairs: Sequence[Pair | None]) -> Pair | None:
    """Of runs that all have the number: the mean of some would be of others than its neighbours' in the row."""
    there = [pair for pair in pairs if pair]
    if len(there) < len(pairs):
        return None
    return statistics.fmean(pair[0] for pair in there), statistics.fmean(pair[1] for pair in there)


def _both(row: Row, worse: str, fell: str, alarm: str, seconds: str) -> list[str]:
    points = _NONE
    if row.composition:
        points = f"{100 * (row.composition[1] - row.composition[0]):+.1f}"
        if row.interval:
            points += f" [{100 * row.interval[0]:+.1f}, {100 * row.interval[1]:+.1f}]"
    return [
        _change(row.unsafe, ".1f", 100),
        _relative(row.unsafe),
        _relative(row.never_trained),
        _change(row.composition, ".1f", 100),
        points,
        worse,
        _change(row.kept, ".0f", 100),
        _change(row.colors, ".2f"),
        _change(row.shapes, ".2f"),
        _change(row.held_out, ".3f"),
        fell,
        alarm,
        seconds,
    ]


def _change(pair: Pair | None, form: str, scale: float = 1) -> str:
    return f"{scale * pair[0]:{form}} → {scale * pair[1]:{form}}" if pair else _NONE


def _relative(pair: Pair | None) -> str:
    return f"{100 * (pair[1] / pair[0] - 1):+.0f}%" if pair and pair[0] else _NONE


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
