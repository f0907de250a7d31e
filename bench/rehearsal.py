"""The runs of stages.py with a clock and a device that stand in: what happens when, and what a failure leaves.

A stage that stands in says a line every five seconds, as long as it is predicted to take, and writes a row where a real
one would. Only the processes and the clock are made up: schedule and archive are those of the real run.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import archive
from gpu import Outcome, Schedule, clock
from stages import RUNS, Run

FATES = {
    "fails": "ends with an error after a third of its time",
    "dies": "is killed by the system after a third",
    "slow": "takes three times as long",
    "hangs": "says nothing more after a third and does not mind being asked to stop",
    "stuck": "cannot even be killed",
    "shouts": "fills its log without end",
}
LINE = 5.0  # seconds between lines
_STAND_INS = {stage.name for run in RUNS.values() for stage in run.stages if stage.instead_of}


class Died(BaseException):
    """The run itself was killed, by what nothing can be done about."""


@dataclass
class StandIn:
    """A stage's process. expected: its seconds. fate: of FATES, or "" for as predicted."""

    machine: "LentInMind"
    log: Path
    expected: float
    fate: str
    began: float
    said: int = 0
    dead: bool = False

    def poll(self) -> int | None:
        passed = self.machine.now() - self.began
        self._speak(passed)
        if self.dead:
            return -9
        whole = self.expected * (3 if self.fate == "slow" else 1)
        if self.fate in ("hangs", "stuck", "shouts"):
            return None
        if self.fate in ("fails", "dies"):
            return {"fails": 1, "dies": -11}[self.fate] if passed >= whole / 3 else None
        return 0 if passed >= whole else None

    def _speak(self, passed: float) -> None:
        """What it has said by now: nothing is said for it once it is silent."""
        silent = self.dead or (self.fate in ("hangs", "stuck") and passed > self.expected / 3)
        while not silent and passed >= self.said * LINE:
            self.said += 1
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{self.began + (self.said - 1) * LINE:.0f} said\n" * (1000 if self.fate == "shouts" else 1))

    def interrupt(self) -> None:
        if self.fate not in ("hangs", "stuck", "shouts"):
            self.dead = True

    def kill(self) -> None:
        self.dead = self.fate != "stuck"


class LentInMind:
    """A machine whose time passes when one sleeps. fates: stage -> of FATES. dies: when the run itself is killed."""

    def __init__(
        self, run: Run, fates: Mapping[str, str] | None = None, dies: float = math.inf, scale: float = 1.0
    ) -> None:
        self._expected = {stage.name: stage.expected * scale for stage in run.stages}
        self._fates, self._dies, self._now = fates or {}, dies, 0.0
        self.stopped = ""

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        if self._now >= self._dies:
            raise Died

    def start(self, name: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> StandIn:
        return StandIn(self, log, self._expected[name], self._fates.get(name, ""), self._now)


def rehearse(run: Run, machine: LentInMind, folder: Path, seconds: float = 0.0) -> tuple[Schedule, list[str]]:
    """Do the run in the folder. Returns its schedule and what it said."""
    work, said = folder / "work", []
    work.mkdir(parents=True)
    schedule = Schedule(
        run, machine, work, folder / "results.tar.gz", lambda line: said.append(f"{clock(machine.now()):>5}  {line}"),
        seconds, wheels=folder,
    )  # fmt: skip
    try:
        schedule.run()
    except Died:
        said.append(f"{clock(machine.now()):>5}  killed")
    return schedule, said


def kept(schedule: Schedule) -> dict[str, float]:
    """Stage -> seconds at which it said the last line that the archive has."""
    files = archive.unpack(schedule.target)
    logs = {name.removesuffix(".log"): content for name, content in files.items() if name.endswith(".log")}
    return {name: float(content.split(b"\n")[-2].split()[0]) for name, content in logs.items() if content}


def main(run: Run, seconds: float) -> int:
    """Show the time line as predicted, and what is left of it whatever happens to any stage. Returns the exit code."""
    scale = (seconds or run.seconds) / run.seconds
    with tempfile.TemporaryDirectory() as name:
        schedule, said = rehearse(run, LentInMind(run, scale=scale), Path(name) / "expected", seconds)
        print("As predicted, on stand-ins; nothing was measured.", *said, sep="\n")
        lost = [str(outcome) for outcome in schedule.outcomes if outcome.failed]
        print(f"\n{'stage':9} {'what happens to it':72} kept until  others begun  all ends")
        stages = [stage for stage in run.stages if not (stage.watcher or stage.instead_of)]
        for number, (stage, fate) in enumerate((stage, fate) for stage in stages for fate in FATES):
            folder = Path(name) / str(number)
            schedule, _ = rehearse(run, LentInMind(run, {stage.name: fate}, scale=scale), folder, seconds)
            missing, found = missed(schedule), kept(schedule)
            lost += [f"{what} where {stage.name} {FATES[fate]}" for what in missing]
            wanted = [outcome for outcome in schedule.outcomes if not spared(outcome)]
            others = f"{len(set(found) - {stage.name})} of {len({each.stage for each in wanted} - {stage.name})}"
            end = clock(schedule.machine.now())
            print(
                f"{stage.name:9} {FATES[fate]:72} {clock(found.get(stage.name, math.nan)):>10}  {others:>12} {end:>9}"
            )
    print("\nNothing was lost." if not lost else "\n".join(["", "LOST:", *lost]))
    return int(bool(lost))


def spared(outcome: Outcome) -> bool:
    """Whether it was rightly not begun: it stands in for a stage that went well, or that took all the time."""
    return outcome.result.startswith("not") and outcome.stage in _STAND_INS


def missed(schedule: Schedule) -> list[str]:
    """What the archive of a run that has ended should have, or the run should have done, and has not."""
    found, began = kept(schedule), [outcome for outcome in schedule.outcomes if not math.isnan(outcome.began)]
    missing = [f"the log of {outcome.stage}" for outcome in began if outcome.stage not in found]
    missing += [outcome.stage for outcome in schedule.outcomes if math.isnan(outcome.began) and not spared(outcome)]
    return missing + ["the end in time"] * (schedule.machine.now() > schedule.seconds)
