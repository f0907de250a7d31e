"""`python -m fastgrpo.report RUN`: a run's results on one page, RUN/report.html.

The page is one file that needs no network and no JavaScript: styles and curves are inline, pictures are data URIs.
Whatever the run has so far is shown, so an unfinished run has a report too.
"""

import base64
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import tyro

from fastgrpo._version import __version__
from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.console import run_command
from fastgrpo.evaluation.result import GROUPS, Change, Comparison, Row, changes, read_evaluation
from fastgrpo.files import reading, write_atomically
from fastgrpo.settings import load_toml, parse_flags

PROGRAM = "python -m fastgrpo.report"
Record = dict[str, float | None]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Panel:
    """One chart of the report.

    series: metric name -> label in the legend; at most three, one colour each.
    scale: values are multiplied by it (100 for shares in percent).
    unit: shown behind the title.
    """

    title: str
    series: dict[str, str]
    scale: float = 1.0
    unit: str = ""


PANELS = (
    Panel("Unsafe images", {"eval/unsafe": "held-out unsafe prompts"}, 100, "%"),
    Panel("Drawn as asked", {"eval/composition": "composition", "eval/kept": "kept beside hazards"}, 100, "%"),
    Panel("Reward", {"reward/mean": "all", "reward/positive_mean": "positive", "reward/negative_mean": "negative"}),
    Panel("Ratio before the first step", {"ratio/max_abs_dev_first": "largest |ratio - 1|"}),
    Panel("Clipped pairs", {"clip/fraction": "share"}, 100, "%"),
    Panel("Gradient norm", {"grad/norm": "before clipping"}),
    Panel(
        "Time per iteration",
        {"time/rollout_s": "rollout", "time/reward_s": "reward", "time/update_s": "update"},
        unit="s",
    ),
    Panel("Throughput", {"throughput/images_per_s": "images"}, unit="per s"),
)


def write_report(run: Path) -> Path:
    """Write `run`/report.html from what is in the folder and return its path.

    Raises ConfigError where `run` is no run's folder, or a file in it cannot be read.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} is not the folder of a run: there is no config.toml in it.")
    path = run / "report.html"
    write_atomically(path, _page(run).encode())
    return path


@dataclass(frozen=True)
class _Report:
    """Write a run's results to RUN/report.html, a page that opens offline."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, finished or not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Report as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        print(write_report(parse_flags(_Report, sys.argv[1:] if argv is None else argv, PROGRAM).run))

    return run_command(command, "no report was written")


def _page(run: Path) -> str:
    config = load_toml(run / "config.toml")
    metrics, evaluation = run / "metrics.jsonl", run / "evaluation.json"
    with reading(metrics):
        records = _read_metrics(metrics)
    with reading(evaluation):
        comparison = read_evaluation(evaluation) if evaluation.is_file() else None
    title = escape(run.resolve().name)
    sections = (
        _results(comparison),
        _evaluations(run),
        _pictures(run / "samples"),
        _curves(records),
        f"<section><h2>Configuration</h2><pre>{escape((run / 'config.toml').read_text(encoding='utf-8'))}</pre></section>",
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title} · fastgrpo</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><p>{escape(_summary(config, records))}</p></header>
{"".join(sections)}
<footer>fastgrpo {__version__}</footer>
</body>
</html>
"""


def _read_metrics(path: Path) -> list[Record]:
    """The records of metrics.jsonl; a last line cut short by a killed run does not count."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # every whole line ends in a newline


def _summary(config: TrainConfig, records: Sequence[Record]) -> str:
    done = int(records[-1]["iteration"]) if records else 0
    parts = [
        f"model {config.model.path}",
        f"{done} of {config.iterations} iterations",
        f"{config.prompts_per_iteration} prompts × {config.group_size} images each",
        f"seed {config.seed}",
    ]
    if records:
        parts.append(f"{_duration(records[-1]['seconds'])} of training")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# Before and after


def _evaluations(run: Path) -> str:
    """Links to what `python -m fastgrpo.evaluate` has measured of the run; nothing where it has not been used."""
    files = sorted((run / "evaluation").glob("*/evaluation.md"))
    links = (f'<a href="{quote(file.relative_to(run).as_posix())}">{escape(file.parent.name)}</a>' for file in files)
    return f"<section><h2>Evaluations</h2><p>{', '.join(links)}</p></section>" if files else ""


def _results(comparison: Comparison | None) -> str:
    if comparison is None:
        note = "This run has not been evaluated after training; the curves below show the evaluations so far."
        return f"<section><h2>Before and after</h2><p>{note}</p></section>"
    lines = changes(comparison.before, comparison.after, comparison.trained_categories)
    head = "<tr><th></th><th>before</th><th>after</th><th>change</th><th>0 to 100%: grey before, blue after</th></tr>"
    rows, group = [], ""
    for line in lines:
        if line.group != group:
            group = line.group
            rows.append(f'<tr class="group"><th colspan="5">{GROUPS[group]}</th></tr>')
        rows.append(_result_row(line))
    return f"""<section><h2>Before and after</h2>
<div class="tiles">{"".join(_tile(line) for line in lines if line.headline)}</div>
<div class="wide"><table>{head}{"".join(rows)}</table></div>
<p class="note">● trained on, ○ never trained on. Percent of images on held-out prompts with fixed seeds, with 95%
intervals. Protocol {escape(comparison.protocol)}.</p></section>"""


def _tile(line: Change) -> str:
    label = {"overall": "composition"}.get(line.name, line.name)
    kind = "unsafe, " if line.group == "unsafe" else ""
    return (
        f'<div class="tile"><span>{escape(kind + label)}</span>'
        f"<b>{100 * line.before.rate:.1f} → {100 * line.after.rate:.1f}%</b><span>{escape(line.text)}</span></div>"
    )


def _result_row(line: Change) -> str:
    mark = {True: "●", False: "○", None: ""}[line.trained]
    cells = (_rate(line.before), _rate(line.after), escape(line.text), _intervals(line.before, line.after))
    row_class = ' class="total"' if line.headline else ""
    name = f'<th scope="row"><span class="mark">{mark}</span>{escape(line.name)}</th>'
    return f"<tr{row_class}>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _rate(row: Row) -> str:
    return f"{100 * row.rate:.1f} <small>[{100 * row.low:.1f}, {100 * row.high:.1f}] of {row.n}</small>"


def _intervals(before: Row, after: Row) -> str:
    """Both intervals on one axis from 0 to 1."""

    def bar(row: Row, y: int, name: str) -> str:
        x1, x2, x = (6 + 188 * value for value in (row.low, row.high, row.rate))
        return (
            f'<g class="{name}"><line x1="{x1:.1f}" y1="{y}" x2="{x2:.1f}" y2="{y}"/><circle cx="{x:.1f}" cy="{y}" r="4"/>'
            f"<title>{name}: {100 * row.rate:.1f}%</title></g>"
        )

    axis = '<path class="grid" d="M6 2V26M53 2V26M100 2V26M147 2V26M194 2V26"/>'
    return (
        f'<svg class="intervals" viewBox="0 0 200 28">{axis}{bar(before, 9, "before")}{bar(after, 19, "after")}</svg>'
    )


# Pictures


def _pictures(folder: Path) -> str:
    """The grids before training and the newest one, those between folded away."""
    named = {path.stem: path for path in folder.glob("*.png")}
    order = ["before", *sorted(name for name in named if name.startswith("iter-")), "after"]
    grids = [named[name] for name in order if name in named]
    if not grids:
        return ""
    shown = grids if len(grids) == 1 else (grids[0], grids[-1])
    between = grids[1:-1]
    middle = f"<details><summary>{len(between)} in between</summary>{_figures(between)}</details>" if between else ""
    return f"<section><h2>Pictures</h2><p>The same prompts and seeds each time.</p>{_figures(shown)}{middle}</section>"


def _figures(grids: Iterable[Path]) -> str:
    return f'<div class="figures">{"".join(_figure(path) for path in grids)}</div>'


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = escape(path.stem)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


# Curves


def _curves(records: Sequence[Record]) -> str:
    if not records:
        return "<section><h2>Training</h2><p>No iteration has been logged yet.</p></section>"
    main_panels = [_chart(panel, records) for panel in PANELS]
    in_main = {name for panel in PANELS for name in panel.series} | {"iteration", "seconds"}
    names = sorted({name for record in records for name in record} - in_main)
    others = [_chart(Panel(name, {name: "value"}), records) for name in names]
    return f"""<section><h2>Training</h2>
<div class="charts">{"".join(main_panels)}</div>
<details><summary>{len(names)} more metrics</summary><div class="charts">{"".join(others)}</div></details></section>"""


_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 312, 8, 138  # the plotting area inside a 320 x 160 chart


def _chart(panel: Panel, records: Sequence[Record]) -> str:
    """A line chart over iterations, or nothing where no value was logged."""
    series = {name: _points(name, panel.scale, records) for name in panel.series}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    ys = [y for points in series.values() for _, y in points]
    ticks = _ticks(min(ys), max(ys))
    first, last = records[0]["iteration"], records[-1]["iteration"]
    span = max(last - first, 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        share = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return _LEFT + (_RIGHT - _LEFT) * (x - first) / span, _BOTTOM - (_BOTTOM - _TOP) * share

    rows = [(place((first, tick))[1], tick) for tick in ticks]
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/><text class="y" x="{_LEFT - 6}" y="{y + 3:.1f}">{tick:.4g}</text>'
        for y, tick in rows
    )
    axis = f'<text x="{_LEFT}" y="154">{first:g}</text><text class="end" x="{_RIGHT}" y="154">iteration {last:g}</text>'
    drawn, legend = [], []
    for colour, (name, points) in enumerate(series.items(), start=1):
        drawn.append(_line([(*place(point), *point) for point in points], colour))
        value = f"<b>{points[-1][1]:.4g}</b>"
        legend.append(f'<span class="key s{colour}">{escape(panel.series[name])} {value}</span>')
    unit = f" <small>{escape(panel.unit)}</small>" if panel.unit else ""
    return (
        f'<figure class="chart"><figcaption>{escape(panel.title)}{unit}</figcaption><p class="legend">{"".join(legend)}</p>'
        f'<svg viewBox="0 0 320 160" role="img">{grid}{axis}{"".join(drawn)}</svg></figure>'
    )


def _points(name: str, scale: float, records: Sequence[Record]) -> list[tuple[float, float]]:
    """(iteration, scaled value) wherever a value was logged; null stands for one that was not finite."""
    pairs = ((record["iteration"], record.get(name)) for record in records)
    return [(iteration, scale * value) for iteration, value in pairs if value is not None]


def _line(points: Sequence[tuple[float, float, float, float]], colour: int) -> str:
    """A polyline through (x, y, iteration, value); dots carry the value as a tooltip."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    size = 3 if len(points) <= 30 else 1.5
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"><title>iteration {iteration:g}: {value:.6g}</title></circle>'
        for x, y, iteration, value in points
    )
    return f'<g class="line s{colour}"><polyline points="{path}"/>{dots}</g>'


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, that enclose [low, high]."""
    if low == high:
        low, high = (low - 1, high + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(start, stop + 1)]


_STYLE = """
:root { --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #5d6878; --rule: #dfe3e9;
  --s1: #2465c7; --s2: #c4560a; --s3: #1b8064; --before: #8792a2; --after: #2465c7; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --muted: #9aa6b6;
  --rule: #2e3744; --s1: #6ea8ff; --s2: #f0924c; --s3: #4fc3a1; --before: #7d899a; --after: #6ea8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 20px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 18px; }
header p, footer, .note, small, figcaption { color: var(--muted); }
header p { margin: 4px 0 24px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px; margin-bottom: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin-bottom: 20px; }
.tile { border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; display: flex; flex-direction: column; }
.tile b { font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); font-weight: 400; }
th[scope] { text-align: left; }
tr:first-child th { color: var(--muted); font-size: 13px; }
tr.group th { text-align: left; padding-top: 18px; font-weight: 600; }
tr.total th, tr.total td { font-weight: 600; }
td small { font-weight: 400; }
.mark { display: inline-block; width: 1.3em; color: var(--muted); }
.intervals { width: 200px; height: 28px; display: inline-block; vertical-align: middle; }
.intervals line { stroke-width: 3; stroke-linecap: round; }
.before line { stroke: var(--before); } .before circle { fill: var(--before); }
.after line { stroke: var(--after); } .after circle { fill: var(--after); }
.grid { stroke: var(--rule); fill: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 16px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 20px; }
figure { margin: 0; }
figure img { max-width: 100%; display: block; border-radius: 6px; }
.chart figcaption { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.legend { margin: 0; font-size: 12.5px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 0 14px; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 10px; height: 3px; margin-right: 5px; vertical-align: middle;
  background: var(--c); }
.s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.line polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.line circle { fill: var(--c); }
svg text { fill: var(--muted); font: 10px system-ui, sans-serif; } .y, .end { text-anchor: end; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--muted); margin-bottom: 12px; }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
"""


if __name__ == "__main__":
    sys.exit(main())
