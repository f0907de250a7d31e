"""Whole iterations and their stages, ours beside the plain trainer's; what is to hold of them; and the roofline.

On CUDA the paper's shapes (`workload.paper`). On a CPU a quarter of the preset `shapes`, which is a real comparison of
real trainings there and says nothing about a GPU. `--throughput FOLDER` keeps what was measured, in step.json and
roofline.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from measure import CUDA, DEVICE, RecordedClock
from pytest_benchmark.fixture import BenchmarkFixture
from roofline import phases
from throughput import (
    RATES_OF,
    Check,
    about,
    checks,
    iterations,
    memory_check,
    ratio_check,
    step_config,
    step_trainings,
)
from workload import Ours, accounting_of

from fastgrpo.costs.throughput import Accounting

NAMES = tuple(step_trainings(step_config()))
STAGES = ("rollout", "update", "step")
CLOCK = RecordedClock()


@pytest.fixture(scope="module")
def accounting() -> Accounting:
    return accounting_of(step_config(), *RATES_OF)


@dataclass
class Measured:
    """rows: by training, one of each iteration. checks: of ours. parameters: that it trains."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in NAMES})
    checks: list[Check] = field(default_factory=list)
    parameters: int = 0


@pytest.fixture(scope="module")
def measured(pytestconfig: pytest.Config, accounting: Accounting, record: Any, in_time: Callable[[], bool]) -> Measured:
    """What is to hold is looked at as soon as an iteration of ours is done."""
    result, repeats = Measured(), pytestconfig.getoption("--repeats")
    kept = record("step", rates=accounting.rates.to_json(), **about())
    builders = step_trainings(step_config())
    for name, training, row in iterations(builders, repeats, accounting, kept.fail, in_time):
        result.rows[name].append(row)
        kept.add(**row)
        if isinstance(training, Ours) and not result.checks:
            result.parameters = sum(p.numel() for p in training.loaded.trainable.parameters.values())
            if CUDA:
                result.checks.append(
                    memory_check(training.planned_gigabytes(), row["values"]["memory/peak_gb"], training.compiled)
                )
            result.checks += [ratio_check(row["values"]["ratio/max_abs_dev_first"]), *checks(training)]
            kept.note("checks", name, [check.to_json() for check in result.checks])
        del training  # the next one would not fit beside it on a GPU
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_iteration(stage: str, name: str, measured: Measured, benchmark: BenchmarkFixture) -> None:
    """Seconds of an iteration (`step`) or of a stage; `images/s` beside it."""
    benchmark.group = f"{stage} on {DEVICE.type}"
    rows = measured.rows[name]
    assert rows, "it failed; see step.json"
    seconds = [_seconds(row["values"], stage) for row in rows]
    benchmark.extra_info["images_per_s"] = [row["images"] / took for row, took in zip(rows, seconds, strict=True)]
    CLOCK.replay(benchmark, seconds)
    assert min(seconds) > 0


def test_checks(measured: Measured) -> None:
    """Nothing waits for the device inside a rollout or a micro-batch, and memory is as planned."""
    broken = [check for check in measured.checks if not check.holds]
    assert not broken, "; ".join(f"{check.name}: {check.seen}" for check in broken)


def test_roofline(measured: Measured, accounting: Accounting, record: Any) -> None:
    """The least an iteration can take by the device's own rates, phase by phase, beside what it took."""
    found = phases(step_config(), accounting, measured.parameters, measured.rows["fastgrpo"])
    kept = record("roofline", rates=accounting.rates.to_json(), **about())
    for phase in found:
        kept.add(**phase.to_json())
    assert all(phase.floor > 0 for phase in found)


def _seconds(values: dict[str, float], stage: str) -> float:
    if stage != "step":
        return values[f"time/{stage}_s"]
    return sum(values[f"time/{part}_s"] for part in ("rollout", "reward", "update"))
