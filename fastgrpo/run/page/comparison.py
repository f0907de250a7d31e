"""Several runs side by side: what they are, what their evaluations found, and in which settings they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from fastgrpo.evaluation.results.before_after import changes
from fastgrpo.run.page.charts import sample
from fastgrpo.run.page.reported import IN_TRAINING, ReportedRun
from fastgrpo.run.page.results import number, word
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading

Row = tuple[str, str]  # the title of a group of rows, and the row's name


def runs_table(runs: Sequence[ReportedRun], duration: Any) -> str:
    """What each run is and how far it is. duration: seconds -> text."""
    rows = []
    for style, run in enumerate(runs, 1):
        best = "–" if run.best is None else "none" if run.best.iteration is None else f"iteration {run.best.iteration}"
        cells = (
            f"{run.done} of {run.config.iterations}",
            "–" if run.seconds is None else duration(run.seconds),
            str(run.config.seed),
            best,
        )
        name = f'<th scope="row">{sample(style, "r")}<a href="#run-{style}">{escape(run.name)}</a></th>'
        rows.append(f"<tr>{name}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = ("run", "iterations", "training", "seed", "best checkpoint")
    return _table("The runs of this page", head, [("", rows)])


def evaluations_table(runs: Sequence[ReportedRun]) -> str:
    """Every row of every evaluation, a column for each run; what sums up others first."""
    sums: dict[Row, dict[int, str]] = {}
    found: dict[Row, dict[int, str]] = {}
    problems = []
    for column, run in enumerate(runs):
        try:
            with reading(run.folder / IN_TRAINING / "evaluation.json"):
                for row, cell, is_sum in (*_cells(run.suites), *_moved(run.distance)):
                    (sums if is_sum else found).setdefault(row, {})[column] = cell
        except ConfigError as error:
            problems.append(f'<p class="note">{escape(str(error))}</p>')
    if not sums and not found:
        return f"<p>None of these runs has been evaluated after training yet.</p>{''.join(problems)}"
    head = ("before → after", *(run.name for run in runs))
    caption = "Evaluations before and after training"
    whole = _table(caption, head, _bodies(sums, len(runs)))
    rest = _table(f"{caption}, by category", head, _bodies(found, len(runs))) if found else ""
    folded = f'<details id="categories"><summary>By category and task</summary>{rest}</details>' if rest else ""
    missing = [run.name for run in runs if not run.suites]
    note = f" Not evaluated after training yet: {', '.join(missing)}." if missing else ""
    return (
        f'{whole}<p class="note">Rates are percent, with 95% intervals of those after training. better, worse: by a '
        f"paired test of the same prompts and seeds before and after, p &lt; 0.05. Runs can be compared with each "
        f"other where they were evaluated by the same protocol and seeds.{escape(note)}</p>{folded}{''.join(problems)}"
    )


def settings_table(runs: Sequence[ReportedRun]) -> str:
    """The settings in which the runs differ, but for where they are."""
    flat = [_flat(asdict(run.config)) for run in runs]
    names = [name for name in flat[0] if name != "run" and len({repr(each[name]) for each in flat}) > 1]
    if not names:
        return "<p>All settings are the same.</p>"
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{escape(_shown(each[name]))}</td>' for each in flat)}</tr>"
        for name in names
    ]
    return _table("Settings in which the runs differ", ("setting", *(run.name for run in runs)), [("", rows)])


def _cells(suites: Mapping[str, Any]) -> list[tuple[Row, str, bool]]:
    """(row, cell, whether it sums up others) of what one run's evaluations found."""
    cells = []
    for name, suite in suites.items():
        for table in suite.get("tables", ()) if name == "shapes" else ():
            percent = ", %" if table["unit"] == "percent" else ""
            for line in changes(table):
                before = number(line.before, table["unit"]).partition(" ")[0]
                cell = f"<small>{before} →</small> {number(line.after, table['unit'])}{word(line.verdict)}"
                cells.append(((table["title"] + percent, line.name), cell, line.is_sum))
        for entry in suite.get("compared", ()) if name != "shapes" else ():
            scale, form = (100, ".1f") if entry["binary"] else (1, ".4f")
            cell = f"<small>{scale * entry['a']:{form}} →</small> {scale * entry['b']:{form}}"
            cell += f" <small><span>of {entry['n']}</span></small>{word(entry.get('verdict', ''))}"
            cells.append(((name + (", %" if entry["binary"] else ""), entry["metric"]), cell, True))
    return cells


def _moved(distance: Mapping[str, Any] | None) -> list[tuple[Row, str, bool]]:
    """The same of how far pictures of benign prompts have moved, where that was measured."""
    if not distance:
        return []
    title, mmd, vendi = "Pictures of benign prompts", distance["mmd"], distance["vendi"]
    named = (
        ("squared MMD from before", mmd, mmd["value"], ".4f"),
        ("Vendi score, of before", vendi, vendi["ratio"], ".2f"),
    )
    cells: list[tuple[Row, str, bool]] = []
    for name, entry, value, form in named:
        ends = (
            ""
            if entry["low"] is None
            else f" <small><span>[{entry['low']:{form}}, {entry['high']:{form}}]</span></small>"
        )
        cells.append(((title, name), f"{value:{form}}{ends}", True))
    return cells


def _bodies(found: Mapping[Row, Mapping[int, str]], columns: int) -> list[tuple[str, list[str]]]:
    """(title, rows) of each group."""
    groups: dict[str, list[str]] = {}
    for (title, name), cells in found.items():
        row = "".join(f"<td>{cells.get(column, '–')}</td>" for column in range(columns))
        groups.setdefault(title, []).append(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>')
    return list(groups.items())


def _table(caption: str, head: Sequence[str], bodies: Sequence[tuple[str, Sequence[str]]]) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    parts = []
    for title, rows in bodies:
        group = (
            f'<tr class="group"><th scope="rowgroup" colspan="{len(head)}">{escape(title)}</th></tr>' if title else ""
        )
        parts.append(f"<tbody>{group}{''.join(rows)}</tbody>")
    return (
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table>'
        f'<caption class="hidden">{caption}</caption><thead><tr>{heads}</tr></thead>{"".join(parts)}</table></div>'
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """GROUP.NAME -> value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value) or "none"
