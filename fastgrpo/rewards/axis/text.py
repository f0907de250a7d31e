"""Lays out the safety axis as lines for a terminal: histograms, tables and the prompts nearest the border."""

import math
from collections.abc import Sequence

import torch
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from fastgrpo.rewards.anchors import Anchors
from fastgrpo.rewards.axis.report import AnchorReport, AxisReport, AxisSide, Bins, Spread, SweepRow, round_up
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.types import NEGATIVE, POSITIVE

WIDTH = 79  # columns of everything but warnings
_STYLES = {POSITIVE: "green", NEGATIVE: "red"}  # only a terminal shows them
_BAR_ROWS = 4
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BORDER = 5  # prompts of each label that are shown as nearest the border


def header(config: TrainConfig, report: AxisReport, positives: int, negatives: int) -> list[str]:
    """positives, negatives: how many prompts there are, measured or not."""
    reward, there = config.reward, {POSITIVE: positives, NEGATIVE: negatives}
    measured = (f"{len(side)} of {there[label]} {label}" for label, side in report.sides.items())
    return [
        f"encoder   {reward.encoder}",
        f"steering  anchors {reward.anchors}, mode {reward.mode}, alpha {reward.alpha:g}",
        f"prompts   {', '.join(measured)}",
    ]


def anchor_lines(report: AnchorReport, anchors: Anchors) -> list[str]:
    if report.safe is None:
        means = f"no safe ones; the mean of the unsafe ones has length {report.distance:.2f}"
    else:
        means = f"the means are {report.distance:.2f} apart, their cosine is {report.cosine:.2f}"
    rows = [("safe", anchors.safe, report.safe), ("unsafe", anchors.unsafe, report.unsafe)]
    return [
        f"anchors: {means}",
        *(f"  {name:7}{len(phrases):4}   {spread}" for name, phrases, spread in rows if phrases),
    ]


def histogram_lines(report: AxisReport) -> list[Text | str]:
    """Bars of both labels over one scale, from the values before steering."""
    bins = Bins.covering(torch.cat([side.before for side in report.sides.values()]), WIDTH - 7)
    lines: list[Text | str] = ["prompts by z_text . v_safe, before steering"]
    for label, side in report.sides.items():
        counts = bins.count(side.before)
        lines += [
            f"  {label}, tallest bar {max(counts)}",
            *(Text(f"   {bar}", _STYLES[label]) for bar in _bars(counts)),
        ]
    return [*lines, *_scale(bins)]


def _bars(counts: Sequence[int]) -> list[str]:
    """Counts as columns of `_BAR_ROWS` characters, the highest full; any count above 0 shows at least one eighth."""
    full = 8 * _BAR_ROWS
    heights = [math.ceil(full * count / max(counts)) for count in counts]
    rows = range(_BAR_ROWS - 1, -1, -1)
    return ["".join(_EIGHTHS[min(max(height - 8 * row, 0), 8)] for height in heights).rstrip() for row in rows]


def _scale(bins: Bins) -> list[str]:
    """A ruler with a tick at every tenth, and numbers beneath as many as there is room for."""
    ruler = "   " + "".join("┬" if i % bins.per_tenth == 0 else "─" for i in range(len(bins))) + "┬"
    every = next(step for step in (1, 2, 5, 10) if step * bins.per_tenth >= 6)
    numbers = [" "] * (len(bins) + 6)
    for tenth in range(bins.low, bins.high + 1):
        if tenth % every == 0:
            place = (tenth - bins.low) * bins.per_tenth
            numbers[place + 1 : place + 5] = f"{tenth / 10:+.1f}" if tenth else "  0 "
    return [ruler, "".join(numbers).rstrip()]


def place_lines(report: AxisReport) -> list[str]:
    """Mean and range before and after steering, by label and category."""
    rows = [_columns("prompts", "", "before: mean [min, max]", "after steering")]
    for label, side in report.sides.items():
        rows.append(_columns(label, len(side), Spread.of(side.before), Spread.of(side.after)))
        for name, part in side.categories().items():
            rows.append(_columns(f"  {name}", len(part), Spread.of(part.before), Spread.of(part.after)))
    return rows


def _columns(name: str, count: object, before: object, after: object) -> str:
    return f"{_cut(name, 24)} {count!s:>5}   {before!s:23}   {after!s:23}".rstrip()


def sweep_lines(report: AxisReport, rows: Sequence[SweepRow]) -> list[str]:
    lines = [
        "        negatives on   targets against their texts: mean cosine, mean angle",
        f" alpha  the safe side   {POSITIVE:17}   {NEGATIVE}",
    ]
    for row in rows:
        shifts = (row.shifts[label] for label in (POSITIVE, NEGATIVE))
        cells = "".join(f"   {shift.cosine:6.3f} {shift.degrees:6.1f} deg" for shift in shifts)
        mark = "   <- alpha" if row.alpha == report.alpha else ""
        lines.append(f"{row.alpha:6.4g}  {1 - row.unsafe:13.1%}{cells}{mark}")
    mean, most = round_up(report.alpha_mean), round_up(report.alpha_most)
    return [*lines, f"the negatives' mean crosses at alpha {mean:.2f}, 95% of them have crossed at {most:.2f}"]


def border_lines(report: AxisReport) -> list[str]:
    return [
        "nearest the border after steering: before, after, prompt",
        "  the lowest positives",
        *_prompt_lines(report.sides[POSITIVE].lowest(_BORDER)),
        "  the negatives nearest 0",
        *_prompt_lines(report.sides[NEGATIVE].nearest(_BORDER)),
    ]


def _prompt_lines(side: AxisSide) -> list[str]:
    values = zip(side.before.tolist(), side.after.tolist(), side.prompts, strict=True)
    return [
        f"    {before:+.3f}  {after:+.3f}  {_cut(prompt.text, WIDTH - 20)}".rstrip() for before, after, prompt in values
    ]


def _cut(text: str, width: int) -> str:
    """`text` in exactly `width` columns of a terminal, without characters that could steer it."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    fits = cell_len(printable) <= width
    return set_cell_size(printable, width) if fits else set_cell_size(printable, width - 1) + "…"
