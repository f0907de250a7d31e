"""What a run's report says of the guard's alarms: when they were on, and what was beyond its limit."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from fastgrpo.guard.alarm import WATCHED, standing
from fastgrpo.run.page.charts import Panel, Record, chart
from fastgrpo.run.page.reported import ReportedRun
from fastgrpo.settings.schema import GuardConfig

PANELS = (
    Panel(
        "Pictures of positive prompts",
        {
            "guard/diversity_within": "diversity within a prompt",
            "guard/diversity_between": "between prompts",
        },
        100,
        "% of the base model's own",
    ),
    Panel(
        "How well they match the prompts",
        {"guard/alignment": "above or below the base model's"},
        1,
        "standard deviations of one prompt's images",
    ),
    Panel("Spread of a group's rewards", {"guard/reward_spread": "std"}, 100, "% of that of the first iterations"),
)


def alarms(run: ReportedRun) -> str:
    """Nothing for a run that was not watched."""
    watched = [record for record in run.records if record.get("guard/alarm") is not None]
    if not watched:
        return ""
    items = []
    for on, rows in groupby(watched, key=lambda record: bool(record["guard/alarm"])):
        if on:
            items.append(f'<li class="worse">{escape(_sentence(list(rows), run.config.guard))}</li>')
    calm = f'<li class="better">No alarm in {len(watched)} iterations.</li>'
    charts = "".join(chart(panel, watched, run.name) for panel in PANELS)
    return f'<ul class="verdicts">{"".join(items) or calm}</ul><div class="charts">{charts}</div>'


def _sentence(rows: Sequence[Record], guard: GuardConfig) -> str:
    """Of the iterations of one alarm."""
    first, last = rows[0], rows[-1]["iteration"]
    when = f"iterations {first['iteration']} to {last}" if last > first["iteration"] else f"iteration {last}"
    values = {name: first[f"guard/{name}"] for name in WATCHED if first.get(f"guard/{name}") is not None}
    why = "; ".join(standing(values, guard))
    return f"Alarm in {when}: {why}" if why else f"Alarm in {when}"
