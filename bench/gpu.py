"""`python bench/gpu.py`: everything a GPU machine is needed for, offline, in at most eight minutes.

    tests       pytest -m gpu
    compile     registers, stack and shared memory of every kernel      (needs no GPU)
    kernels     the benchmarks of all operations, and their table

Writes into --out, by default bench/results/DATE-DEVICE: one log per stage, kernels.json, kernels.md and summary.txt. A
stage that fails or runs out of time does not stop the next. Exits 1 if any did. Without a CUDA device the stages
that need one are skipped, and the rest is a rehearsal, by default in build/rehearsal.

The time is kept in two ways: no measurement starts in the last 45 seconds, and what still runs 5 seconds before the end is
killed. Measurements are written as they come, so the table then has all that were made.
"""

import argparse
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "compile", "kernels")
SECONDS = 480.0
# Shares of the time: no stage can eat another's. The last one gets what the others left.
TESTS_SHARE = 0.35
COMPILE_SHARE = 0.15
# Between the last measurement that may start and the kill: it may have to compile.
MARGIN = 40.0
# Left for the table and the summary.
CLOSING = 5.0
# What tests/conftest.py needs. Machines for kernel work may have torch and triton only.
_TEST_LIBRARIES = ("diffusers", "transformers", "open_clip", "tyro")


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    result: str
    failed: bool
    seconds: float

    def __str__(self) -> str:
        return f"{self.stage:8} {self.seconds:6.1f} s  {self.result}"


def main() -> None:
    start = time.monotonic()
    options = _options()
    device = _cuda_device()
    out = (options.out or _default_folder(device)).resolve()
    out.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return options.seconds - CLOSING - (time.monotonic() - start)

    outcomes = []
    if "tests" in options.stages:
        outcomes.append(run_stage("tests", _tests_command(), out, options.seconds * TESTS_SHARE, bool(device)))
    if "compile" in options.stages:
        command = ("-m", "fastgrpo.kernels.compile")
        # In a rehearsal nothing comes after it.
        outcomes.append(run_stage("compile", command, out, options.seconds * COMPILE_SHARE if device else left()))
    results = out / "kernels.json"
    if "kernels" in options.stages:
        outcomes.append(run_stage("kernels", _kernels_command(results, left() - MARGIN), out, left(), bool(device)))
    if results.exists():
        table = subprocess.run(
            [sys.executable, "bench/table.py", results], cwd=ROOT, capture_output=True, text=True, check=True
        )
        (out / "kernels.md").write_text(table.stdout, encoding="utf-8")
        print(table.stdout)
    summary = "\n".join(
        [f"device: {device or 'none'}", *map(str, outcomes), f"all: {time.monotonic() - start:.1f} s in {out}"]
    )
    (out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(summary)
    sys.exit(any(outcome.failed for outcome in outcomes))


def run_stage(stage: str, arguments: Sequence[str], out: Path, limit: float, possible: bool = True) -> Outcome:
    """Run Python with the arguments for at most `limit` seconds, output into OUT/STAGE.log. possible: there is a device."""
    if not possible:
        return Outcome(stage, "no CUDA device: skipped", False, 0.0)
    print(f"{stage}: at most {limit:.0f} s", flush=True)
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    log = out / f"{stage}.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout=max(limit, 1.0))
        except subprocess.TimeoutExpired:
            # With all that it started: pytest's children hold the device too.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    seconds = time.monotonic() - start
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = lines[-1] if lines else "no output"
    if code is None:
        return Outcome(stage, f"FAILED: out of time; last line: {last}", True, seconds)
    return Outcome(stage, last if code == 0 else f"FAILED with {code}: {last}", code != 0, seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder to write to")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time for everything (default: {SECONDS:.0f})")
    return parser.parse_args()


def _default_folder(device: str) -> Path:
    if not device:
        return ROOT / "build" / "rehearsal"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return ROOT / "bench" / "results" / f"{date}-{re.sub('[^A-Za-z0-9]+', '-', device)}"


def _cuda_device() -> str:
    """Its name, or "". Asked in another process: this one must not hold memory of the device."""
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _tests_command() -> tuple[str, ...]:
    """All GPU tests, or those of the kernels alone where the libraries of the others are missing."""
    if all(importlib.util.find_spec(name) for name in _TEST_LIBRARIES):
        return ("-m", "pytest", "-q", "-m", "gpu")
    return ("-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "--confcutdir=tests/kernels")


def _kernels_command(results: Path, seconds: float) -> tuple[str, ...]:
    return ("-m", "pytest", "bench", "-q", "--benchmark-quiet", f"--results={results}", f"--seconds={seconds}")


if __name__ == "__main__":
    main()
