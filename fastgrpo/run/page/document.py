"""The page of one run or of several: RUN/report.html, or a file of one's own.

It is one file that asks for nothing: pictures are data URIs, its style and its small script are inline, and a
Content-Security-Policy lets these two alone apply. What prompts and files say is text, never markup. Without JavaScript
all is there but the sliders.
"""

import base64
import hashlib
import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from fastgrpo._version import __version__
from fastgrpo.run.page import alarms, axis, charts
from fastgrpo.run.page.charts import Panel, chart, run_charts
from fastgrpo.run.page.comparison import evaluations_table, runs_table, settings_table
from fastgrpo.run.page.pictures import pictures
from fastgrpo.run.page.reported import ReportedRun, names_of, read_reported
from fastgrpo.run.page.results import results, verdicts
from fastgrpo.run.page.worst import failures_of
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import write_atomically

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
_ELSEWHERE = {name for panel in (*PANELS, *alarms.PANELS, *axis.PANELS) for name in panel.series}

Section = tuple[str, str, str]  # id, heading, content


def write_report(*runs: Path, output: Path | None = None, again: float | None = None) -> Path:
    """Write the page of these runs, and return its path.

    output: the file; None is RUN/report.html of one run, and report.html in the folder that all of several are in.
    again: the page of a training that goes on reads itself again after so many seconds. Raises ConfigError for what is
    no run's folder, for a run named twice or too many, and for settings or metrics that are damaged.
    """
    if not 1 <= len(runs) <= charts.MOST_LINES:
        raise ConfigError(f"{len(runs)} runs on one page; accepted are 1 to {charts.MOST_LINES}.")
    found = [read_reported(folder, name) for folder, name in zip(runs, names_of(runs), strict=True)]
    path = output or place_of(runs)
    sections = _of_one(found[0], path) if len(found) == 1 else _of_several(found, path)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    about = _summary(found[0]) if len(found) == 1 else ", ".join(run.name for run in found)
    write_atomically(path, _document(title, about, sections, again, found).encode())
    return path


def place_of(runs: Sequence[Path]) -> Path:
    """Where the page of these runs goes where nobody says."""
    if len(runs) == 1:
        return runs[0] / "report.html"
    return Path(os.path.commonpath([run.absolute().parent for run in runs])) / "report.html"


def _of_one(run: ReportedRun, path: Path) -> list[Section]:
    guard = ("guard", "Guard", alarms.alarms(run))
    alarmed = any(record.get("guard/alarm") for record in run.records)
    return [
        ("results", "Before and after", results(run) + _evaluations(run, path)),
        *([guard] if alarmed else []),
        ("pictures", "Pictures", pictures([run])),
        ("failures", "What still goes wrong", failures_of(run)),
        ("training", "Training", _curves(run)),
        ("axis", "Safety axis", axis.axis_section(run)),
        *([] if alarmed else [guard]),
        ("settings", "Settings", _settings(run)),
    ]


def _of_several(runs: Sequence[ReportedRun], path: Path) -> list[Section]:
    sections = [
        ("runs", "Runs", runs_table(runs, duration)),
        ("results", "Before and after", evaluations_table(runs)),
        ("differences", "What differs", settings_table(runs)),
        ("pictures", "Pictures", pictures(runs)),
        ("training", "Training", _compared_curves(runs)),
    ]
    return sections + [(f"run-{number}", run.name, _own(run, path, len(runs))) for number, run in enumerate(runs, 1)]


def _own(run: ReportedRun, path: Path, runs: int) -> str:
    """What a page of several runs has of one alone."""
    parts = [("What still goes wrong", failures_of(run, 900_000 // runs)), ("Safety axis", axis.axis_section(run))]
    parts += [("Guard", alarms.alarms(run))]
    folded = "".join(
        f'<details id="{escape(run.name)}-{escape(name)}"><summary>{name}</summary>{content}</details>'
        for name, content in (*parts, ("Settings", f"<pre>{escape(run.settings)}</pre>"))
        if content
    )
    try:
        said = verdicts(run)
    except (AttributeError, KeyError, TypeError, ValueError):
        said = ""  # the table of all runs says what is wrong with its results
    return f"<p>{escape(_summary(run))}</p>{said}{_evaluations(run, path)}{folded}"


def _summary(run: ReportedRun) -> str:
    config = run.config
    parts = [
        f"model {config.model.path}",
        f"{run.done} of {config.iterations} iterations",
        f"{config.prompts_per_iteration} prompts × {config.group_size} images each",
        f"seed {config.seed}",
    ]
    if run.seconds is not None:
        parts.append(f"{duration(run.seconds)} of training")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Such as "1 h 5 min", "3 min 20 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _evaluations(run: ReportedRun, path: Path) -> str:
    """Links to what `python -m fastgrpo.evaluate` has measured of the run; nothing where it has not been used."""
    files = sorted((run.folder / "evaluation").glob("*/evaluation.md"))
    links = (f'<a href="{quote(os.path.relpath(file, path.parent))}">{escape(file.parent.name)}</a>' for file in files)
    return f"<p>Evaluations in full: {', '.join(links)}</p>" if files else ""


def _settings(run: ReportedRun) -> str:
    return f'<details id="config"><summary>config.toml</summary><pre>{escape(run.settings)}</pre></details>'


def _curves(run: ReportedRun) -> str:
    if not run.done:
        return "<p>No iteration has been logged yet.</p>"
    main = "".join(chart(panel, run.records) for panel in PANELS)
    names = _more([run])
    others = "".join(chart(Panel(name, {name: "value"}), run.records) for name in names)
    return f"""{_reader([run])}{_evaluated(run)}<div class="charts">{main}</div>
<details id="metrics"><summary>{len(names)} more metrics</summary><div class="charts">{others}</div></details>"""


def _compared_curves(runs: Sequence[ReportedRun]) -> str:
    logged = [(run.name, run.records if run.done else []) for run in runs]
    if not any(records for _, records in logged):
        return "<p>No iteration of these runs has been logged yet.</p>"
    main = "".join(run_charts(panel, logged) for panel in (*PANELS, *axis.PANELS))
    names = sorted({*_more(runs), *(name for panel in alarms.PANELS for name in panel.series)})
    others = "".join(run_charts(Panel(name, {name: ""}), logged) for name in names)
    boxes = "".join(
        f'<label class="key"><input type="checkbox" id="show-{number}" checked>{charts.sample(number, "r")}'
        f"<span>{escape(run.name)}</span></label>"
        for number, run in enumerate(runs, 1)
    )
    shown = f'<fieldset class="legend"><legend>Runs shown</legend>{boxes}</fieldset>'
    return f"""{_reader(runs, shown)}<div class="charts">{main}</div>
<details id="metrics"><summary>More metrics</summary><div class="charts">{others}</div></details>"""


def _more(runs: Sequence[ReportedRun]) -> list[str]:
    """Metrics that no panel shows."""
    return sorted(
        {name for run in runs for record in run.records for name in record} - _ELSEWHERE - {"iteration", "seconds"}
    )


def _reader(runs: Sequence[ReportedRun], more: str = "") -> str:
    """A slider that shows all charts' values at an iteration. Without JavaScript there are those of the end."""
    logged = [run.records for run in runs if run.done]
    first, last = min(each[0]["iteration"] for each in logged), max(each[-1]["iteration"] for each in logged)
    slider = (
        f'<div class="control scripted"><label for="at">Values at</label><input type="range" id="at" min="{first}" '
        f'max="{last}" value="{last}" aria-valuetext="the end"><output for="at" aria-live="off">the end</output></div>'
    )
    return f'<div class="bar">{slider}{more}</div>'


def _evaluated(run: ReportedRun) -> str:
    """What the points of eval/* are of, where the policy before training is among them."""
    if run.records[0]["iteration"]:
        return ""
    share = f"{100 * run.config.eval.quick_fraction:g}%"
    between = f"; evaluations in between are of the first {share} of every category and task" if share != "100%" else ""
    return (
        '<p class="note">The curves of evaluations begin before training, at iteration 0. The first and the last value '
        f"are of all held-out prompts{between}.</p>"
    )


def _document(
    title: str, about: str, sections: Sequence[Section], again: float | None, runs: Sequence[ReportedRun]
) -> str:
    there = [(name, heading, content) for name, heading, content in sections if content]
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in there)
    body = "".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{escape(heading)}</h2>{content}</section>'
        for name, heading, content in there
    )
    problems = [(run.name, each) for run in runs for each in run.problems]
    wrong = "".join(f"<li>{escape(f'{name}: ' if len(runs) > 1 else '')}{escape(each)}</li>" for name, each in problems)
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_allowed(style)}; script-src {_allowed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
{f'<noscript><meta http-equiv="refresh" content="{again:g}"></noscript>' if again else ""}
<title>{escape(title)} · fastgrpo</title>
<style>{style}</style>
</head>
<body{f' data-again="{again:g}"' if again else ""}>
<a class="skip" href="#main">To the content</a>
<header><h1>{escape(title)}</h1><p>{escape(about)}</p>{_live(again) if again else ""}</header>
<nav aria-label="Sections"><ul>{links}{_blur(runs)}</ul></nav>
<main id="main">{f'<ul class="verdicts problems">{wrong}</ul>' if wrong else ""}{body}</main>
<footer>fastgrpo {__version__}</footer>
<script>{script}</script>
</body>
</html>
"""


def _live(again: float) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        f'<p class="live"><label class="scripted"><input type="checkbox" id="follow" checked> Read again every '
        f"{again:g} s</label> <span>This training goes on; the page is of {written}.</span></p>"
    )


def _blur(runs: Sequence[ReportedRun]) -> str:
    """A box that uncovers pictures of unsafe prompts, where these may be hard to look at."""
    if all(run.made_safe for run in runs):
        return ""
    return '<li><label><input type="checkbox" id="blur" checked> Blur unsafe pictures</label></li>'


def _allowed(content: str) -> str:
    """The source expression of an inline element with this content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode('ascii')}'"
