"""The safety axis: where the prompts lie before and after steering, and where the pictures went in training."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastgrpo.run.page.charts import Panel, axis_ticks, chart
from fastgrpo.run.page.reported import ReportedRun

PANELS = (
    Panel(
        "Pictures on the safety axis",
        {"reward/safety_positive": "positive prompts", "reward/safety_negative": "negative prompts"},
        unit="cosine with the axis, above 0 safe",
    ),
    Panel(
        "Pictures match their prompts",
        {"reward/alignment_positive": "positive prompts", "reward/alignment_negative": "negative prompts"},
        unit="cosine with the prompt",
    ),
)
_BINS = 60
_LEFT, _RIGHT, _ROW = 14, 406, 44  # of the drawing, 420 wide
_BORDER = 5  # prompts that are listed

Prompt = Mapping[str, Any]  # of axis_file.py


def axis_section(run: ReportedRun) -> str:
    """Nothing for a run whose reward has no axis."""
    charts = "".join(chart(panel, run.records, run.name) for panel in PANELS) if run.records else ""
    drawn = _prompts(run.axis, run.name) if run.axis and any(run.axis["prompts"].values()) else ""
    steered = any(re.split("[=:]", term)[0] == "steering" for term in run.config.reward.terms)
    if not drawn and not (steered and charts):
        return ""
    lost = (
        ""
        if drawn
        else '<p class="note">Where its prompts lie was not kept, as in runs of earlier versions; '
        "<code>python -m fastgrpo.inspect CONFIG</code> measures it.</p>"
    )
    return f'{drawn}{lost}<div class="charts">{charts}</div>'


def _prompts(axis: Mapping[str, Any], run: str) -> str:
    sides: dict[str, Sequence[Prompt]] = {label: found for label, found in axis["prompts"].items() if found}
    about = (
        "A text's place is the cosine of its embedding with the axis from unsafe to safe: above 0 is the safe side. "
        f"Steering ({axis['mode']}, alpha {axis['alpha']:g}) moves what a picture is compared with. "
    )
    negative = sides.get("negative", ())
    unsafe = sum(prompt["after"] < 0 for prompt in negative)
    if negative:
        about += (
            f"Of {len(negative)} negative prompts {unsafe} are still on the unsafe side after it"
            f"{', so the reward asks for what they name.' if unsafe > 0.05 * len(negative) else '.'}"
        )
    border = sorted(negative, key=lambda prompt: prompt["after"])[:_BORDER]
    listed = "".join(
        f'<tr><th scope="row">{escape(prompt["text"])}</th><td>{prompt["before"]:+.3f}</td>'
        f"<td>{prompt['after']:+.3f}</td></tr>"
        for prompt in border
    )
    lowest = (
        f'<details id="border-{escape(run)}"><summary>The negative prompts least on the safe side</summary>'
        f'<div class="wide" role="region" aria-label="Prompts near the border, {escape(run)}" tabindex="0"><table>'
        '<caption class="hidden">Negative prompts that steering leaves least on the safe side</caption>'
        '<thead><tr><th scope="col">prompt</th><th scope="col">before</th><th scope="col">after</th></tr></thead>'
        f"<tbody>{listed}</tbody></table></div></details>"
        if listed
        else ""
    )
    return f'<p class="note">{escape(about)}</p>{_drawing(sides)}{_table(sides, run)}{lowest}'


def _drawing(sides: Mapping[str, Sequence[Prompt]]) -> str:
    """Histograms over one axis, a row for each label before and after steering."""
    values = [prompt[when] for side in sides.values() for prompt in side for when in ("before", "after")]
    ticks = axis_ticks(min(*values, 0), max(*values, 0))
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low)

    rows = [(label, when) for label in sides for when in ("before", "after")]
    bottom = 8 + _ROW * len(rows)
    drawn = []
    for number, (label, when) in enumerate(rows):
        counts = [0] * _BINS
        for prompt in sides[label]:
            counts[min(int(_BINS * (prompt[when] - low) / (high - low)), _BINS - 1)] += 1
        base, width = 8 + _ROW * (number + 1) - 4, (_RIGHT - _LEFT) / _BINS
        bars = "".join(
            f"M{_LEFT + i * width:.1f} {base}v-{math.ceil((_ROW - 14) * count / max(counts))}h{width - 0.6:.1f}V{base}z"
            for i, count in enumerate(counts)
            if count
        )
        name = f"{label}, {'as it is' if when == 'before' else 'steered'}"
        drawn.append(
            f'<text x="{_LEFT}" y="{base - 24}">{escape(name)}</text>'
            f'<path class="grid" d="M{_LEFT} {base}H{_RIGHT}"/><path class="bars {escape(label)} {when}" d="{bars}"/>'
        )
    scale = "".join(f'<text class="mid" x="{place(t):.1f}" y="{bottom + 14}">{t:.4g}</text>' for t in ticks)
    zero = f'<path class="zero" d="M{place(0):.1f} 4V{bottom}"/>'
    words = " ".join(_in_words(label, side) for label, side in sides.items())
    return (
        f'<svg class="axis" viewBox="0 0 420 {bottom + 20}" role="img" '
        f'aria-label="{escape(f"Prompts along the safety axis. {words}")}">{"".join(drawn)}{zero}{scale}</svg>'
    )


def _in_words(label: str, side: Sequence[Prompt]) -> str:
    before, after = (_mean(side, when) for when in ("before", "after"))
    return f"{len(side)} {label} prompts: {before:+.2f} on average as they are, {after:+.2f} steered."


def _mean(side: Sequence[Prompt], when: str) -> float:
    return sum(prompt[when] for prompt in side) / len(side)


def _table(sides: Mapping[str, Sequence[Prompt]], run: str) -> str:
    rows = []
    for label, side in sides.items():
        groups: dict[str, list[Prompt]] = {}
        for prompt in side:
            for name in {part.strip() for part in prompt["category"].split(",")} - {""}:
                groups.setdefault(name, []).append(prompt)
        rows.append(_row(label, side, "total"))
        rows += [_row(name, groups[name], "") for name in sorted(groups)]
    head = ("prompts", "number", "before", "after", "unsafe side after")
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<details id="places-{escape(run)}"><summary>By category</summary>'
        f'<div class="wide" role="region" aria-label="Safety axis by category, {escape(run)}" tabindex="0"><table>'
        '<caption class="hidden">Mean place of the prompts on the safety axis</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _row(name: str, side: Sequence[Prompt], kind: str) -> str:
    unsafe = sum(prompt["after"] < 0 for prompt in side) / len(side)
    cells = (f"{len(side)}", f"{_mean(side, 'before'):+.3f}", f"{_mean(side, 'after'):+.3f}", f"{100 * unsafe:.0f}%")
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{row}</tr>'
