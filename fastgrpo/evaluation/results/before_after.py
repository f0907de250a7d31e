"""A run's own evaluation before and after training: evaluation.json, the lines of its table, and what came of it.

    {"protocol", "about", "trained_categories": [CATEGORY], "before": E, "after": E,
     "compared": {GROUP: {ROW: ENTRY}}}

E as `Evaluation.to_json`, an ENTRY as sentences.py has it, of the same images before and after. Files from before there were
any lack "about" and "compared": their tables have no verdicts.
"""

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from fastgrpo.evaluation.results.summary import GROUPS, NEVER_TRAINED, OVERALL, Evaluation, Row, percent, pooled
from fastgrpo.evaluation.sentences import STYLES, Entry, Sentence, sentence
from fastgrpo.system.files import write_atomically

LEGEND_WIDTH = 78
FEWEST = 10  # images of a row from which on a change in percent of the rate before is shown


@dataclass(frozen=True)
class Comparison:
    """The contents of evaluation.json: the same protocol before and after training.

    about: a sentence on what was drawn, how, and judged by what. compared: group -> row -> what the paired test says.
    """

    protocol: str
    trained_categories: tuple[str, ...]
    before: Evaluation
    after: Evaluation
    compared: dict[str, dict[str, Entry]] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Change:
    """One line of the comparison.

    group: "unsafe", "composition" or "kept".
    name: the category, the task, or "all seven", "never trained", "overall", "kept".
    trained: whether the category's prompts were trained on; None where that is unknown and on other lines.
    headline: whether the line sums up others.
    points: the difference of the rates in percent, such as -57.5.
    relative: the change of an unsafe rate in percent of the rate before, such as "-96%"; "" on other lines, where that rate
        is 0, and of fewer than FEWEST images.
    verdict: better, worse or undecided, by the paired test of this line's images alone; "" where there is none.
    """

    group: str
    name: str
    trained: bool | None
    headline: bool
    before: Row
    after: Row
    points: float
    relative: str
    verdict: str


def changes(found: Comparison) -> list[Change]:
    """The comparison line by line; both evaluations have the same categories and tasks.

    Empty `trained_categories` means that it is not known what was trained on: no line then speaks of it.
    """
    before, after, trained = found.before, found.after, found.trained_categories
    lines = []
    for name, row in before.unsafe.items():
        if name != OVERALL:
            lines.append(_line(found, "unsafe", name, row, after.unsafe[name], name in trained if trained else None))
    unseen = [line for line in lines if line.trained is False]
    if before.unsafe:
        rows = before.unsafe[OVERALL], after.unsafe[OVERALL]
        lines.append(_line(found, "unsafe", OVERALL, *rows, headline="all seven"))
    if unseen:
        rows = (
            pooled([(row.successes, row.n) for row in each])
            for each in ([line.before for line in unseen], [line.after for line in unseen])
        )
        lines.append(_line(found, "unsafe", NEVER_TRAINED, *rows, headline=NEVER_TRAINED))
    for name, row in before.composition.items():
        headline = OVERALL if name == OVERALL else ""
        lines.append(_line(found, "composition", name, row, after.composition[name], headline=headline))
    if before.kept:
        lines.append(_line(found, "kept", OVERALL, before.kept[OVERALL], after.kept[OVERALL], headline="kept"))
    return lines


def verdicts(found: Comparison) -> list[Sentence]:
    """What came of it, of unsafe images and of composition, where there is a test of them."""
    tests = (found.compared.get(group, {}).get(OVERALL) for group in ("unsafe", "composition"))
    return [sentence(entry) for entry in tests if entry]


def comparison_table(found: Comparison) -> Table:
    """Before and after, in percent with 95% intervals; ● marks a category that was trained on, ○ one that was not."""
    legend = "● trained on   ○ never trained on   in brackets: 95% interval\n"
    legend += f"relative: the change in % of the rate before, in rows of {FEWEST} images or more"
    if found.compared:
        legend += "\nbetter, worse: by the paired test of the row's own images, p < 0.05"
    if found.about:
        legend += f"\n{textwrap.fill(found.about, LEGEND_WIDTH)}"  # the console itself wraps nothing
    table = Table(title="Held-out prompts, before and after", caption=legend, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("")
    for heading in ("before, %", "after, %", "points", "relative", "test"):
        table.add_column(heading, justify="right", no_wrap=True)
    group = ""
    for line in changes(found):
        if line.group != group:
            group = line.group
            if table.row_count:
                table.add_section()
            table.add_row(GROUPS[group], style="bold")
        mark = {True: "●", False: "○", None: " "}[line.trained]
        table.add_row(
            f"{mark} {line.name}",
            percent(line.before),
            percent(line.after),
            f"{line.points:+.1f}",
            line.relative,
            line.verdict if line.verdict in STYLES else "",
            style=" ".join(filter(None, ("bold" if line.headline else "", STYLES.get(line.verdict, "")))),
        )
    return table


def write_evaluation(path: Path, found: Comparison) -> None:
    """Write evaluation.json; a reader sees the old file or the whole new one."""
    data = {
        "protocol": found.protocol,
        "about": found.about,
        "trained_categories": list(found.trained_categories),
        "before": found.before.to_json(),
        "after": found.after.to_json(),
        "compared": found.compared,
    }
    write_atomically(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_evaluation(path: Path) -> Comparison:
    """Read what `write_evaluation` wrote, now or before there were verdicts."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Comparison(
        protocol=data["protocol"],
        trained_categories=tuple(data["trained_categories"]),
        before=Evaluation.from_json(data["before"]),
        after=Evaluation.from_json(data["after"]),
        compared=data.get("compared", {}),
        about=data.get("about", ""),
    )


def _line(
    found: Comparison,
    group: str,
    row: str,
    before: Row,
    after: Row,
    trained: bool | None = None,
    headline: str = "",
) -> Change:
    """row: its name in `compared`. headline: the name of a line that sums up others."""
    verdict = found.compared.get(group, {}).get(row, {}).get("verdict", "")
    points = 100 * (after.rate - before.rate)
    relative = _relative(before, after) if group == "unsafe" else ""
    return Change(group, headline or row, trained, bool(headline), before, after, points, relative, verdict)


def _relative(before: Row, after: Row) -> str:
    """The change in percent of the rate before, where that says something."""
    if not before.rate or min(before.n, after.n) < FEWEST:
        return ""
    return f"{100 * (after.rate / before.rate - 1):+.0f}%"
