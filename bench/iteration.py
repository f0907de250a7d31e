"""`python bench/iteration.py graphs | eager | compiled | plain --out FOLDER`: whole iterations, kept as they go.

    graphs      ours in CUDA graphs without torch.compile, at a micro-batch that is given: the shortest start
    eager       the same without graphs
    compiled    ours as its settings have it: search for the micro-batch, choice of attention, torch.compile, graphs
    plain       the plain trainer, of one prompt's images

Into FOLDER/step.json, which each of them goes on with: what the start said and how long its parts took, an iteration's
stages as they end, its row, the kernels of one replay of every graph, and what is to hold. Each is on disk before the
next begins, so whatever ends the process leaves all before it. On a CPU it is the small model, and says nothing about a
GPU.
"""

import argparse
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fastgrpo  # noqa: F401  (prepares the imports below)

# isort: split
from kept import Kept
from measure import CUDA, costliest, waits_by_place
from roofline import phases
from throughput import (
    RATES_OF,
    Check,
    about,
    checks,
    memory_check,
    one_prompt,
    ratio_check,
    row_of,
    step_config,
)
from workload import GIVEN, Ours, Trainer, accounting_of, altered, ours, plain

from fastgrpo.settings.schema import TrainConfig

NAMES = {
    "graphs": "fastgrpo, not compiled",
    "eager": "fastgrpo, without graphs",
    "compiled": "fastgrpo",
    "plain": "plain",
}
"""As the rows are called."""
WATCHED = (
    ("fastgrpo.engine.batch_size", "find_micro_batch", "searching the micro-batch"),
    ("fastgrpo.engine.setup", "_attend", "choosing attention"),
    ("fastgrpo.engine.setup", "_compile", "compiling and comparing"),
    ("fastgrpo.engine.setup", "_choose_group_norm", "choosing GroupNorm"),
    ("fastgrpo.engine.graphs", "StaticCall.warm_up", "warming up"),
    ("fastgrpo.engine.fixed_passes", "FixedPasses._prepare", "warming up and capturing"),
)
"""Module, function and name of a start's parts."""
_SILENCE = 5.0  # seconds between lines about how far a stage is


class Journal:
    """Says what happens with the seconds since the process began, and keeps it in a file's field, by the training's
    name.
    """

    def __init__(self, kept: Kept, name: str, clock: Callable[[], float] = time.monotonic, began: float = 0.0) -> None:
        """began: when the process did, by that clock."""
        self.kept, self.name, self._clock = kept, name, clock
        self._began, self._lines, self._stage = began, [], ("", 0.0)
        self.reached: dict[str, float] = {}

    def say(self, line: object) -> None:
        seconds = round(self._clock() - self._began, 1)
        print(f"{seconds:6.1f} s  {line}", flush=True)
        self._lines.append([seconds, str(line)])
        self.kept.note("said", self.name, self._lines)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = self._clock()
        yield
        self.say(f"{what} took {self._clock() - began:.1f} s")

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator["_Progress"]:
        """As a console's. A stage is over, with all that it launched, only when the next one begins."""
        self.over()
        self._stage = label, self._clock()
        yield _Progress(self, label, self._clock)

    def over(self) -> None:
        """The stage at hand is."""
        label, began = self._stage
        if label:
            self.reached[label] = round(self._clock() - began, 2)
            self.kept.note("reached", self.name, self.reached)
            self.say(f"{label} took {self.reached[label]:.2f} s")
        self._stage = "", 0.0


@dataclass
class _Progress:
    journal: Journal
    label: str
    clock: Callable[[], float]
    told: float = 0.0

    def reach(self, done: int, total: int) -> None:
        """Of what was begun: the device may be behind."""
        if self.clock() - self.told >= _SILENCE:
            self.told = self.clock()
            self.journal.say(f"{self.label}: {done} of {total}")


def make(which: str, journal: Journal) -> Trainer:
    """The training, ready to run."""
    config = step_config()
    if which == "plain":
        return plain(one_prompt(config) if CUDA else config, threads=1, console=journal)
    if which != "compiled":
        given = {"micro_batch": GIVEN} if CUDA else {}
        config = altered(config, engine__compile="off", engine__graphs="on" if which == "graphs" else "off", **given)
    return ours(config, workers=1, console=journal)


@contextmanager
def watched(journal: Journal) -> Iterator[None]:
    """The parts of a start say how long they took."""
    with ExitStack() as stack:
        for module, path, what in WATCHED:
            owner: Any = importlib.import_module(module)
            *outer, name = path.split(".")
            owner = functools.reduce(getattr, outer, owner)
            stack.enter_context(mock.patch.object(owner, name, _timing(getattr(owner, name), what, journal)))
        yield


def _timing(function: Callable[..., Any], what: str, journal: Journal) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with journal.timed(what):
            return function(*args, **kwargs)

    return timed


def measure(which: str, folder: Path, seconds: float, repeats: int = 1) -> None:
    """seconds: from now, after which nothing but what is to hold is looked at, and no further iteration begins."""
    until, config = time.monotonic() + seconds, step_config()
    accounting = accounting_of(config, *RATES_OF)
    kept = Kept(folder / "step.json", goes_on=True, benchmark="step", rates=accounting.rates.to_json(), **about())
    journal = Journal(kept, NAMES[which], began=time.monotonic() - age())
    journal.say(accounting.rates.line())
    with watched(journal):
        training = make(which, journal)
        journal.say("ready")
        rows = []
        for number in range(1, repeats + 1):
            with waits_by_place() as waits:
                row = row_of(journal.name, training, number, accounting)
            journal.over()
            kept.note("waits", journal.name, dict(waits.most_common()))
            rows.append(row | ({"first": True} if number == 1 and repeats > 1 else {}))
            kept.add(**rows[-1])
            journal.say(", ".join(f"{name} {value:.4g}" for name, value in row["values"].items()))
            if time.monotonic() > until:
                break
    if isinstance(training, Ours):
        look_at(training, config, rows, accounting, journal, lambda: time.monotonic() <= until)


def look_at(
    training: Ours, config: TrainConfig, rows: list[dict[str, Any]], accounting: Any, journal: Journal,
    in_time: Callable[[], bool],
) -> None:  # fmt: skip
    """What an iteration of ours left behind, the quickest first."""
    kept, name, values = journal.kept, journal.name, rows[-1]["values"]
    kept.note("engine", name, training.loaded.record.to_json())
    kept.note("planned", name, training.plan_lines())
    found = [ratio_check(values["ratio/max_abs_dev_first"])]
    if CUDA:
        found.append(memory_check(training.planned_gigabytes(), values["memory/peak_gb"], training.compiled))

    def tell(check: Check) -> None:
        journal.say(f"{'holds' if check.holds else 'BROKEN'}: {check.name}: {check.seen}")
        kept.note("checks", name, [each.to_json() for each in found])

    for check in found:
        tell(check)
    if name == NAMES["compiled"]:
        parameters = sum(p.numel() for p in training.loaded.trainable.parameters.values())
        floor = Kept(
            kept.path.with_name("roofline.json"), benchmark="roofline", rates=accounting.rates.to_json(), **about()
        )
        for phase in phases(config, accounting, parameters, rows):
            floor.add(**phase.to_json())
    replays = {}
    for replayed, call in training.replays().items():
        replays[replayed] = costliest(call)
        kept.note("kernels", name, replays)
        journal.say(f"{replayed}: {sum(kernel['seconds'] for kernel in replays[replayed]) * 1e3:.2f} ms in its kernels")
    training.loaded.engine.clear()
    for check in checks(training, in_time):
        found.append(check)
        tell(check)


def age() -> float:
    """Seconds since this process was started: importing takes some. 0 where the system does not say."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    started = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=tuple(NAMES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing further is begun")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measure(options.which, options.out, options.seconds, options.repeats)


if __name__ == "__main__":
    main()
