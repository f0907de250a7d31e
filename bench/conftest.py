"""Options of the benchmarks, and where what they measure is kept."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kept import Kept, Results
from measure import CUDA

_DEADLINE = pytest.StashKey[float]()
SMOKE = "CPU smoke test: no figure here says anything about a GPU"
REPEATS = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgrpo")
    group.addoption("--results", type=Path, metavar="FILE.json", help="Write what was measured on a GPU to this file.")
    group.addoption(
        "--throughput", type=Path, metavar="FOLDER", help="Write what whole iterations took to this folder."
    )
    group.addoption(
        "--repeats", type=int, default=REPEATS, help=f"Iterations of each training that are kept (default: {REPEATS})."
    )
    group.addoption("--recipes", type=Path, metavar="FOLDER", help="Train every recipe of test_time_to_result there.")
    group.addoption("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="Of these trainings.")
    group.addoption("--split", choices=("test", "development"), default="test", help="Their held-out prompts.")
    group.addoption("--seconds", type=float, default=float("inf"), help="Start no measurement after this many seconds.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_DEADLINE] = time.monotonic() + config.getoption("--seconds")
    if config.getoption("--results") and not CUDA:
        raise pytest.UsageError(f"--results needs a CUDA device. {SMOKE}.")


def pytest_report_header() -> str:
    return f"benchmarks on {torch.cuda.get_device_name()}" if CUDA else SMOKE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not CUDA:
        terminalreporter.write_line(SMOKE, yellow=True, bold=True)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results | None:
    """None on the CPU."""
    return Results(pytestconfig.getoption("--results")) if CUDA else None


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[..., Kept]:
    """(name, **content) -> where the rows of the benchmark `name` go: NAME.json in the folder of --throughput."""
    folder = pytestconfig.getoption("--throughput")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)

    def make(name: str, **content: Any) -> Kept:
        return Kept(folder and folder / f"{name}.json", benchmark=name, **content)

    return make


@pytest.fixture(scope="session")
def in_time(pytestconfig: pytest.Config) -> Callable[[], bool]:
    """Whether another measurement may start."""
    return lambda: time.monotonic() <= pytestconfig.stash[_DEADLINE]


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest, in_time: Callable[[], bool]) -> None:
    # What was measured for a whole module is only shown by its tests.
    if not in_time() and "measured" not in request.fixturenames:
        pytest.fail("not measured: the time given by --seconds is up", pytrace=False)
