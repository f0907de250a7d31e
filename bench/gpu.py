"""`python bench/gpu.py`: everything a GPU machine is needed for, offline, in at most eight minutes.

    kernels     the benchmarks of all operations, and their table
    step        whole iterations of SD 1.5 beside the plain trainer's; waits for the device; memory against its plan; the roofline
    tests       pytest -m gpu
    ladder      from the plain trainer to the engine, one technique a row
    unet        the UNet's passes, per attention backend and batch
    compile     registers, stack and shared memory of every kernel      (needs no GPU)

In this order, each with a share of the time that the next ones cannot lose; `--stages` takes some alone, with all the time.
Writes into --out, by default bench/results/DATE-DEVICE: one log per stage, NAME.json and NAME.md of what was measured, and
summary.txt, with what of the engine's promises holds. A stage that fails, lacks a library or runs out of time does not stop the
next. Exits 1 if any did. Without a CUDA device the stages that need one are skipped, and the rest is a rehearsal, by default in
build/rehearsal.

The time is kept in two ways: no measurement starts in the last 45 seconds, and what still runs 5 seconds before the end is
killed. Measurements are written as they come, so the tables then have all that were made.
"""

import argparse
import datetime
import importlib.util
import json
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
STAGES = ("kernels", "step", "tests", "ladder", "unet", "compile")
SECONDS = 480.0
# Of the time that is left when a stage begins: it can eat nobody else's. The last one gets what the others left.
SHARES = {"kernels": 0.25, "step": 0.75, "tests": 0.5, "ladder": 0.75, "unet": 0.7, "compile": 1.0}
BENCHMARKS = {"kernels": ("kernels",), "step": ("step", "roofline"), "ladder": ("ladder",), "unet": ("unet",)}
"""Stage -> the results that it writes, NAME.json each."""
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
    for stage in [stage for stage in STAGES if stage in options.stages]:
        last = stage == [name for name in STAGES if name in options.stages][-1]
        # In a rehearsal there is nothing else to do.
        limit = left() * (1.0 if last or not device else SHARES[stage])
        command = stage_command(stage, out, limit - MARGIN)
        outcomes.append(run_stage(stage, command, out, limit, bool(device) or stage == "compile"))
    written = [
        name for stage in options.stages for name in BENCHMARKS.get(stage, ()) if (out / f"{name}.json").exists()
    ]
    for name in written:
        command = [sys.executable, "bench/table.py", out / f"{name}.json"]
        table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        (out / f"{name}.md").write_text(table, encoding="utf-8")
        print(table)
    summary = "\n".join(
        [
            f"device: {device or 'none'}",
            *map(str, outcomes),
            *(promises(out / "step.json") if "step" in written else ()),
            f"all: {time.monotonic() - start:.1f} s in {out}",
        ]
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


def promises(file: Path) -> list[str]:
    """A line for each check of an iteration: nothing waits for the device, memory is as planned."""
    checks = json.loads(file.read_text(encoding="utf-8")).get("checks", [])
    return [f"{'holds' if check['holds'] else 'BROKEN':8} {check['name']}: {check['seen']}" for check in checks]


def stage_command(stage: str, out: Path, seconds: float) -> tuple[str, ...]:
    """Python's arguments. seconds: after which no measurement starts."""
    pytest = ("-m", "pytest", "-q")
    if stage == "tests":
        # All GPU tests, or those of the kernels alone where the libraries of the others are missing.
        complete = all(importlib.util.find_spec(name) for name in _TEST_LIBRARIES)
        return (*pytest, "-m", "gpu", *(() if complete else ("tests/kernels", "--confcutdir=tests/kernels")))
    if stage == "compile":
        return ("-m", "fastgrpo.kernels.compile")
    file = {"kernels": "test_kernels.py", "step": "test_iteration.py"}.get(stage, f"test_{stage}.py")
    results = f"--results={out / 'kernels.json'}" if stage == "kernels" else f"--throughput={out}"
    return (*pytest, f"bench/{file}", "--benchmark-quiet", results, f"--seconds={seconds}")


if __name__ == "__main__":
    main()
