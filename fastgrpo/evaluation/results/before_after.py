"""A table of two stages, row by row: what it was before and after, the change, and what the paired test says of it."""

from dataclasses import dataclass
from typing import Any

from fastgrpo.evaluation.results.summary import NEVER_TRAINED

BEFORE, AFTER = "before", "after"
FEWEST = 10  # images of a row from which on a change in percent of the rate before is shown
SCALES = {"percent": (100, ".1f"), "count": (1, ".0f"), "score": (1, ".4f")}  # how numbers of a unit are shown
_SUMS = ("overall", "mean", "all images", NEVER_TRAINED)  # rows that sum up others begin so

Number = dict[str, Any]
"""A number of file.py's, {"name", "value", "n", "low", "high"}."""


@dataclass(frozen=True)
class Change:
    """One row of a table.

    before, after: None where a stage lacks the row. points: the difference in the unit shown, such as "-57.5"; "" where
    a number is missing. relative: the change in percent of the rate before, such as "-96%", where lower is better; ""
    where that rate is 0, and of fewer than FEWEST images. verdict: better, worse or undecided, by the paired test of
    the row's own images; "" where there is none. trained: whether its prompts were trained on; None where unknown, and
    of sums. is_sum: whether it sums up others.
    """

    name: str
    before: Number | None
    after: Number | None
    points: str
    relative: str
    verdict: str
    trained: bool | None
    is_sum: bool

    @property
    def mark(self) -> str:
        """● trained on, ○ not, or a space."""
        return {True: "●", False: "○", None: " "}[self.trained]


def changes(table: dict[str, Any]) -> list[Change]:
    """Every row. table: of evaluation.json, with numbers before and after."""
    before, after = ({n["name"]: n for n in table["numbers"].get(stage, ())} for stage in (BEFORE, AFTER))
    return [_change(table, name, before.get(name), after.get(name)) for name in before | after]


def is_sum(name: str) -> bool:
    """Whether a row of this name sums up others."""
    return name.startswith(_SUMS)


def _change(table: dict[str, Any], name: str, before: Number | None, after: Number | None) -> Change:
    scale, form = SCALES[table["unit"]]
    points = relative = ""
    if before and after:
        points = format(scale * (after["value"] - before["value"]), "+" + form)
        if table.get("better") == "lower" and before["value"] and min(before["n"], after["n"]) >= FEWEST:
            relative = f"{100 * (after['value'] / before['value'] - 1):+.0f}%"
    verdict = table.get("tests", {}).get(name, {}).get("verdict", "")
    trained = name in table["trained"] if table.get("trained") and not is_sum(name) else None
    return Change(name, before, after, points, relative, verdict, trained, is_sum(name))
