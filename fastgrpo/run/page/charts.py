"""Line charts of metrics over iterations, as SVG: described in words, and legible without colour.

A chart shows several metrics of one run (`chart`) or one metric of several runs (`run_charts`). Its lines carry their
values (data-i, data-v), so that page.js can show those of any iteration in the legend.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl, numbers or None; or iteration 0: the policy before training
Points = list[tuple[float, float]]  # (iteration, value)

MOST_LINES = 8
"""Of a chart: so many styles there are, each of a colour, a dash and a marker of its own."""


@dataclass(frozen=True)
class Panel:
    """One chart of one run.

    series: metric name -> label in the legend; at most three. scale: values are multiplied by it (100 for shares in
    percent). unit: shown behind the title.
    """

    title: str
    series: dict[str, str]
    scale: float = 1.0
    unit: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart. style: its number, from 1."""

    label: str
    points: Points
    style: int


_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 312, 8, 138  # the plotting area inside a 320 x 160 chart
_MOST_POINTS = 400  # of a line; more than the pixels that it has
_ALL_MARKED, _MARKERS = 30, 10  # up to so many points each has a marker, of more about so many


def chart(panel: Panel, records: Sequence[Record], run: str = "") -> str:
    """A line chart over all iterations of `records`, or nothing where no value was logged.

    run: whose they are, where the page has the same chart of others.
    """
    lines = [
        Line(label, points, style)
        for style, (name, label) in enumerate(panel.series.items(), 1)
        if (points := _points(name, panel.scale, records))
    ]
    if not lines:
        return ""
    return _figure(panel.title, panel.unit, lines, (records[0]["iteration"], records[-1]["iteration"]), run)


def run_charts(panel: Panel, runs: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """A chart for every metric of the panel that a run logged, with a line for each run. runs: (name, records)."""
    ends = [(records[0]["iteration"], records[-1]["iteration"]) for _, records in runs if records]
    figures = []
    for metric, label in panel.series.items():
        lines = [
            Line(name, points, style)
            for style, (name, records) in enumerate(runs, 1)
            if (points := _points(metric, panel.scale, records))
        ]
        if lines:
            title = f"{panel.title}: {label}" if label else panel.title
            span = min(first for first, _ in ends), max(last for _, last in ends)
            figures.append(_figure(title, panel.unit, lines, span))
    return "".join(figures)


def sample(style: int, kind: str = "s") -> str:
    """A piece of a line, for a legend. kind: `s` of a metric, `r` of a run."""
    drawn = '<polyline points="0,6 34,6"/>' + _marker(style, 17, 6, 3)
    return f'<svg class="sample line {kind}{style} c{style}" viewBox="0 0 34 12" aria-hidden="true">{drawn}</svg>'


def axis_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, that enclose [low, high]."""
    if low == high:
        low, high = (low - 1, high + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(start, stop + 1)]


def thinned(points: Points, most: int = _MOST_POINTS) -> Points:
    """At most about `most` points: the first, the last, and the lowest and highest of evenly many neighbours."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        span = range(start, min(start + size, len(points)))
        kept |= {min(span, key=lambda i: points[i][1]), max(span, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _figure(title: str, unit: str, lines: Sequence[Line], span: tuple[float, float], run: str | None = None) -> str:
    """run: whose metrics these are, several of which can be hidden here; None for lines of runs, hidden everywhere."""
    kind = "r" if run is None else "s"
    ys = [y for line in lines for _, y in line.points]
    ticks = axis_ticks(min(ys), max(ys))
    first, last = span
    width = max(last - first, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return _LEFT + (_RIGHT - _LEFT) * (x - first) / width, _BOTTOM - (_BOTTOM - _TOP) * share

    rows = [(place(first, tick)[1], tick) for tick in ticks]
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
        f'<text class="y" x="{_LEFT - 6}" y="{y + 3:.1f}">{tick:.4g}</text>'
        for y, tick in rows
    )
    start = f"{first:g}" if first else "before"
    axis = f'<text x="{_LEFT}" y="154">{start}</text><text class="end" x="{_RIGHT}" y="154">iteration {last:g}</text>'
    cross = f'<path class="cross" d="M0 {_TOP}V{_BOTTOM}"/>'
    drawn = "".join(_line(line, kind, place) for line in lines)
    name = f"k{zlib.crc32(f'{run} {title}'.encode()):08x}"  # the same whenever the page is written again
    hidden_by = f"{name}-" if run is not None and len(lines) > 1 else ""
    legend = "".join(_key(line, kind, hidden_by) for line in lines)
    small = f" <small>{escape(unit)}</small>" if unit else ""
    spoken = escape(title + (f", {unit}" if unit else ""))
    words = escape(" ".join(_in_words(line.label, line.points) for line in lines))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{small}</figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 320 160" role="img" aria-label="{spoken}. {words}" data-first="{first:g}" '
        f'data-last="{last:g}"><desc>{words}</desc>{grid}{axis}{drawn}{cross}</svg></figure>'
    )


def _key(line: Line, kind: str, hidden_by: str) -> str:
    """A line's entry in the legend. hidden_by: how the id of a box that hides it begins; "" is none."""
    inside = f"{sample(line.style, kind)}<span>{escape(line.label)}</span> <b>{_ends(line.points)}</b>"
    if not hidden_by:
        return f'<span class="key of-{kind}{line.style}">{inside}</span>'
    box = f'<input type="checkbox" id="{hidden_by}{line.style}" checked>'
    return f'<label class="key of-{kind}{line.style}">{box}{inside}</label>'


def _points(name: str, scale: float, records: Sequence[Record]) -> Points:
    """Scaled values wherever one was logged; null stands for one that was not finite."""
    pairs = ((record["iteration"], record.get(name)) for record in records)
    return [(iteration, scale * value) for iteration, value in pairs if isinstance(value, int | float)]


def _ends(points: Points) -> str:
    """The last value, after that before training where there is one."""
    (first, before), (_, last) = points[0], points[-1]
    return f"{last:.4g}" if first or len(points) == 1 else f"{before:.4g} → {last:.4g}"


def _in_words(label: str, points: Points) -> str:
    """What somebody who cannot see the line should know of it."""
    (first, start), (last, end) = points[0], points[-1]
    when = f"at iteration {first:g}" if first else "before training"
    if len(points) == 1:
        return f"{label}: {start:.4g} {when}."
    values = [value for _, value in points]
    return (
        f"{label}: {start:.4g} {when}, {end:.4g} at iteration {last:g}; "
        f"{len(points)} values from {min(values):.4g} to {max(values):.4g}."
    )


def _line(line: Line, kind: str, place: Callable[[float, float], tuple[float, float]]) -> str:
    points = thinned(line.points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    count = len(points) if len(points) <= _ALL_MARKED else _MARKERS
    marked = [points[round(k * (len(points) - 1) / max(count - 1, 1))] for k in range(count)]
    markers = "".join(_marker(line.style, *place(*point), 3) for point in marked)
    values = " ".join(f"{value:.4g}" for _, value in points)
    return (
        f'<g class="line {kind}{line.style} c{line.style}" data-i="{_iterations(points)}" data-v="{values}">'
        f'<polyline points="{path}"/>{markers}</g>'
    )


def _iterations(points: Points) -> str:
    """Of the points: "1:72" where none is missing, else all of them."""
    found = [iteration for iteration, _ in points]
    whole = found[-1] - found[0] == len(found) - 1
    return f"{found[0]:g}:{found[-1]:g}" if whole else " ".join(f"{iteration:g}" for iteration in found)


def _marker(style: int, x: float, y: float, size: float) -> str:
    """A circle, a square, a triangle or a diamond; filled, and from the fifth on hollow."""
    name = "dot" if style <= 4 else "dot hollow"
    shape = (style - 1) % 4
    if shape == 0:
        return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if shape == 1:
        place = f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"'
        return f'<rect class="{name}" {place}/>'
    reach = 1.3 * size
    if shape == 2:
        corners = f"M{x:.1f} {y - reach:.1f}L{x + reach:.1f} {y + size:.1f}H{x - reach:.1f}Z"
    else:
        corners = f"M{x:.1f} {y - reach:.1f}l{reach} {reach}l{-reach} {reach}l{-reach} {-reach}Z"
    return f'<path class="{name}" d="{corners}"/>'
