"""From the plain trainer to the whole engine, one technique a row.

On CUDA few steps are run and 50 computed from them (`throughput.Whole`); on a CPU iterations are run whole, by all rows
in turn, and only the rows that a CPU has. `--throughput FOLDER` keeps what was measured, in ladder.json.
"""

from collections.abc import Callable
from typing import Any

import pytest
from measure import CUDA, DEVICE, RecordedClock
from pytest_benchmark.fixture import BenchmarkFixture
from throughput import RATES_OF, Whole, iterations, ladder, ladder_config, rung_training, step_config
from workload import accounting_of

CONFIG = ladder_config()
RUNGS = {rung.name: rung for rung in ladder(CONFIG.micro_batch)}
CLOCK = RecordedClock()


@pytest.fixture(scope="module")
def measured(
    pytestconfig: pytest.Config, record: Any, in_time: Callable[[], bool]
) -> dict[str, list[dict[str, float]]]:
    """Name -> for every iteration, what it says of a whole one. A row that fails is left out, with its reason."""
    target = step_config()
    accounting = accounting_of(target, *RATES_OF)
    kept = record("ladder", rates=accounting.rates.to_json(), rungs=list(RUNGS), steps=target.rollout.steps)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in RUNGS}
    builders = {name: lambda rung=rung: rung_training(rung, CONFIG) for name, rung in RUNGS.items()}
    repeats = pytestconfig.getoption("--repeats") + int(CUDA)  # there the first compiles and captures
    for name, training, row in iterations(builders, repeats, accounting, kept.fail, in_time):
        whole = Whole.of(training, row["values"], target, accounting).row(accounting.rates.matmul)
        rows[name].append(whole)
        kept.add(**row | {"values": whole, "measured": row["values"]})
        del training  # the next one would not fit beside it on a GPU
    return rows


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", RUNGS)
def test_rung(name: str, measured: dict[str, list[dict[str, float]]], benchmark: BenchmarkFixture) -> None:
    """Seconds an image."""
    benchmark.group = f"ladder on {DEVICE.type}"
    assert measured[name], "it failed; see ladder.json"
    CLOCK.replay(benchmark, [1 / row["images_per_s"] for row in measured[name]])
