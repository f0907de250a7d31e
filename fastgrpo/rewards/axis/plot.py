"""The safety axis as a picture: where the prompts lie before and after steering, and what every alpha does to them."""

import io
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastgrpo.rewards.axis.report import AxisReport, Bins, SweepRow
from fastgrpo.types import NEGATIVE, POSITIVE

_COLOURS = {POSITIVE: "#2a7f4f", NEGATIVE: "#b3261e"}
_BINS = 100


def axis_png(report: AxisReport, rows: Sequence[SweepRow], title: str) -> bytes:
    """Draw a PNG of 1500 x 800 pixels: histograms of z_text . v_safe at the left, the sweep's curves at the right.

    report: of both labels. rows: its sweep, ascending in alpha.
    """
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")  # no pyplot: nothing global, no display
    figure.suptitle(title, parse_math=False, wrap=True)
    panels: dict[str, Axes] = figure.subplot_mosaic([["before", "share"], ["after", "shifts"]])
    panels["after"].sharex(panels["before"])
    panels["shifts"].sharex(panels["share"])
    _plot_histogram(panels["before"], report, "before", "texts as they are")
    _plot_histogram(panels["after"], report, "after", f"targets after steering ({report.mode}, alpha {report.alpha:g})")
    _plot_safe_share(panels["share"], report, rows)
    _plot_shifts(panels["shifts"], report, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plot_histogram(axes: Axes, report: AxisReport, when: str, title: str) -> None:
    """when: "before" or "after"."""
    bins = Bins.covering(torch.cat([torch.cat([s.before, s.after]) for s in report.sides.values()]), _BINS)
    for label, side in report.sides.items():
        axes.stairs(
            bins.count(getattr(side, when)),
            bins.edges(),
            fill=True,
            alpha=0.6,
            color=_COLOURS[label],
            label=f"{label} ({len(side)})",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set(title=title, xlabel="cosine with v_safe (above 0: safe side)", ylabel="prompts")
    axes.legend()


def _plot_safe_share(axes: Axes, report: AxisReport, rows: Sequence[SweepRow]) -> None:
    axes.plot([row.alpha for row in rows], [1 - row.unsafe for row in rows], color=_COLOURS[NEGATIVE])
    mean, most = report.alpha_mean, report.alpha_most
    axes.axvline(mean, color="grey", linestyle="-.", label=f"their mean crosses at {mean:.3f}")
    axes.axvline(most, color="grey", linestyle=":", label=f"95% have crossed at {most:.3f}")
    _mark_alpha(axes, report)
    axes.set(title="negatives on the safe side", ylabel="share", ylim=(-0.02, 1.02))


def _plot_shifts(axes: Axes, report: AxisReport, rows: Sequence[SweepRow]) -> None:
    for label in report.sides:
        cosines = [row.shifts[label].cosine for row in rows]
        axes.plot([row.alpha for row in rows], cosines, color=_COLOURS[label], label=label)
    _mark_alpha(axes, report)
    axes.set(title="how far targets move from their texts", xlabel="alpha", ylabel="mean cosine of target and text")


def _mark_alpha(axes: Axes, report: AxisReport) -> None:
    axes.axvline(report.alpha, color="black", linewidth=1, linestyle="--", label=f"alpha {report.alpha:g}")
    axes.grid(alpha=0.3)
    axes.legend()
