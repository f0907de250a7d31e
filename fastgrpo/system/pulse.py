"""What this process is at, and how far it is: what the processes that train together tell each other of themselves.

There is one pulse for a process, since it is processes that stop. Marking it costs less than a microsecond.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 5.0
"""How many times longer a step may take where nothing is known of it yet, or where it cannot be looked into."""


class Pulse:
    """A process's progress. Any thread may mark it, without a lock: that a number changes is all that others look at.

    marks: counts pieces of work that were done. collectives: how many it has begun. waiting: whether it is in one.
    phase, iteration: where it is; 0 is before the first iteration. begun: whether it is to be watched: loading, which
    may download, takes as long as it takes. longest: seconds of its longest piece of work since then. kept: a clause on
    what there is to go on from. failed: called when a collective fails; may raise another exception.
    begins: called when the process has begun, from when on it is watched.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget all, at the start of a training."""
        self.marks, self.collectives, self.iteration = 0, 0, 0
        self.waiting, self.begun, self.longest = False, False, 0.0
        self.phase_name, self.kept = "", "there is no checkpoint yet"
        self.failed: Callable[[RuntimeError], object] | None = None
        self.begins: Callable[[], object] | None = None
        self._began, self._patient, self._last = 0, False, time.monotonic()

    def mark(self) -> None:
        """A piece of work is done."""
        now = time.monotonic()
        if self.begun and not self.waiting:
            self.longest = max(self.longest, now - self._last)
        self._last, self.marks = now, self.marks + 1

    def begin(self, iteration: int) -> None:
        """An iteration begins; before the first of a process, what comes between loading and it."""
        self.mark()
        if not self.begun:
            self.begun, self.longest = True, 0.0
            if self.begins:
                self.begins()
        self.iteration = iteration
        self._began += 1

    @property
    def patience(self) -> float:
        """What a limit is multiplied with: PATIENCE until an iteration is done, and within `patiently`."""
        return PATIENCE if self._patient or self._began < 3 else 1.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the work with a name."""
        before, self.phase_name = self.phase_name, name
        self.mark()
        try:
            yield
        finally:
            self.phase_name = before
            self.mark()

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Evaluations and files, whose steps may be minutes long."""
        self._patient = True
        try:
            yield
        finally:
            self.mark()
            self._patient = False

    @contextmanager
    def collective(self) -> Iterator[None]:
        """A call that returns once all processes have made it."""
        self.mark()
        self.collectives += 1
        self.waiting = True
        try:
            yield
        except RuntimeError as error:
            # The one that is of this process alone; torch, which has it, takes seconds to import.
            if self.failed is not None and type(error).__name__ != "OutOfMemoryError":
                self.failed(error)
            raise
        finally:
            self._last, self.marks = time.monotonic(), self.marks + 1  # the others' time is no work of this one
            self.waiting = False


PULSE = Pulse()
"""This process's."""
