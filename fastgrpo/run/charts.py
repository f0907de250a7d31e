"""Line charts of a run's metrics over iterations, as SVG: described in words, and legible without colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl, numbers or None; or iteration 0: the policy before training
Points = list[tuple[float, float]]  # (iteration, value)


@dataclass(frozen=True)
class Panel:
    """One chart.

    series: metric name -> label in the legend; at most three, each of a colour, a dash and a marker of its own.
    scale: values are multiplied by it (100 for shares in percent). unit: shown behind the title.
    """

    title: str
    series: dict[str, str]
    scale: float = 1.0
    unit: str = ""


_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 312, 8, 138  # the plotting area inside a 320 x 160 chart


def chart(panel: Panel, records: Sequence[Record]) -> str:
    """A line chart over all iterations of `records`, or nothing where no value was logged."""
    found = {name: points for name in panel.series if (points := _points(name, panel.scale, records))}
    if not found:
        return ""
    ys = [y for points in found.values() for _, y in points]
    ticks = axis_ticks(min(ys), max(ys))
    first, last = records[0]["iteration"], records[-1]["iteration"]
    span = max(last - first, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return _LEFT + (_RIGHT - _LEFT) * (x - first) / span, _BOTTOM - (_BOTTOM - _TOP) * share

    rows = [(place(first, tick)[1], tick) for tick in ticks]
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
        f'<text class="y" x="{_LEFT - 6}" y="{y + 3:.1f}">{tick:.4g}</text>'
        for y, tick in rows
    )
    start = f"{first:g}" if first else "before"
    axis = f'<text x="{_LEFT}" y="154">{start}</text><text class="end" x="{_RIGHT}" y="154">iteration {last:g}</text>'
    drawn, legend = [], []
    for number, (name, points) in enumerate(found.items(), start=1):
        drawn.append(_line([(*place(*point), *point) for point in points], number))
        label = f"{escape(panel.series[name])} <b>{_ends(points)}</b>"
        legend.append(f'<span class="key">{_sample(number)}{label}</span>')
    unit = f" <small>{escape(panel.unit)}</small>" if panel.unit else ""
    title = escape(panel.title + (f", {panel.unit}" if panel.unit else ""))
    words = escape(" ".join(_in_words(panel.series[name], points) for name, points in found.items()))
    return (
        f'<figure class="chart"><figcaption>{escape(panel.title)}{unit}</figcaption>'
        f'<p class="legend">{"".join(legend)}</p>'
        f'<svg viewBox="0 0 320 160" role="img" aria-label="{title}. {words}">'
        f"<title>{title}</title><desc>{words}</desc>"
        f"{grid}{axis}{''.join(drawn)}</svg></figure>"
    )


def axis_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, that enclose [low, high]."""
    if low == high:
        low, high = (low - 1, high + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(start, stop + 1)]


def _points(name: str, scale: float, records: Sequence[Record]) -> Points:
    """Scaled values wherever one was logged; null stands for one that was not finite."""
    pairs = ((record["iteration"], record.get(name)) for record in records)
    return [(iteration, scale * value) for iteration, value in pairs if value is not None]


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


def _line(points: Sequence[tuple[float, float, float, float]], number: int) -> str:
    """A polyline through (x, y, iteration, value), values as its markers' tooltips. number: of the series, from 1."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    size = 3 if len(points) <= 30 else 1.5
    markers = "".join(
        _marker(number, x, y, size, f"{f'iteration {iteration:g}' if iteration else 'before training'}: {value:.6g}")
        for x, y, iteration, value in points
    )
    return f'<g class="line s{number}"><polyline points="{path}"/>{markers}</g>'


def _marker(number: int, x: float, y: float, size: float, tooltip: str) -> str:
    """A circle, a square or a triangle."""
    title = f"<title>{tooltip}</title>" if tooltip else ""
    if number == 1:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{title}</circle>'
    if number == 2:
        place = f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"'
        return f'<rect class="dot" {place}>{title}</rect>'
    reach = 1.3 * size
    corners = f"M{x:.1f} {y - reach:.1f}L{x + reach:.1f} {y + size:.1f}H{x - reach:.1f}Z"
    return f'<path class="dot" d="{corners}">{title}</path>'


def _sample(number: int) -> str:
    """A piece of the series' line, for the legend."""
    drawn = '<polyline points="0,6 34,6"/>' + _marker(number, 17, 6, 3, "")
    return f'<svg class="sample line s{number}" viewBox="0 0 34 12" aria-hidden="true">{drawn}</svg>'


STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 20px; }
.chart figcaption { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.legend { margin: 0; font-size: 12.5px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 0 14px; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.sample { width: 34px; height: 12px; margin-right: 5px; vertical-align: middle; }
.s1 { --c: var(--s1); --dash: none; } .s2 { --c: var(--s2); --dash: 7 3; } .s3 { --c: var(--s3); --dash: 2 2.5; }
.line polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round;
  stroke-dasharray: var(--dash); }
.line .dot { fill: var(--c); }
.grid { stroke: var(--rule); fill: none; }
svg text { fill: var(--muted); font: 10px system-ui, sans-serif; } .y, .end { text-anchor: end; }
"""
