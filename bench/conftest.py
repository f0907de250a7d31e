"""Options of the benchmarks, and the files that measurements are written to."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from measure import CUDA, copy_bandwidth

import fastgrpo  # noqa: F401  (must come before torch and diffusers: it prepares their import)
from fastgrpo.engine.workers import available_cores

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


class Kept:
    """What was measured so far, with `rows`; the file is whole at any time, so that a run that is killed keeps its rows."""

    def __init__(self, path: Path | None, **content: Any) -> None:
        """path: None keeps nothing on disk."""
        self.path = path
        self.content: dict[str, Any] = {**_about(), **content, "rows": []}

    def add(self, **row: Any) -> None:
        self.content["rows"].append(row)
        self._write()

    def say(self, **fields: Any) -> None:
        """Beside the rows."""
        self.content |= fields
        self._write()

    def fail(self, name: str, reason: str) -> None:
        """A row that there is not."""
        self.say(failed={**self.content.get("failed", {}), name: reason})

    def _write(self) -> None:
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)


class Results(Kept):
    """Of the kernels, on a GPU."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, copy_bytes_per_second=copy_bandwidth())


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


def _about() -> dict[str, str]:
    cuda = {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
    }
    return {
        "device": torch.cuda.get_device_name() if CUDA else _processor(),
        **(cuda if CUDA else {}),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """How many cores of what, for instance "2 cores of AMD EPYC (AVX2)"."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{available_cores()} cores of {name} ({torch.backends.cpu.get_cpu_capability()})"


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it is absent or fails."""
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
