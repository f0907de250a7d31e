"""Before and after training, of one run: sentences, headlines, and a table of every row with its interval."""

import re
from html import escape
from typing import Any

from fastgrpo.evaluation.results.before_after import FEWEST, SCALES, Change, Number, changes
from fastgrpo.evaluation.results.summary import OVERALL
from fastgrpo.evaluation.sentences import of_distance, of_suites
from fastgrpo.run import best
from fastgrpo.run.page.reported import IN_TRAINING, ReportedRun
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading


def results(run: ReportedRun) -> str:
    """What the evaluations found, or why there is nothing yet."""
    if not run.suites:
        note = "This run has not been evaluated after training; the curves below show the evaluations so far."
        return f"<p>{note}</p>{best_line(run)}"
    try:
        with reading(run.folder / IN_TRAINING / "evaluation.json"):
            table = _table(run.suites["shapes"]) if "shapes" in run.suites else ""
            return f"{verdicts(run)}{best_line(run)}{table}"
    except ConfigError as error:
        return f'<p class="note">{escape(str(error))}</p>{best_line(run)}'


def verdicts(run: ReportedRun) -> str:
    """Better, worse or undecided, a sentence each. Raises KeyError and the like where the results lack something."""
    sentences = [*of_suites({"suites": run.suites}), *of_distance(run.distance)]
    said = "".join(f'<li class="{s.verdict}">{escape(s.text.replace("->", "→"))}</li>' for s in sentences)
    return f'<ul class="verdicts">{said}</ul>' if said else ""


def best_line(run: ReportedRun) -> str:
    """Which checkpoint is the best and by which rule, or why none is; nothing where evaluations cannot say."""
    found = run.best
    if found is None:
        return ""
    name = "There is no best checkpoint" if found.iteration is None else f"Best checkpoint: iter-{found.iteration:06d}"
    return f'<p class="note"><b>{name}</b>, {escape(found.why)}. The rule: {escape(best.RULE)}.</p>'


def number(of: Number | None, unit: str) -> str:
    """With its interval, where it has one, and of how many images or other things it is."""
    if of is None:
        return "–"
    scale, form = SCALES[unit]
    value, known = format(scale * of["value"], form), of["low"] is not None
    interval = f"<span>[{scale * of['low']:{form}}, {scale * of['high']:{form}}]</span> " if known else ""
    return f"{value} <small>{interval}<span>of {of['n']}</span></small>"


def word(verdict: str) -> str:
    """What the test says, as a word with its colour; nothing where there is none."""
    return f' <span class="word {verdict}">{verdict}</span>' if verdict else ""


def _table(suite: dict[str, Any]) -> str:
    """The headlines, every row, and what these numbers are of. suite: `shapes`, whose sums are all of rates."""
    tiles, bodies, tested = [], [], False
    for table in suite["tables"]:
        percent = ", %" if table["unit"] == "percent" else ""
        rows = [f'<tr class="group"><th scope="rowgroup" colspan="5">{escape(table["title"])}{percent}</th></tr>']
        for line in changes(table):
            rows.append(_row(line, table["unit"]))
            tiles += [_tile(table["name"], line)] if line.is_sum else []
            tested |= bool(line.verdict)
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("before", "after", "change", "0 to 100%"))
    tests = (
        " <b>better</b> and <b>worse</b>: by the paired test of a row's own images, p &lt; 0.05; of twenty rows in "
        "which nothing changed, one is marked by chance."
        if tested
        else ""
    )
    about = re.sub("`([^`]*)`", r"<code>\1</code>", escape(" ".join(suite["notes"]["before"])))
    return f"""<div class="tiles">{"".join(tiles)}</div>
<details id="rows" open><summary>Every category and task</summary>
<div class="wide" role="region" aria-label="Rates before and after" tabindex="0"><table class="rows">
<caption class="hidden">Rates on held-out prompts before and after training</caption>
<thead><tr><td></td>{head}</tr></thead>{"".join(bodies)}</table></div>
<p class="note">● trained on, ○ never trained on. Rates are percent of images of held-out prompts with fixed seeds, 95%
intervals in brackets. On the axis from 0 to 100% before is above, after below. Their change is in points; in brackets,
in rows of {FEWEST} images or more, in percent of the rate before.{tests}</p>
<p class="note">{about}</p></details>"""


def _tile(table: str, line: Change) -> str:
    label = table if line.name == OVERALL else f"{table}, {line.name}"
    before, after = (f"{100 * each['value']:.1f}" if each else "–" for each in (line.before, line.after))
    return (
        f'<div class="tile {line.verdict}"><span>{escape(label)}</span>'
        f"<b>{before} → {after}%</b><span>{_change(line)}</span></div>"
    )


def _row(line: Change, unit: str) -> str:
    rates = unit == "percent"
    intervals = _intervals(line.before, line.after) if rates else ""
    change = _change(line) if rates else f"<span>{line.points}</span>"
    cells = (number(line.before, unit), number(line.after, unit), change, intervals)
    row_class = ' class="total"' if line.is_sum else ""
    name = f'<th scope="row"><span class="mark">{line.mark.strip()}</span>{escape(line.name)}</th>'
    return f"<tr{row_class}>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _change(line: Change) -> str:
    """In points, in percent of the rate before, and what the test says of it."""
    relative = f" <small>({line.relative})</small>" if line.relative else ""
    return f"<span>{line.points} points</span>{relative}{word(line.verdict)}"


def _intervals(before: Number | None, after: Number | None) -> str:
    """Both intervals on one axis from 0 to 1."""

    def bar(of: Number, y: int, name: str) -> str:
        x1, x2, x = (6 + 188 * of[key] for key in ("low", "high", "value"))
        return (
            f'<g class="{name}"><line x1="{x1:.1f}" y1="{y}" x2="{x2:.1f}" y2="{y}"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="4"/><title>{name}: {_spoken(of)}</title></g>'
        )

    if before is None or after is None:
        return ""
    axis = '<path class="grid" d="M6 2V26M53 2V26M100 2V26M147 2V26M194 2V26"/>'
    label = f"before {_spoken(before)}, after {_spoken(after)}"
    bars = bar(before, 9, "before") + bar(after, 19, "after")
    return f'<svg class="intervals" viewBox="0 0 200 28" role="img" aria-label="{label}">{axis}{bars}</svg>'


def _spoken(of: Number) -> str:
    value, low, high = (f"{100 * of[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value}%, interval {low} to {high}%"
