"""The same result sooner: what recipes take on preset `shapes` until pictures are safe and nothing else is lost.

The result is there at the first evaluated iteration that has at most a quarter of the unsafe images of before (the
study's `SAFER`), and whose composition and diversity are not below the low end of the 95% interval that they had before
(`fastgrpo.run.best`'s conditions). Evaluations in between are of a quarter of the held-out prompts; what they take is
not counted.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit

from fastgrpo.costs.throughput import STAGES
from fastgrpo.evaluation.results.summary import read_before
from fastgrpo.grpo.steps import pairs_per_iteration, rollout_schedule
from fastgrpo.models.check import describe
from fastgrpo.run import best
from fastgrpo.settings.toml import load_toml
from fastgrpo.shapes_lab.study_table import SAFER

EVALUATED = ("--eval.every", "4", "--guard.action", "warn")
"""Flags of all: more evaluations than the preset has, since the result is only seen in one."""
_BRANCHES = ("--rollout.stochastic", "window", "--rollout.solver-outside", "dpm++", "--grpo.window-every", "1")
_BRANCHES += ("--rollout.initial-noise", "per_prompt", "--rollout.branches", "8", "--eval.steps", "12")

RECIPES: dict[str, tuple[str, ...]] = {
    "shapes": (),
    "a third of the iterations": ("--iterations", "24", "--optim.warmup", "6"),
    "half the steps, best 4 of 8": (
        *("--rollout.steps", "6", "--grpo.drop-last-steps", "2", "--grpo.best-of", "4", "--eval.steps", "12"),
    ),
    "one step with noise, branching into 8": (
        *(*_BRANCHES, "--grpo.window", "1", "--grpo.window-stride", "3", "--rollout.steps-outside", "6"),
        *("--prompts-per-iteration", "24", "--prompts.negative-fraction", "0.3333"),
    ),
}
"""What a recipe is called -> the flags by which it differs from the preset."""


@dataclass(frozen=True)
class Spent:
    """What a run had done when the result was there.

    flop: of rollouts and updates, as `fastgrpo.costs.throughput` counts them. pairs: (sample, step) pairs learned from.
    seconds: of rollouts, rewards and updates.
    """

    iterations: int
    flop: float
    pairs: int
    images: int
    seconds: float


def read_spent(run: Path) -> Spent | None:
    """What a finished run of preset `shapes` took; None where the result never was there."""
    iteration = reached(read_before(run), _evaluations(run))
    if iteration is None:
        return None
    config = load_toml(run / "config.toml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    flop, seconds = work(lines, iteration)
    schedule = rollout_schedule(describe(config.model).scheduler, config, torch.device("cpu"))
    pairs = iteration * pairs_per_iteration(config, schedule)
    return Spent(iteration, flop, pairs, iteration * config.prompts_per_iteration * config.group_size, seconds)


def reached(before: Mapping[str, Any] | None, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
    """The first evaluated iteration with the result. before: a run's `read_before`. evaluations: of its best.json."""
    if before is None or "eval/unsafe" not in before["metrics"]:
        return None
    few = SAFER * before["metrics"]["eval/unsafe"]
    return next((each["iteration"] for each in evaluations if each["unsafe"] <= few and not each["fails"]), None)


def work(lines: Sequence[Mapping[str, float]], iteration: int) -> tuple[float, float]:
    """FLOP, and seconds without evaluations, of the first `iteration` iterations. lines: of metrics.jsonl."""
    own = [line for line in lines if 1 <= line["iteration"] <= iteration]
    flop = sum(1e12 * line[f"throughput/{stage}_tflops"] * line[f"time/{stage}_s"] for line in own for stage in STAGES)
    return flop, sum(line[f"time/{stage}_s"] for line in own for stage in (*STAGES, "reward"))


def table(found: Mapping[str, Sequence[Spent | None]]) -> list[str]:
    """A Markdown table's lines: means with 95% t intervals over the runs that reached the result. found: by recipe."""
    lines = ["| recipe | reached | iterations | TFLOP | pairs | images | s |", "|---|---|---|---|---|---|---|"]
    for name, runs in found.items():
        there = [run for run in runs if run]
        cells = [name, f"{len(there)} of {len(runs)}"]
        for field, unit, form in _COLUMNS:
            cells.append(_mean([getattr(run, field) / unit for run in there], form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_COLUMNS = (
    ("iterations", 1, ".0f"),
    ("flop", 1e12, ".2f"),
    ("pairs", 1, ",.0f"),
    ("images", 1, ",.0f"),
    ("seconds", 1, ".0f"),
)


def _mean(numbers: Sequence[float], form: str) -> str:
    """The mean and its interval, as far as there are numbers for one."""
    if not numbers:
        return "–"
    mean, count = statistics.fmean(numbers), len(numbers)
    if count == 1:
        return f"{mean:{form}}"
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(numbers) / math.sqrt(count)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def _evaluations(run: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = json.loads(best.best_file(run).read_text(encoding="utf-8"))["evaluations"]
    return found
