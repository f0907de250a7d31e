"""Lines that say how far a command is, for an output that is no terminal: no half minute passes in silence."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fastgrpo.system.pulse import PULSE

Clock = Callable[[], float]
"""Seconds since any moment."""

SILENCE = 25.0  # seconds after which a phase speaks up; 30 is promised, and the interpreter may be busy
LONG = 10.0  # seconds; a phase that lasts as long has a line of its own
NOTICED = 1.0  # seconds; so has one of a new name that lasts as long, so that all kinds of phases are seen
WIDTH = 80  # columns of a line that all terminals have

_BEAT = 1.0  # seconds between looks at the clock
_MARKS = 120  # looks that a phase's speed is measured over


def clock_text(seconds: float) -> str:
    """Hours, minutes and seconds, such as "0:03:48"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def fitting(parts: Sequence[str], width: int = WIDTH) -> str:
    """As many of the parts as fit on a line, from the first one on."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


class Pace:
    """Estimates how long a training still takes from what iterations and evaluations took in this process."""

    def __init__(self, iterations: int, evaluated_every: int, finished: int, clock: Clock = time.monotonic) -> None:
        """iterations: in all. evaluated_every: iterations between quick evaluations, 0 is none. finished: till now."""
        self.iterations = iterations
        self._every, self._finished, self._clock = evaluated_every, finished, clock
        self._training, self._began = False, 0.0  # whether iterations have begun, and when the one at hand did
        self._seconds: list[float] = []  # of each finished iteration, without its evaluation
        self._quick, self._whole = 0.0, 0.0  # of an evaluation, as far as there was one

    @property
    def place(self) -> str:
        """Where the training is: "3/10" in its third iteration of ten."""
        return f"{self._finished + 1}/{self.iterations}" if self._training else "before training:"

    def started(self, evaluation: float) -> None:
        """Note that the first iteration begins. evaluation: seconds that the one before training took, 0 without it."""
        self._training, self._whole, self._began = True, evaluation, self._clock()

    def finished(self, iteration: int, evaluation: float) -> None:
        """Note that an iteration is done. evaluation: those of its seconds that an evaluation took, 0 without it."""
        now = self._clock()
        self._seconds.append(now - self._began - evaluation)
        if evaluation and iteration < self.iterations:
            self._quick = evaluation
        self._finished, self._began = iteration, now

    def left(self) -> float | None:
        """Seconds until the end, the last evaluation included; None before an iteration was done."""
        if not self._seconds:
            return None
        due = [self._due(iteration) for iteration in range(self._finished + 1, self.iterations + 1)]
        if due:
            due[0] = max(due[0] - (self._clock() - self._began), 0.0)
        return sum(due)

    def _due(self, iteration: int) -> float:
        """Seconds that an iteration should take."""
        last, quick = iteration == self.iterations, self._every and iteration % self._every == 0
        return statistics.median(self._seconds) + (self._whole if last else self._quick if quick else 0.0)


class Phase:
    """A part of a command that takes a while. total: how much is to be done, where that is known."""

    def __init__(self, label: str, total: int | None, began: float) -> None:
        self.label, self.total, self.began = label, total, began
        self.done = 0
        self.said = False
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MARKS)

    def advance(self, count: int) -> None:
        """Note that `count` more are done."""
        PULSE.mark()
        self.done += count

    def reach(self, done: int, total: int) -> None:
        """Note that `done` of `total` are done."""
        PULSE.mark()
        self.done, self.total = done, total

    def mark(self, now: float) -> None:
        """Look at the clock. What was done before the first look, such as kept images, does not count as speed."""
        self._marks.append((now, self.done))

    def left(self) -> float | None:
        """Seconds until the phase's end at its latest speed; None where that is not known."""
        if not self.total or len(self._marks) < 2:
            return None
        (since, before), (now, done) = self._marks[0], self._marks[-1]
        return (now - since) * (self.total - done) / (done - before) if done > before else None

    def text(self, now: float) -> str:
        """The phase's name and how far it is."""
        if self.total:
            return f"{self.label} {self.done}/{self.total}"
        label = f"{self.label} {self.done}" if self.done else self.label
        return f"{label}, {clock_text(now - self.began)} so far" if now - self.began >= LONG else label


class Lines:
    """Says phase by phase how far a command is."""

    def __init__(self, say: Callable[[str], object], every_phase: bool, clock: Clock) -> None:
        """every_phase: a short phase has a line too, where its name is new."""
        self.pace: Pace | None = None
        self._say, self._every_phase, self._clock = say, every_phase, clock
        self._known: set[str] = set()
        self._phase: Phase | None = None
        self._spoke = clock()

    def heard(self) -> None:
        """Note that a line was printed just now."""
        self._spoke = self._clock()

    @contextmanager
    def phase(self, label: str, total: int | None = None) -> Iterator[Phase]:
        """A phase that ends with its block. A thread looks at the clock meanwhile, whatever the block does."""
        phase, outer = Phase(label, total, self._clock()), self._phase
        self._phase = phase
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True)
        thread.start()
        try:
            yield phase
        finally:
            over.set()
            thread.join()
            self._phase = outer

    def look(self) -> None:
        """Look at the clock, and print a line where it is time to."""
        phase, now = self._phase, self._clock()
        if phase is None:
            return
        phase.mark(now)
        enough = NOTICED if self._every_phase and phase.label not in self._known else LONG
        if now - self._spoke >= SILENCE or (not phase.said and now - phase.began >= enough):
            phase.said = True
            self._known.add(phase.label)
            self._say(self._line(phase, now))

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_BEAT):
            self.look()

    def _line(self, phase: Phase, now: float) -> str:
        whole, own = self.pace.left() if self.pace else None, phase.left()
        left = f"{clock_text(whole)} left" if whole is not None else f"{clock_text(own)} left of this" if own else ""
        place = self.pace.place if self.pace else ""
        return ", ".join(filter(None, (f"{place} {phase.text(now)}".strip(), left)))
