"""`python bench/gpu.py --run first --out FOLDER`: measure on a machine lent for minutes, which gives few files back.

    first     whole iterations, in graphs and compiled, beside the plain trainer's; the kernels behind them; all
              operators
    second    on the same machine, its caches warm: the GPU tests, the UNet per attention backend, the ladder

What is done when is in stages.py. `--rehearse` shows it here and now, with a clock and a device that stand in, and what
is left of it where a stage fails, is slow, is killed or hangs. On the machine:

- Everything that was said and measured is in FOLDER/results-RUN.tar.gz, one file, written again every 30 seconds and at
  the end, also on SIGTERM and SIGINT, and when the time of --seconds is up.
- Every stage is a process of its own session, killed with its children when its time is up; the next one begins all the
  same.
- `--wheels FOLDER` names wheels that the machine lacks; they are unpacked for this run alone.

`python bench/table.py FOLDER/results-RUN.tar.gz --docs` then puts it where it belongs. Exits 1 if a stage failed.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import archive
import table
from processes import Machine, kill_left_behind
from stages import GRACE, RUNS, Run, Stage

ROOT = Path(__file__).resolve().parent.parent
EVERY = 30.0
"""Seconds between archives."""
CLOSING = 5.0
"""Of the run's seconds, those that are left for the last archive."""
_TICK = 0.25
_STUBBORN = 3.0  # seconds after which a killed process is left behind


class Process(Protocol):
    """As in processes.py, which says more."""

    def poll(self) -> int | None: ...

    def interrupt(self) -> None: ...

    def kill(self) -> None: ...


class Lent(Protocol):
    """The machine, as in processes.py, or what stands in for it."""

    stopped: str

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...

    def start(self, name: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process: ...


@dataclass
class Outcome:
    """What became of a stage.

    began, ended: seconds since the run began; math.nan: not yet. failed: None while it runs.
    """

    stage: str
    began: float = math.nan
    ended: float = math.nan
    result: str = "waits"
    failed: bool | None = None

    def __str__(self) -> str:
        return f"{clock(self.began):>5} {clock(self.ended):>5}  {self.stage:9} {self.result}"


@dataclass
class _Running:
    stage: Stage
    process: Process
    outcome: Outcome
    until: float
    asked: bool = False
    killed: float = math.inf


class Schedule:
    """Runs the stages of a run, one after the other and some beside them, and keeps the archive.

    work: the folder that stages write to. target: the archive. say: is told what happens. wheels: a folder, or None.
    environment: variables of all stages.
    """

    def __init__(
        self, run: Run, machine: Lent, work: Path, target: Path, say: Callable[[str], object], seconds: float = 0.0,
        wheels: Path | None = None, environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """seconds: in place of the run's own, which stretches or squeezes all times."""
        self.machine, self.work, self.target, self.say = machine, work, target, say
        self._about = run.about
        self.wheels, self.environment = wheels, environment or {}
        self._scale = (seconds or run.seconds) / run.seconds
        self.seconds = run.seconds * self._scale
        self._waiting = [stage for stage in run.stages if "{wheels}" not in stage.command or wheels]
        self._running: list[_Running] = []
        self.outcomes = [Outcome(stage.name) for stage in self._waiting]
        self._packed = -math.inf

    def run(self) -> list[Outcome]:
        """Returns what became of each stage; the archive is written and nothing runs any more."""
        end = self.seconds - CLOSING
        try:
            while self._work_left() and self.machine.now() < end and not self.machine.stopped:
                self._step()
                self.machine.sleep(_TICK)
        finally:
            self._close()
        return self.outcomes

    def _work_left(self) -> bool:
        return bool(self._waiting) or any(not one.stage.watcher for one in self._running)

    def _step(self) -> None:
        now = self.machine.now()
        for one in list(self._running):
            self._look_after(one, now)
        while self._waiting and not any(not one.stage.background for one in self._running):
            self._begin(self._waiting.pop(0), now)
        if now - self._packed >= EVERY:
            self.pack()

    def _look_after(self, one: _Running, now: float) -> None:
        code = one.process.poll()
        if code is not None:
            one.process.kill()  # what it left running
            self._end(one, _told(one, code, self._log(one.stage)), code != 0 or one.asked)
        elif now >= one.killed + _STUBBORN:
            self._end(one, "FAILED: its time was up, and it does not end even so", True)
        elif now >= one.until and one.killed == math.inf:
            one.process.kill()
            one.killed = now
        elif now >= one.until - GRACE and not one.asked:
            one.process.interrupt()
            one.asked = True

    def _begin(self, stage: Stage, now: float) -> None:
        found = {outcome.stage: outcome for outcome in self.outcomes}
        outcome = found[stage.name]
        if stage.instead_of in found and not found[stage.instead_of].failed:
            outcome.result, outcome.failed = "not needed", False
            return
        until = min(stage.by * self._scale, now + stage.cap * self._scale, self.seconds - CLOSING)
        limit = until - now
        if limit < stage.least * self._scale:
            outcome.result, outcome.failed = "not begun: no time was left", True
            self.say(f"{stage.name}: {outcome.result}")
            return
        outcome.began = now
        words = stage.words(self.work, self.work.parent / "site", self.wheels, limit - GRACE)
        try:
            process = self.machine.start(stage.name, words, self._log(stage), self.environment)
        except OSError as error:
            outcome.ended, outcome.result, outcome.failed = now, f"FAILED to start: {error}", not stage.watcher
            self.say(f"{stage.name}: {outcome.result}")
            return
        outcome.result = "runs"
        if stage.watcher:
            until = math.inf
        else:
            self.say(f"{stage.name} begins, with {limit:.0f} s at most")
        self._running.append(_Running(stage, process, outcome, until))

    def _end(self, one: _Running, result: str, failed: bool) -> None:
        self._running.remove(one)
        one.outcome.ended, one.outcome.result = self.machine.now(), result
        one.outcome.failed = failed and not one.stage.watcher
        if not one.stage.watcher:
            self.say(f"{one.stage.name}: {result}")

    def _close(self) -> None:
        """Nothing that runs may hinder the last archive: it is written once before and once after they are killed."""
        why = self.machine.stopped or ("the run's time was up" if self._work_left() else "the run was over")
        self.pack()
        for one in list(self._running):
            one.process.kill()
            self._end(one, f"{'stopped' if one.stage.watcher else 'FAILED'}: {why}", True)
        for outcome in self.outcomes:
            if outcome.result == "waits":
                outcome.result, outcome.failed = f"not begun: {why}", True
        self.say(f"all: {self.machine.now():.1f} s, {self.target}")
        self.pack()

    def pack(self) -> None:
        """Tables and summary anew, then the archive. A full disk is said, and does not end the run."""
        self._packed = self.machine.now()
        try:
            (self.work / "summary.txt").write_text(self.summary(), encoding="utf-8")
            archive.pack(self.work, self.target)
        except OSError as error:
            self.say(f"the archive could not be written: {error}")

    def summary(self) -> str:
        """When each stage ran and what it came to, and what was measured."""
        lines = [self._about, "", "began ended  stage     result", *map(str, self.outcomes), ""]
        return "\n".join([*lines, *table.tables(self.work)]) + "\n"

    def _log(self, stage: Stage) -> Path:
        return self.work / f"{stage.name}.log"


def clock(seconds: float) -> str:
    """Such as 3:05; "-" for what has not happened."""
    return "-" if math.isnan(seconds) else f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _told(one: _Running, code: int, log: Path) -> str:
    """How a stage ended, with its last words: where it was stopped, those before Python said where."""
    text = _end_of(log)
    if one.asked:
        text = text.rpartition("Traceback (most recent call last)")[0] or text
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]
    if one.asked:
        return f"FAILED: its time was up; last line: {last}"
    return last if code == 0 else f"FAILED with {code}: {last}"


def _end_of(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        return file.read().decode(errors="replace")


class Teller:
    """Says lines with the time: into a file at once, and on standard output, for which nothing waits."""

    def __init__(self, file: Path, now: Callable[[], float]) -> None:
        self._file = file.open("a", encoding="utf-8")
        self._now = now
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # Whoever reads the output may have stopped to, and a write then never ends.
        threading.Thread(target=self._print, daemon=True).start()

    def __call__(self, line: str) -> None:
        line = f"{clock(self._now()):>5}  {line}\n"
        with suppress(OSError):  # a full disk ends no run
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        self._lines.put(line)

    def show(self, text: str) -> None:
        """On standard output only."""
        self._lines.put(text)

    def wait(self, seconds: float) -> None:
        """Until all is printed, or so long."""
        end = time.monotonic() + seconds
        while not self._lines.empty() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)

    def _print(self) -> None:
        while True:
            words = self._lines.get().encode()
            try:
                while words:
                    words = words[os.write(1, words) :]
            except OSError:
                return


def describe(run: str, device: str) -> dict[str, Any]:
    """The machine and what is installed there. device: what nvidia-smi says."""
    versions = sorted(f"{d.metadata['Name']} {d.version}" for d in metadata.distributions() if d.metadata["Name"])
    return {
        "run": run,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "commit": os.environ.get("COMMIT", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "nvcc": _output("nvcc", "--version").rpartition("\n")[2],
        "installed": versions,
    }


def _device() -> str:
    """Name, driver, compute capability and memory, or ""; asked of nvidia-smi, since torch takes seconds to say it."""
    return _output("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=tuple(RUNS), default="first")
    parser.add_argument("--out", type=Path, help="the folder for the archive (default: bench/results)")
    parser.add_argument("--seconds", type=float, default=0.0, help="for everything; stretches or squeezes all times")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="these alone, each with all the time that is left")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to unpack first")
    parser.add_argument("--rehearse", action="store_true", help="with a clock and a device that stand in")
    return parser.parse_args()


def _chosen(run: Run, names: Sequence[str] | None) -> Run:
    """Of the stages those that are named. Exits where there is none of a name."""
    if not names:
        return run
    known = [stage.name for stage in run.stages]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"--stages: {unknown[0]} is none of this run; accepted are {', '.join(known)}.")
    chosen = [stage for stage in run.stages if stage.name in names or "{wheels}" in stage.command]
    stages = [dataclasses.replace(stage, by=run.seconds, cap=math.inf, instead_of="") for stage in chosen]
    return dataclasses.replace(run, stages=tuple(stages))


def main() -> None:
    options = _options()
    run = _chosen(RUNS[options.run], options.stages)
    if options.rehearse:
        import rehearsal

        sys.exit(rehearsal.main(run, options.seconds))
    machine = Machine(ROOT)
    kill_left_behind()
    device = _device()
    if not device:
        sys.exit("nvidia-smi shows no device here; `python bench/gpu.py --rehearse` needs none.")
    work = ROOT / "build" / "gpu" / options.run
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "about.json").write_text(json.dumps(describe(options.run, device), indent=1) + "\n", encoding="utf-8")
    say = Teller(work / "run.log", machine.now)
    say(f"{options.run} run on {device}: {run.about}")
    target = (options.out or ROOT / "bench" / "results").resolve() / f"results-{options.run}.tar.gz"
    path = os.pathsep.join([str(ROOT), str(work.parent / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
    }  # a look for what is not needed would wait for the network
    schedule = Schedule(run, machine, work, target, say, options.seconds, options.wheels, environment)
    failed = any(outcome.failed for outcome in schedule.run())
    say.show(schedule.summary())
    say.wait(2.0)
    os._exit(failed)  # a thread that cannot print would keep the interpreter from ending


if __name__ == "__main__":
    main()
