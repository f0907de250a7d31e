"""A thread for each sink: whatever becomes of it, training does not wait.

Entries wait in a queue of ROOM. Where it is full the oldest is dropped. A sink that cannot be opened is tried again, at
growing intervals and once more at the end, while entries wait. What a sink raises costs the entry that it was given.
Each kind of trouble is told once, and at the end how many iterations a sink lacks. Training's own thread tells it: its
progress bars are on the terminal.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping

from fastgrpo.run.logs.base import Entry, LoggedRun, Sink, SinkKind
from fastgrpo.run.logs.secrets import hidden
from fastgrpo.system.errors import first_sentence

ROOM = 256  # entries that wait
SILENT = 120.0  # seconds without an answer, after which that is told
RETRIES = (30.0, 480.0)  # seconds until a sink is opened again, at first and at most
CLOSING, CLOSING_FAILED = 60.0, 10.0  # seconds that the end of a run waits, and that of a training that failed
_ABANDONING = 5.0  # seconds for a sink to be let go of
_ENDING = 2.0  # seconds for its thread to notice


class SinkWorker:
    """One sink's queue and thread. Its methods are for one other thread, and return at once."""

    def __init__(self, name: str, kind: SinkKind, run: LoggedRun):
        self.name, self._kind, self._run = name, kind, run
        self._entries: deque[Entry] = deque()
        self._change = threading.Condition()
        self._closing, self._failed = threading.Event(), False
        self._let_go = False
        self._given, self._lost = 0, 0
        self._called: float | None = None  # when the call of the sink that has not returned was made
        self._told: set[str] = set()
        self._warnings: deque[str] = deque()
        self._news: deque[str] = deque()
        # A daemon, which a program's end does not wait for.
        self._thread = threading.Thread(target=self._work, name=f"log to {name}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Let the entry be logged when its turn comes, or never."""
        with self._change:
            self._given += 1
            if len(self._entries) >= ROOM:
                self._entries.popleft()
                self._lost += 1
                self._tell("full", f"is too slow: {ROOM} iterations wait, and from now on the oldest are left out")
            self._entries.append(entry)
            self._change.notify()
        called = self._called
        if called is not None and time.monotonic() - called > SILENT:
            self._tell("silent", f"has not answered for {SILENT:.0f} s; training goes on")

    def end(self, failed: bool) -> None:
        """Ask the thread to write what waits, to close the sink and to end."""
        self._failed = failed
        self._closing.set()
        with self._change:
            self._change.notify()

    def ended(self, patience: float) -> bool:
        """Wait for the thread, at most so many seconds; then let go of it. Returns whether it has ended."""
        self._thread.join(max(patience, 0))
        if not self._thread.is_alive():
            return True
        self._let_go = True
        letting_go = threading.Thread(target=self._abandon, daemon=True)
        letting_go.start()
        letting_go.join(_ABANDONING)
        # What it waited for has gone. A thread that ends here is not amid a library's C++ when the program ends, where
        # Python before 3.14 ends threads in a way that some libraries abort the process for.
        self._thread.join(_ENDING)
        return False

    def lacks(self) -> tuple[int, int]:
        """How many iterations the sink has not got, and of how many."""
        waits = len(self._entries) + (self._called is not None and self._thread.is_alive())
        return min(self._lost + waits, self._given), self._given

    def warnings(self) -> list[str]:
        """What is to be told of trouble since the last call."""
        return [self._warnings.popleft() for _ in range(len(self._warnings))]

    def news(self) -> list[str]:
        """Where the sink can be seen, once it is open; since the last call."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _work(self) -> None:
        sink = self._opened()
        while sink is not None and (entry := self._next()) is not None:
            self._called = time.monotonic()
            try:
                sink.write(entry)
            except BaseException as error:  # a library's exit would end this thread without a word
                self._lost += 1
                self._tell("raised", f"iteration {entry.step} could not be logged ({_said(error)}); training goes on")
            self._called = None
        if sink is not None:
            try:
                sink.close(self._failed)
            except BaseException as error:
                self._tell("close", f"could not be closed ({_said(error)})")

    def _opened(self) -> Sink | None:
        """The sink; None where it could not be opened until the end."""
        delay, longest = RETRIES
        while True:
            last = self._closing.is_set()
            self._called = time.monotonic()
            try:
                sink = self._kind.open(self._run)
            except BaseException as error:
                if self._let_go:  # which made it fail
                    return None
                self._tell("open", f"cannot be opened ({_said(error)}); training goes on, and it is tried again")
            else:
                if sink.where:
                    self._news.append(f"{self.name:<10}{sink.where}")
                self._called = None
                return sink
            self._called = None
            if last:
                return None
            self._closing.wait(delay)
            delay = min(2 * delay, longest)

    def _next(self) -> Entry | None:
        """The oldest entry, once there is one; None at the end."""
        with self._change:
            while not self._entries and not self._closing.is_set():
                self._change.wait()
            return self._entries.popleft() if self._entries else None

    def _abandon(self) -> None:
        try:
            self._kind.abandon()
        except BaseException as error:
            self._tell("abandon", f"could not be let go of ({_said(error)})")

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._warnings.append(f"log.to {self.name}: {what}")


class Logs:
    """All sinks of a run. No method raises over a sink, or waits for one but `close`."""

    def __init__(self, run: LoggedRun, kinds: Mapping[str, SinkKind]):
        self._workers = [SinkWorker(name, kinds[name], run) for name in run.settings.to]

    def put(self, entry: Entry) -> None:
        """Log one iteration."""
        for worker in self._workers:
            worker.put(entry)

    def warnings(self) -> list[str]:
        """Sentences on trouble, each once."""
        return [each for worker in self._workers for each in worker.warnings()]

    def news(self) -> list[str]:
        """Lines on where sinks can be seen, each once."""
        return [each for worker in self._workers for each in worker.news()]

    def close(self, failed: bool = False) -> None:
        """Write what waits and close, for all sinks together at most CLOSING or CLOSING_FAILED seconds.

        failed: whether training ended with an error. `warnings` then also has what was not done until then.
        """
        patience = CLOSING_FAILED if failed else CLOSING
        until = time.monotonic() + patience
        for worker in self._workers:
            worker.end(failed)
        for worker in self._workers:
            if not worker.ended(until - time.monotonic()):
                worker._tell("late", f"was not done {patience:.0f} s after the end; it is left as it is")
            missing, given = worker.lacks()
            if missing:
                worker._tell("lacks", f"{missing} of {given} iterations are not there; metrics.jsonl has them all")


def _said(error: BaseException) -> str:
    return hidden(f"{type(error).__name__}: {first_sentence(error)}")
