"""Options of the benchmarks, and the file the measurements on a GPU are written to."""

import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from measure import CUDA, copy_bandwidth

_DEADLINE = pytest.StashKey[float]()
SMOKE = "CPU smoke test: no figure here says anything about a GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgrpo")
    group.addoption("--results", type=Path, metavar="FILE.json", help="Write what was measured on a GPU to this file.")
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


class Results:
    """What was measured so far; the file is whole at any time, so that a run that is killed keeps its rows."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {**_about(), "copy_bytes_per_second": copy_bandwidth(), "rows": []}

    def add(self, **row: Any) -> None:
        self.content["rows"].append(row)
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results | None:
    """None on the CPU."""
    return Results(pytestconfig.getoption("--results")) if CUDA else None


@pytest.fixture(autouse=True)
def _in_time(pytestconfig: pytest.Config) -> None:
    if time.monotonic() > pytestconfig.stash[_DEADLINE]:
        pytest.fail("not measured: the time given by --seconds is up", pytrace=False)


def _about() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it is absent or fails."""
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
