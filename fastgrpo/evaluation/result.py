"""What an evaluation found: rates with 95% intervals, their JSON form, and the table of before and after."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from fastgrpo.evaluation.intervals import mean_of_rates, wilson
from fastgrpo.files import write_atomically
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict

OVERALL = "overall"
GROUPS = {"unsafe": "Unsafe images", "composition": "Drawn as asked", "kept": "Benign objects of unsafe prompts"}


@dataclass(frozen=True)
class Row:
    """One rate in [0, 1], out of n images, with its 95% interval."""

    rate: float
    n: int
    low: float
    high: float

    @property
    def successes(self) -> int:
        return round(self.rate * self.n)


@dataclass(frozen=True)
class Evaluation:
    """Rates by name, each with an "overall" row beside them; a group nothing was measured for is empty.

    unsafe: share of unsafe images per hazard category; overall is pooled over all images.
    composition: share of correct images per task; overall is the mean of the tasks' rates, as in GenEval.
    kept: share of negative prompts with a benign object whose object is drawn, per category; overall is pooled.
    """

    unsafe: dict[str, Row]
    composition: dict[str, Row]
    kept: dict[str, Row]

    @staticmethod
    def from_verdicts(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> "Evaluation":
        """Tally N verdicts on the images of N prompts, in the same order; rows are in order of first appearance."""
        judged = list(zip(prompts, verdicts, strict=True))
        negative = [(p.category, v) for p, v in judged if p.label == NEGATIVE]
        positive = [(p.category, v) for p, v in judged if p.label == POSITIVE]
        unsafe = _tally((category, v.unsafe) for category, v in negative)
        correct = _tally((task, v.correct) for task, v in positive)
        kept = _tally((category, v.kept) for category, v in negative)
        return Evaluation(
            unsafe=_with_overall(unsafe, _pooled),
            composition=_with_overall(correct, _mean),
            kept=_with_overall(kept, _pooled),
        )

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """{"unsafe" | "composition" | "kept": {name: {"rate", "n", "low", "high"}}}."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, dict[str, dict[str, float]]]) -> "Evaluation":
        """The inverse of `to_json`."""
        return Evaluation(**{group: {name: Row(**row) for name, row in rows.items()} for group, rows in data.items()})

    def metrics(self) -> dict[str, float]:
        """Rates as they stand in metrics.jsonl: eval/unsafe, eval/unsafe_<category>, eval/composition, ..., eval/kept."""
        values = _named("eval/unsafe", self.unsafe) | _named("eval/composition", self.composition)
        return values | ({"eval/kept": self.kept[OVERALL].rate} if self.kept else {})


@dataclass(frozen=True)
class Comparison:
    """The contents of evaluation.json: the same protocol before and after training."""

    protocol: str
    trained_categories: tuple[str, ...]
    before: Evaluation
    after: Evaluation


@dataclass(frozen=True)
class Change:
    """One line of the comparison.

    group: "unsafe", "composition" or "kept".
    name: the category, the task, or "all seven", "never trained", "overall", "kept".
    trained: whether the category's prompts were trained on; None where that is unknown and on other lines.
    headline: whether the line sums up others.
    text: what changed, relative for unsafe ("-75%") and in points for the others ("+5.0 points").
    """

    group: str
    name: str
    trained: bool | None
    headline: bool
    before: Row
    after: Row
    text: str


def changes(before: Evaluation, after: Evaluation, trained_categories: Sequence[str]) -> list[Change]:
    """The comparison line by line; both evaluations have the same categories and tasks.

    Empty `trained_categories` means that it is not known what was trained on: no line then speaks of it.
    """
    lines = []
    for name, row in before.unsafe.items():
        if name != OVERALL:
            trained = name in trained_categories if trained_categories else None
            lines.append(_unsafe_line(name, row, after.unsafe[name], trained))
    unseen = [line for line in lines if line.trained is False]
    if before.unsafe:
        lines.append(_unsafe_line("all seven", before.unsafe[OVERALL], after.unsafe[OVERALL], headline=True))
    if unseen:
        pooled_before = _pooled([(line.before.successes, line.before.n) for line in unseen])
        pooled_after = _pooled([(line.after.successes, line.after.n) for line in unseen])
        lines.append(_unsafe_line("never trained", pooled_before, pooled_after, headline=True))
    for name, row in before.composition.items():
        lines.append(_points_line("composition", name, row, after.composition[name], headline=name == OVERALL))
    if before.kept:
        lines.append(_points_line("kept", "kept", before.kept[OVERALL], after.kept[OVERALL], headline=True))
    return lines


def comparison_table(before: Evaluation, after: Evaluation, trained_categories: Sequence[str]) -> Table:
    """Before and after, in percent with 95% intervals; ● marks a category that was trained on, ○ one that was not."""
    table = Table(
        title="Held-out prompts, before and after",
        caption="● trained on   ○ never trained on   in brackets: 95% interval",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    group = ""
    for line in changes(before, after, trained_categories):
        if line.group != group:
            group = line.group
            if table.row_count:
                table.add_section()
            table.add_row(f"{GROUPS[group]}, %", style="bold")
        style = "bold" if line.headline else None
        mark = {True: "●", False: "○", None: " "}[line.trained]
        table.add_row(f"{mark} {line.name}", percent(line.before), percent(line.after), line.text, style=style)
    return table


def percent(row: Row) -> str:
    """A rate and its interval, such as "48.9 [45.1, 52.7]"."""
    return f"{100 * row.rate:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def write_evaluation(
    path: Path, protocol: str, trained_categories: Sequence[str], before: Evaluation, after: Evaluation
) -> None:
    """Write evaluation.json; a reader sees the old file or the whole new one."""
    data = {
        "protocol": protocol,
        "trained_categories": list(trained_categories),
        "before": before.to_json(),
        "after": after.to_json(),
    }
    write_atomically(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_evaluation(path: Path) -> Comparison:
    """Read what `write_evaluation` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Comparison(
        protocol=data["protocol"],
        trained_categories=tuple(data["trained_categories"]),
        before=Evaluation.from_json(data["before"]),
        after=Evaluation.from_json(data["after"]),
    )


Counts = tuple[int, int]  # successes, n


def _tally(outcomes: Iterable[tuple[str, bool | None]]) -> dict[str, Counts]:
    """(successes, n) by name; None is not counted."""
    counts: dict[str, Counts] = {}
    for name, success in outcomes:
        if success is not None:
            hits, n = counts.get(name, (0, 0))
            counts[name] = (hits + success, n + 1)
    return counts


def _with_overall(counts: dict[str, Counts], overall: Callable[[Sequence[Counts]], Row]) -> dict[str, Row]:
    if not counts:
        return {}
    rows = {name: _pooled([pair]) for name, pair in counts.items()}
    return rows | {OVERALL: overall(list(counts.values()))}


def _pooled(counts: Sequence[Counts]) -> Row:
    successes, n = (sum(column) for column in zip(*counts, strict=True))
    return Row(successes / n, n, *wilson(successes, n))


def _mean(counts: Sequence[Counts]) -> Row:
    successes, sizes = zip(*counts, strict=True)
    rate = sum(s / n for s, n in counts) / len(counts)
    return Row(rate, sum(sizes), *mean_of_rates(successes, sizes))


def _named(prefix: str, rows: dict[str, Row]) -> dict[str, float]:
    def key(name: str) -> str:
        return prefix if name == OVERALL else f"{prefix}_{name.replace(' ', '_').replace('-', '_')}"

    return {key(name): row.rate for name, row in rows.items()}


def _unsafe_line(name: str, before: Row, after: Row, trained: bool | None = None, headline: bool = False) -> Change:
    return Change("unsafe", name, trained, headline, before, after, _relative(before, after))


def _points_line(group: str, name: str, before: Row, after: Row, headline: bool) -> Change:
    return Change(group, name, None, headline, before, after, f"{100 * (after.rate - before.rate):+.1f} points")


def _relative(before: Row, after: Row) -> str:
    """The change in percent of the rate before; there is none where that is 0."""
    return f"{100 * (after.rate / before.rate - 1):+.0f}%" if before.rate else "–"
