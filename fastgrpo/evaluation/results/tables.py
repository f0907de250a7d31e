"""Results as a person reads them: tables on the console and a Markdown file, both from evaluation.json's content.

Names and prompts come from files of anyone's: what is shown of them is one line, cut to a width, and escaped.
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fastgrpo.evaluation.results.before_after import AFTER, BEFORE, SCALES, changes, is_sum
from fastgrpo.evaluation.sentences import STYLES, UNDECIDED, Entry, Result, of_distance

LEGEND = "In brackets: 95% intervals."
NAME_WIDTH, PROMPT_WIDTH = 40, 100  # characters of a name and of a prompt that tables show


def console_tables(result: Result) -> list[Table | str]:
    """All tables of a result, each with its notes."""
    shown: list[Table | str] = []
    for suite in result["suites"].values():
        shown += [_measured(table, list(result["stages"])) for table in suite["tables"]]
        if suite["published"]:
            shown += _published_lines(suite)
        shown += [f"  {one_line(line, 400)}" for line in [*map(compared_line, suite["compared"]), *_notes(suite)]]
    return shown


def plain_tables(result: Result) -> dict[str, list[list[str]]]:
    """The same tables as texts, by SUITE/TABLE: a line of headings, then the rows. Names are cut, and not escaped."""
    found = {}
    for name, suite in result["suites"].items():
        for table in suite["tables"]:
            head, rows = _rows(table, list(result["stages"]))
            of = f"{table['title']}{_UNITS[table['unit']]}"
            lines = [[one_line(of, PROMPT_WIDTH), *head], *([row.name, *row.cells] for row in rows)]
            found[f"{name}/{table['name']}"] = lines
    return found


def markdown(result: Result) -> str:
    """The same tables, what was measured with what, and some of the images that did not pass."""
    stages = list(result["stages"])
    lines = ["# Evaluation", ""]
    lines += [f"- {stage}: {escape(info['model'], 200)}" for stage, info in result["stages"].items()]
    for name, suite in result["suites"].items():
        lines += ["", f"## {escape(name)}", "", f"Protocol `{_code(suite['protocol'])}`, {_drawing(suite)}."]
        for judge, info in suite["judges"].items():
            hashes = "".join(f", {escape(part)} `{_code(digest[:16])}`" for part, digest in info["hashes"].items())
            lines.append(f"Judge {escape(judge)}: `{_code(info['protocol'])}`{hashes}.")
        lines += markdown_tables(suite, stages)
        if suite["published"]:
            lines += ["", *_published_markdown(suite)]
        extra = [*map(compared_line, suite["compared"]), *_notes(suite)]
        if extra:
            lines += ["", *(f"- {escape(line, 400)}" for line in extra)]
        for stage, examples in suite["examples"].items():
            if examples:
                lines += ["", f"Images that did not pass, {stage}, the first {len(examples)}:", ""]
                lines += [f"- `{_code(each['id'])}` {escape(each['prompt'], PROMPT_WIDTH)}" for each in examples]
    if distance := of_distance(result.get("distance")):
        lines += ["", "## pictures before and after", "", *(f"- {escape(each.text, 400)}" for each in distance)]
    last = f"{LEGEND} Hashes are the first 16 digits of SHA-256; evaluation.json has them whole."
    return "\n".join([*lines, "", last]) + "\n"


def markdown_tables(suite: dict[str, Any], stages: Sequence[str]) -> list[str]:
    """Lines of Markdown: what a suite measured, one table below the other, each with a heading of the third level."""
    lines = []
    for table in suite["tables"]:
        lines += ["", f"### {escape(table['title'], 200)}", "", *_measured_markdown(table, stages)]
    return lines


def compared_line(compared: Entry, stages: tuple[str, str] = ("before", "after")) -> str:
    """One metric of two models with all that the test says. stages: how to call them; the verdict is on the second."""
    scale, form, percent, points = (100, ".1f", "%", " points") if compared["binary"] else (1, ".4f", "", "")
    a, b = (format(scale * compared[key], form) + percent for key in ("a", "b"))
    text = (
        f"{compared['metric']}: {_verdict(compared, stages[1])}{a} -> {b} on the same {compared['n']} images, "
        f"{scale * compared['difference']:+{form}}{points}"
    )
    if compared["low"] is not None:
        low, high = (format(scale * compared[key], "+" + form) for key in ("low", "high"))
        text += f" [{low}, {high}] ({compared['interval']})"
    if compared["binary"]:
        text += f"; {compared['only_a']} only {stages[0]}, {compared['only_b']} only {stages[1]}"
    return text if compared["p"] is None else f"{text}, p = {compared['p']:.2g} ({compared['test']})"


def _verdict(compared: Entry, stage: str) -> str:
    """Such as "better after, "; nothing where the metric does not say what is better."""
    verdict = compared.get("verdict")
    if verdict is None:
        return ""
    return f"{verdict}, " if verdict == UNDECIDED else f"{verdict} {stage}, "


def number_text(number: dict[str, Any] | None, unit: str) -> str:
    """A value with its interval, such as "48.9 [45.1, 52.7]"; a dash where there is none."""
    if number is None:
        return "–"
    scale, form = SCALES[unit]
    value, *limits = (format(scale * number[key], form) for key in ("value", "low", "high") if number[key] is not None)
    if "spread" in number:
        value += f" ± {format(scale * number['spread'], form)}"
    return f"{value} [{', '.join(limits)}]" if limits else value


def one_line(text: str, width: int) -> str:
    """Text on one line without control characters, at most `width` characters of it."""
    text = " ".join(text[: 4 * width].split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Cf") or c == "\u200d")
    return text if len(text) <= width else f"{text[: width - 1]}…"


def escape(text: str, width: int = NAME_WIDTH) -> str:
    """Text for a Markdown line or cell: cut, and neither HTML nor Markdown."""
    # A bracket alone is harmless, and intervals have them; it is "](" that makes a link. Dollars make formulas.
    return re.sub(r"([\\`*_|~#!$]|\](?=[(\[:]))", r"\\\1", html.escape(one_line(text, width), quote=False))


def _code(text: str) -> str:
    return one_line(text, 200).replace("`", "'").replace("|", "/")


@dataclass(frozen=True)
class _Row:
    """One row as it is shown. verdict: of the change."""

    name: str
    cells: tuple[str, ...]
    is_sum: bool
    verdict: str = ""


def _rows(table: dict[str, Any], stages: Sequence[str]) -> tuple[list[str], list[_Row]]:
    """The headings of all columns but the first, and the rows, as they come in the first stage that has them."""
    unit = table["unit"]
    if stages != [BEFORE, AFTER]:
        numbers = [(number["name"], number) for stage in stages for number in table["numbers"].get(stage, ())]
        shown = [(one_line(name, NAME_WIDTH), (number_text(n, unit), str(n["n"])), is_sum(name)) for name, n in numbers]
        return [*stages, "images"], [_Row(*row) for row in shown]
    tested = ["test"] if table.get("tests") else []
    rows = []
    for row in changes(table):
        counts = dict.fromkeys(str(number["n"]) for number in (row.before, row.after) if number)
        change = row.points + (f" ({row.relative})" if row.relative else "")
        verdict = [row.verdict if row.verdict != UNDECIDED else ""] if tested else []
        cells = (number_text(row.before, unit), number_text(row.after, unit), change, *verdict, "/".join(counts))
        mark = f"{row.mark} " if table.get("trained") and not row.is_sum else ""
        rows.append(_Row(mark + one_line(row.name, NAME_WIDTH), cells, row.is_sum, row.verdict))
    return [*stages, "change", *tested, "images"], rows


_UNITS = {"percent": ", %", "count": "", "score": ""}


def _measured(table: dict[str, Any], stages: Sequence[str]) -> Table:
    head, rows = _rows(table, stages)
    title = Text(one_line(table["title"], 100) + _UNITS[table["unit"]])
    shown = Table(title=title, caption=_legend(table, rows), box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("")
    for heading in head:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        style = " ".join(filter(None, ("bold" if row.is_sum else "", STYLES.get(row.verdict, ""))))
        shown.add_row(Text(row.name), *map(Text, row.cells), style=style)
    return shown


def _legend(table: dict[str, Any], rows: Sequence[_Row]) -> str | None:
    """What marks and words in the rows mean."""
    marks = ["● trained on   ○ never trained on"] if table.get("trained") else []
    told = any(row.verdict in STYLES for row in rows)
    tests = ["better, worse: by the paired test of a row's own images, p < 0.05"] if told else []
    return "\n".join(marks + tests) or None


def _published_lines(suite: dict[str, Any]) -> list[str]:
    """One line per checkpoint: columns enough for all numbers would be too narrow on a screen."""
    lines = [_published_title(suite)]
    for row in suite["published"]:
        numbers = ", ".join(f"{name} {value:g}" for name, value in row["numbers"].items())
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"  {row['checkpoint']} (from {row['base']}): {numbers}{note}")
    return lines


def _published_title(suite: dict[str, Any]) -> str:
    units = dict.fromkeys(row["unit"] for row in suite["published"])
    protocols = dict.fromkeys(row["protocol"] for row in suite["published"])
    return f"Published ({'; '.join(protocols)}; {', '.join(units)})"


def _measured_markdown(table: dict[str, Any], stages: Sequence[str]) -> list[str]:
    head, rows = _rows(table, stages)
    return _grid([_UNITS[table["unit"]].strip(", "), *head], [(row.name, *row.cells) for row in rows])


def _published_markdown(suite: dict[str, Any]) -> list[str]:
    """Per checkpoint its label, what it was trained from, its numbers and the note."""
    published = suite["published"]
    names = list(dict.fromkeys(name for row in published for name in row["numbers"]))
    notes = any(row["note"] for row in published)
    rows = []
    for row in published:
        numbers = [f"{row['numbers'][name]:g}" if name in row["numbers"] else "–" for name in names]
        rows.append([row["checkpoint"], row["base"], *numbers, *([row["note"]] if notes else [])])
    head = ["checkpoint", "of", *names, *([""] if notes else [])]
    source = f"Source: {escape('; '.join(dict.fromkeys(row['source'] for row in published)), 400)}."
    return [f"{escape(_published_title(suite), 400)}.", "", *_grid(head, rows), "", source]


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[escape(cell, PROMPT_WIDTH) for cell in row] for row in (head, *rows)]
    rule = "|---|" + "---:|" * (len(head) - 1)
    return ["| " + " | ".join(lines[0]) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines[1:])]


def _notes(suite: dict[str, Any]) -> list[str]:
    several, stages = len(suite["notes"]) > 1, list(suite["notes"].values())
    alike = [note for note in stages[0] if all(note in own for own in stages)] if stages else []
    notes = [(stage, note) for stage, own in suite["notes"].items() for note in own if note not in alike]
    for stage, images in suite["images"].items():
        if images["missing"]:
            few = ", ".join(images["missing"][:5]) + (", ..." if len(images["missing"]) > 5 else "")
            notes.append((stage, f"{len(images['missing'])} of {images['wanted']} images are missing: {few}"))
    return alike + list(dict.fromkeys(f"{stage}: {note}" if several else note for stage, note in notes))


def _drawing(suite: dict[str, Any]) -> str:
    drawing = suite["drawing"]
    return f"{drawing['sampler'].upper()}, {drawing['steps']} steps, eta {drawing['eta']:g}, {drawing['dtype']}"
