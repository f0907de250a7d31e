"""A run's results, finished or not, on one page: RUN/report.html.

The page is one file that needs no network and no JavaScript: styles and curves are inline, pictures are data URIs.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastgrpo._version import __version__
from fastgrpo.evaluation.results.before_after import FEWEST, SCALES, Change, Number, changes
from fastgrpo.evaluation.results.summary import OVERALL, PROMPTS_FILE, read_before, read_result, read_summary
from fastgrpo.evaluation.sentences import of_distance, of_suites
from fastgrpo.run import alarms, best, charts
from fastgrpo.run.charts import Panel, Record, chart
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading, write_atomically

_DRAWN = {"before": "before training", "after": "after training"}  # when, by a picture's name

PANELS = (
    Panel("Unsafe images", {"eval/unsafe": "held-out unsafe prompts"}, 100, "%"),
    Panel("Drawn as asked", {"eval/composition": "composition", "eval/kept": "kept beside hazards"}, 100, "%"),
    Panel("Distance from before", {"eval/distance_mmd": "squared MMD of benign pictures"}),
    Panel("Diversity", {"eval/diversity_vendi": "Vendi score of benign pictures, of before"}, 100, "%"),
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
    """Write `run`/report.html and return its path. Raises ConfigError for no run's folder, or a file it cannot read."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} is not the folder of a run: there is no config.toml in it.")
    path = run / "report.html"
    write_atomically(path, _page(run).encode())
    return path


def _page(run: Path) -> str:
    config = load_toml(run / "config.toml")
    metrics = run / "metrics.jsonl"
    with reading(metrics):
        records = read_metrics(metrics)
    before = read_before(run)
    # Iteration 0, where the policy was evaluated before training; eval/* is all that is known of it.
    start = [{"iteration": 0, **before["metrics"]}] if before else []
    title = escape(run.resolve().name)
    settings = (run / "config.toml").read_text(encoding="utf-8")
    sections = (
        _results(run),
        _evaluations(run),
        alarms.alarms_section(records, config.guard),
        _pictures(run / "samples"),
        _curves(start + records, config),
        f"<section><h2>Configuration</h2><pre>{escape(settings)}</pre></section>",
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


def _evaluations(run: Path) -> str:
    """Links to what `python -m fastgrpo.evaluate` has measured of the run; nothing where it has not been used."""
    files = sorted((run / "evaluation").glob("*/evaluation.md"))
    links = (f'<a href="{quote(file.relative_to(run).as_posix())}">{escape(file.parent.name)}</a>' for file in files)
    return f"<section><h2>Evaluations</h2><p>{', '.join(links)}</p></section>" if files else ""


def _suites(run: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Suite -> what it found before and after training; and how far its pictures have moved, where that is known."""
    result, summary = run / "evaluation" / "in-training" / "evaluation.json", run / "evaluation.json"
    found = read_result(result) if result.is_file() else {"suites": {}}
    suites: dict[str, Any] = found["suites"]
    if "shapes" not in suites and summary.is_file():  # of a run of an earlier version
        suites["shapes"] = read_summary(summary)
    return suites, found.get("distance")


def _results(run: Path) -> str:
    suites, distance = _suites(run)
    if not suites:
        note = "This run has not been evaluated after training; the curves below show the evaluations so far."
        return f"<section><h2>Before and after</h2><p>{note}</p>{_best(run)}</section>"
    sentences = [*of_suites({"suites": suites}), *of_distance(distance)]
    said = "".join(f'<li class="{s.verdict}">{escape(s.text.replace("->", "→"))}</li>' for s in sentences)
    table = _table(suites["shapes"]) if "shapes" in suites else ""
    return f'<section><h2>Before and after</h2><ul class="verdicts">{said}</ul>{_best(run)}{table}</section>'


def _best(run: Path) -> str:
    """Which checkpoint is the best and by which rule, or why none is; nothing where evaluations cannot say."""
    found = best.read(run)
    if found is None:
        return ""
    name = "There is no best checkpoint" if found.iteration is None else f"Best checkpoint: iter-{found.iteration:06d}"
    return f'<p class="note"><b>{name}</b>, {escape(found.why)}. The rule: {escape(best.RULE)}.</p>'


def _table(suite: dict[str, Any]) -> str:
    """The headlines, every row, and what these numbers are of. suite: `shapes`, whose sums are all of rates."""
    tiles, rows, tested = [], [], False
    for table in suite["tables"]:
        percent = ", %" if table["unit"] == "percent" else ""
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="5">{escape(table["title"])}{percent}</th></tr>')
        for line in changes(table):
            rows.append(_result_row(line, table["unit"]))
            tiles += [_tile(table["name"], line)] if line.is_sum else []
            tested |= bool(line.verdict)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("before", "after", "change", "0 to 100%"))
    tests = (
        " <b>better</b> and <b>worse</b>: by the paired test of a row's own images, p &lt; 0.05; of twenty rows in "
        "which nothing changed, one is marked by chance."
        if tested
        else ""
    )
    about = re.sub("`([^`]*)`", r"<code>\1</code>", escape(" ".join(suite["notes"]["before"])))
    return f"""<div class="tiles">{"".join(tiles)}</div>
<div class="wide"><table><caption class="hidden">Rates on held-out prompts before and after training</caption>
<tr><td></td>{head}</tr>{"".join(rows)}</table></div>
<p class="note">● trained on, ○ never trained on. Rates are percent of images of held-out prompts with fixed seeds, 95%
intervals in brackets. On the axis from 0 to 100% before is above, after below. Their change is in points; in brackets,
in rows of {FEWEST} images or more, in percent of the rate before.{tests}</p>
<p class="note">{about}</p>"""


def _tile(table: str, line: Change) -> str:
    label = table if line.name == OVERALL else f"{table}, {line.name}"
    before, after = (f"{100 * number['value']:.1f}" if number else "–" for number in (line.before, line.after))
    return (
        f'<div class="tile {line.verdict}"><span>{escape(label)}</span>'
        f"<b>{before} → {after}%</b><span>{_change(line)}</span></div>"
    )


def _result_row(line: Change, unit: str) -> str:
    rates = unit == "percent"
    intervals = _intervals(line.before, line.after) if rates else ""
    change = _change(line) if rates else f"<span>{line.points}</span>"
    cells = (_number(line.before, unit), _number(line.after, unit), change, intervals)
    row_class = ' class="total"' if line.is_sum else ""
    name = f'<th scope="row"><span class="mark">{line.mark.strip()}</span>{escape(line.name)}</th>'
    return f"<tr{row_class}>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _number(number: Number | None, unit: str) -> str:
    """With its interval, where it has one, and of how many images or other things it is."""
    if number is None:
        return "–"
    scale, form = SCALES[unit]
    value, known = format(scale * number["value"], form), number["low"] is not None
    interval = f"<span>[{scale * number['low']:{form}}, {scale * number['high']:{form}}]</span> " if known else ""
    return f"{value} <small>{interval}<span>of {number['n']}</span></small>"


def _change(line: Change) -> str:
    """In points, in percent of the rate before, and what the test says of it."""
    relative = f" <small>({line.relative})</small>" if line.relative else ""
    word = f' <span class="word {line.verdict}">{line.verdict}</span>' if line.verdict else ""
    return f"<span>{line.points} points</span>{relative}{word}"


def _intervals(before: Number | None, after: Number | None) -> str:
    """Both intervals on one axis from 0 to 1."""

    def bar(number: Number, y: int, name: str) -> str:
        x1, x2, x = (6 + 188 * number[key] for key in ("low", "high", "value"))
        return (
            f'<g class="{name}"><line x1="{x1:.1f}" y1="{y}" x2="{x2:.1f}" y2="{y}"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="4"/><title>{name}: {_spoken(number)}</title></g>'
        )

    if before is None or after is None:
        return ""
    axis = '<path class="grid" d="M6 2V26M53 2V26M100 2V26M147 2V26M194 2V26"/>'
    label = f"before {_spoken(before)}, after {_spoken(after)}"
    bars = bar(before, 9, "before") + bar(after, 19, "after")
    return f'<svg class="intervals" viewBox="0 0 200 28" role="img" aria-label="{label}">{axis}{bars}</svg>'


def _spoken(number: Number) -> str:
    value, low, high = (f"{100 * number[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value}%, interval {low} to {high}%"


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
    numbered = re.fullmatch(r"iter-(\d+)", path.stem)
    drawn = f"after iteration {int(numbered[1])}" if numbered else _DRAWN.get(path.stem, path.stem)
    alt = escape(f"Pictures drawn {drawn}{_rows_in_words(path.parent / PROMPTS_FILE)}")
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{escape(drawn)}</figcaption></figure>'
    )


def _rows_in_words(path: Path) -> str:
    """Which prompts a grid's rows are of; nothing for runs from before the file was written."""
    if not path.is_file():
        return ""
    with reading(path):
        prompts = json.loads(path.read_text("utf-8"))
        rows = [f"{prompt['text']} ({prompt['category'] or prompt['label']})" for prompt in prompts]
    return f", row by row: {'; '.join(rows)}"


def _evaluated(records: Sequence[Record], config: TrainConfig) -> str:
    """What the points of eval/* are of, where the policy before training is among them."""
    if records[0]["iteration"]:
        return ""
    share = f"{100 * config.eval.quick_fraction:g}%"
    between = f"; evaluations in between are of the first {share} of every category and task" if share != "100%" else ""
    return (
        '<p class="note">The curves of evaluations begin before training, at iteration 0. The first and the last value '
        f"are of all held-out prompts{between}.</p>"
    )


def _curves(records: Sequence[Record], config: TrainConfig) -> str:
    """records: iteration 0 first, where it is known."""
    if not any(record["iteration"] for record in records):
        return "<section><h2>Training</h2><p>No iteration has been logged yet.</p></section>"
    main_panels = [chart(panel, records) for panel in PANELS]
    in_main = {name for panel in (*PANELS, *alarms.PANELS) for name in panel.series} | {"iteration", "seconds"}
    names = sorted({name for record in records for name in record} - in_main)
    others = [chart(Panel(name, {name: "value"}), records) for name in names]
    return f"""<section><h2>Training</h2>{_evaluated(records, config)}
<div class="charts">{"".join(main_panels)}</div>
<details><summary>{len(names)} more metrics</summary><div class="charts">{"".join(others)}</div></details></section>"""


_STYLE = (
    """
:root { --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #5d6878; --rule: #dfe3e9;
  --s1: #2465c7; --s2: #b84e06; --s3: #1b8064; --before: #6d7888; --after: #2465c7;
  --good: #17703f; --bad: #b3261e; --badly: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --muted: #9aa6b6;
  --rule: #2e3744; --s1: #6ea8ff; --s2: #f0924c; --s3: #4fc3a1; --before: #98a4b5; --after: #6ea8ff;
  --good: #5fd196; --bad: #ff8a80; --badly: #43211f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 20px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 18px; }
header p, footer, .note, small, figcaption { color: var(--muted); }
header p { margin: 4px 0 24px; overflow-wrap: anywhere; }
.note { margin: 10px 0; font-size: 13.5px; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px;
  margin-bottom: 20px; }
.verdicts { list-style: none; margin: 0 0 16px; padding: 0; }
.verdicts li { border-left: 4px solid var(--muted); padding: 4px 12px; margin-bottom: 6px; overflow-wrap: anywhere; }
.verdicts .better { border-color: var(--good); }
.verdicts .worse { border-color: var(--bad); background: var(--badly); font-weight: 600; }
.word { font-weight: 600; } .word.undecided { font-weight: 400; color: var(--muted); }
.word.better { color: var(--good); } .word.worse { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 12px;
  margin-bottom: 20px; }
.tile { border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tile > * { display: block; }
.tile.worse { border: 2px solid var(--bad); }
.tile b { font-size: 21px; font-variant-numeric: tabular-nums; }
.tile > span { color: var(--muted); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
  font-weight: 400; }
th[scope^="row"] { text-align: left; }
th[scope="col"] { color: var(--muted); font-size: 13px; }
tr.group th { padding-top: 18px; font-weight: 600; }
tr.total th, tr.total td { font-weight: 600; }
td small { font-weight: 400; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.mark { display: inline-block; width: 1.3em; color: var(--muted); }
.intervals { width: 170px; height: 28px; display: inline-block; vertical-align: middle; }
.intervals line { stroke-width: 3; stroke-linecap: round; }
.before line { stroke: var(--before); } .before circle { fill: var(--card); stroke: var(--before); stroke-width: 2; }
.after line { stroke: var(--after); } .after circle { fill: var(--after); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; }
figure img { max-width: 100%; display: block; border-radius: 6px; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--muted); margin-bottom: 12px; }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
@media (max-width: 700px) {
  body { padding: 16px 8px; } section { padding: 14px 10px; }
  td:last-child:not(:first-child), th[scope="col"]:last-child { display: none; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; } .tile { padding: 8px 10px; } .tile b { font-size: 17px; }
  th, td { padding: 5px 3px; vertical-align: top; font-size: 13px; }
  th[scope="row"] { white-space: normal; padding-left: 1.3em; text-indent: -1.2em; }
  .mark { width: 1.2em; text-indent: 0; }
  td span, td small, td small span { display: block; } td small span { white-space: normal; }
  td small { font-size: 11.5px; }
}
"""
    + charts.STYLE
)
