"""Ends a job of several processes when one of them is killed or stuck, while the others wait for it in a collective.

Each process tells its pulse to the store that they met through, and looks at those of all others, in a thread of its
own. The first that finds one dead writes that into the store and prints one line; then all end with exit code 1.

A process is dead where the system says that it is gone (by a pidfd, on its own machine), where its thread has gone
silent for its limit (stopped, its machine lost), or where it is the one that the others wait for and it has made no
progress for that long: it has begun the fewest collectives. A process that waits is never the one.

Why not by torch's own means:
    monitored_barrier   only gloo has it, and it finds who is late at barriers, not in the middle of an iteration
    NCCL's watchdog     (TORCH_NCCL_ASYNC_ERROR_HANDLING) and gloo's timeout have one timeout for all collectives, also
                        for those that wait while the first process evaluates for an hour, and do not say for whom
    torchrun's agent    sees processes that exit on its machine, not those that are stuck. It is no rival: it ends what
                        is left of a job, and with --max-restarts starts it again
"""

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from fastgrpo.system.console import complain
from fastgrpo.system.launch import Launch
from fastgrpo.system.pulse import PULSE

_BEAT = 1.0  # seconds between beats, at most; fewer where the limit is short
_GRACE = 5.0  # seconds for a connection to come back, and for the last words of a process that has ended
_BROKEN = 15.0  # seconds of silence that tell who is dead, once a collective has failed

_KILLED = "was killed or crashed"

State = Literal["running", "done", "left"]


class OthersEnded(RuntimeError):
    """Another process of the job has ended it and has said why."""


@dataclass(frozen=True)
class Beat:
    """What a process tells of itself. number: of the beat. limit: seconds that it may be still or silent.

    The others are those of `Pulse`; begun is false for one that is not to be watched.
    """

    number: int
    state: State = "running"
    marks: int = 0
    collectives: int = 0
    waiting: bool = False
    begun: bool = False
    iteration: int = 0
    phase: str = ""
    limit: float = 0.0
    kept: str = ""


@dataclass(frozen=True)
class Sign:
    """What is known of process `index`. silent, still: seconds since it has told anything, and of progress.

    gone: whether the system says that it has ended.
    """

    index: int
    beat: Beat
    silent: float
    still: float
    gone: bool = False


@dataclass(frozen=True)
class Verdict:
    """index: of the dead process. why: what is wrong with it, a clause. speaker: who prints the line.

    left: it has ended by itself and said why; nobody has to.
    """

    index: int
    why: str
    speaker: int
    left: bool = False


def judge(signs: Sequence[Sign], broken: bool = False) -> tuple[int, str] | None:
    """Which process is dead, and a clause that says why; None where all are alive.

    broken: whether a collective has failed, so that one must be.
    """
    running = [sign for sign in signs if sign.beat.state == "running"]
    for sign in running:
        if sign.gone:
            return sign.index, f"{_KILLED}, last seen"
    for sign in running:
        limit = min(sign.beat.limit, _BROKEN) if broken else sign.beat.limit
        if (sign.beat.begun or broken) and sign.silent > limit:
            return sign.index, f"has not answered for {sign.silent:.0f} s, last seen"
    if not running:
        return None
    fewest = min(sign.beat.collectives for sign in running)
    last = [sign for sign in running if sign.beat.collectives == fewest]
    # Of those that are equally far, one that works before one that waits, and the one that has done so longest.
    first = min(last, key=lambda sign: (sign.beat.waiting, -sign.still))
    if not all(sign.beat.begun for sign in last) or first.still <= first.beat.limit:
        return None
    if first.beat.waiting:
        return first.index, f"has waited for the others for {first.still:.0f} s, and all of them wait"
    return first.index, f"has made no progress for {first.still:.0f} s"


class Watchdog:
    """The threads that tell this process's pulse and look at the others'. Made by `watching`."""

    def __init__(self, launch: Launch, stuck_after: float):
        self._launch, self._after = launch, stuck_after
        self._tick = min(_BEAT, stuck_after / 5)
        self._over, self._ended = threading.Event(), threading.Event()
        self._broken = False
        self._number, self._clock, self._looked = 0, 0.0, time.monotonic()
        self._beats: dict[int, tuple[Beat, float, float]] = {}  # with when the number and when the marks changed
        self._people: dict[int, _Person] = {}
        self._known = False  # whether all have begun to tell
        self._lock = threading.Lock()  # the store is asked by one thread at a time
        self._store = self._connect(_GRACE)
        self._store.set(self._key("who", launch.index), json.dumps(asdict(_Person.own())))
        self._tell("running")
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._watch, self._watch_the_watch)]

    def start(self) -> None:
        PULSE.failed, PULSE.begins = self._collective_failed, self._begins
        for thread in self._threads:
            thread.start()

    def close(self, state: State) -> None:
        """This process ends. state: "done", or "left" where it has failed, of which it says itself what is wrong."""
        PULSE.failed = PULSE.begins = None
        self._over.set()
        if self._lock.acquire(timeout=_GRACE):  # unless the store does not answer
            with suppress(RuntimeError):
                self._tell(state)
                if state == "left":
                    self._agree(Verdict(self._launch.index, "", self._launch.index, left=True))
                if self._hosts:  # what the others have not read by then they cannot read any more
                    self._linger()
            self._lock.release()
        for person in self._people.values():
            person.forget()

    # -----------------------------------------------------------------------------------------------------------------
    # The main thread

    def _collective_failed(self, error: RuntimeError) -> None:
        """Wait until it is known who is dead, which ends this process. Returns where nobody is: then it is an error.

        Raises OthersEnded where a process has ended the job and said why.
        """
        self._broken = True
        if self._ended.wait(_BROKEN + 2 * _GRACE):
            raise OthersEnded("another process has ended the job") from error

    def _begins(self) -> None:
        """Tell it at once: stopped before the thread's next turn, this process would pass for one that loads."""
        if self._lock.acquire(timeout=_GRACE):  # unless the store does not answer, of which others speak
            with suppress(RuntimeError):
                self._tell("running")
            self._lock.release()

    # -----------------------------------------------------------------------------------------------------------------
    # The threads

    def _watch(self) -> None:
        while not self._over.wait(self._tick):
            try:
                with self._lock:
                    if self._over.is_set():
                        return
                    found = self._exchange()
            except RuntimeError:  # of which torch's errors of stores are
                if self._over.wait(self._tick):
                    return
                if not self._reconnect():
                    self._store_is_lost()
                continue
            if found:
                self._end(found)
                return

    def _watch_the_watch(self) -> None:
        """A store whose host is stopped answers nothing, and does not say that it will not."""
        seen, idle, limit = self._number, 0.0, 0.0
        while not self._over.wait(self._tick):
            idle, seen = (idle + self._tick if self._number == seen else 0.0), self._number
            limit = self._after * PULSE.patience + _GRACE
            if idle > limit:
                self._store_is_lost()

    def _exchange(self) -> Verdict | None:
        """Tell and look. Returns the verdict, if there is one."""
        now = time.monotonic()
        # While this process is stopped itself, nobody's time runs: it would find all others silent when it goes on.
        self._clock += min(now - self._looked, 2 * self._tick)
        self._looked = now
        self._tell("running")
        if self._store.check([self._key("verdict")]):
            return Verdict(**json.loads(self._store.get(self._key("verdict"))))
        everybody = range(self._launch.count)
        if not self._known:
            self._known = self._store.check([self._key("who", index) for index in everybody])
            if not self._known:
                return None
            told = self._store.multi_get([self._key("who", index) for index in everybody])
            self._people = {index: _Person(**json.loads(text)) for index, text in zip(everybody, told, strict=True)}
        gone = {index for index, person in self._people.items() if person.gone}  # before what it told last is read
        told = self._store.multi_get([self._key("beat", index) for index in everybody])
        for index, text in zip(everybody, told, strict=True):
            beat = Beat(**json.loads(text))
            old, spoke, moved = self._beats.get(index, (Beat(-1, marks=-1), 0.0, 0.0))
            spoke = spoke if old.number == beat.number else self._clock
            moved = moved if old.marks == beat.marks else self._clock
            self._beats[index] = beat, spoke, moved
        signs = [
            Sign(index, beat, self._clock - spoke, self._clock - moved, index in gone)
            for index, (beat, spoke, moved) in self._beats.items()
        ]
        found = judge(signs, self._broken)
        if found is None or found[0] == self._launch.index:  # whoever is stuck leaves it to the others to say so
            return None
        return self._agree(Verdict(*found, speaker=self._launch.index))

    def _tell(self, state: State) -> None:
        self._number += 1
        pulse = PULSE
        limit = self._after * pulse.patience + pulse.longest
        told = pulse.marks, pulse.collectives, pulse.waiting, pulse.begun, pulse.iteration, pulse.phase_name
        beat = Beat(self._number, state, *told, limit, pulse.kept)
        self._store.set(self._key("beat", self._launch.index), json.dumps(asdict(beat)))

    def _agree(self, mine: Verdict) -> Verdict:
        """The first verdict of all processes."""
        return Verdict(**json.loads(self._store.compare_set(self._key("verdict"), "", json.dumps(asdict(mine)))))

    def _end(self, verdict: Verdict) -> None:
        """End this process, in the middle of whatever its main thread waits for."""
        if verdict.left:
            self._ended.set()
            with suppress(RuntimeError), self._lock:
                self._tell("left")
            if not self._over.wait(_GRACE):
                os._exit(1)
            return
        if verdict.speaker == self._launch.index:
            complain(self._line(verdict))
        time.sleep(2 * self._tick)  # the others read the verdict: torchrun ends them as soon as one has ended
        person = self._people.get(verdict.index)
        if person and verdict.index != self._launch.index:
            person.kill()  # or torchrun would wait half a minute for one that is stopped
        os._exit(1)

    def _line(self, verdict: Verdict) -> str:
        beat, first = (self._beats.get(index, (Beat(0),))[0] for index in (verdict.index, 0))
        at = f"iteration {beat.iteration}" if beat.iteration else "what comes before the first iteration"
        phase = f" ({beat.phase})" if beat.phase else ""
        kept = first.kept or PULSE.kept  # the first process writes checkpoints, and knows of the newest
        return f"{self._name(verdict.index)} {verdict.why} in {at}{phase}: the job ends; {kept}"

    def _name(self, index: int) -> str:
        person = self._people.get(index)
        return f"the process of rank {index}" + (f" on {person.host}" if person else "")

    # -----------------------------------------------------------------------------------------------------------------
    # The store

    @property
    def _hosts(self) -> bool:
        """Whether this process is the store's host."""
        return self._launch.index == 0 and not self._launch.agent_store

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, ("fastgrpo", self._launch.restarts, *parts)))

    def _connect(self, seconds: float) -> dist.TCPStore:
        """A connection of its own: torch's threads use the other one, and a store is no thing to share."""
        host, _, port = self._launch.address.rpartition(":")
        return dist.TCPStore(
            host, int(port), is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )

    def _reconnect(self) -> bool:
        with suppress(RuntimeError):
            self._store = self._connect(_GRACE)
            return True
        return False

    def _store_is_lost(self) -> None:
        """End this process: nothing can be agreed on any more. The lowest rank of each machine prints the line."""
        if self._over.is_set():
            return
        gone = [index for index, person in self._people.items() if person.gone]
        here = [index for index, person in self._people.items() if person.is_here and index not in gone]
        dead = gone[0] if gone else 0
        speaks = self._launch.index == min([index for index in here if index != dead] or [self._launch.index])
        if speaks and (gone or not self._launch.agent_store):
            self._end(Verdict(dead, f"{_KILLED if gone else 'does not answer'}, last seen", self._launch.index))
        if speaks:
            complain(f"torchrun's agent at {self._launch.address} does not answer: the job ends; {PULSE.kept}")
        time.sleep(self._tick)
        os._exit(1)

    def _linger(self) -> None:
        """Wait for the others' last words."""
        keys = [self._key("beat", index) for index in range(self._launch.count)]
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and self._store.check(keys):
            states = [json.loads(text)["state"] for text in self._store.multi_get(keys)]
            if "running" not in states:
                return
            time.sleep(self._tick)


@dataclass
class _Person:
    """Where a process is. machine: told apart by its boot, processes by their name space, which containers have."""

    host: str
    pid: int
    machine: str

    def __post_init__(self) -> None:
        self._descriptor: int | None = None
        self._ended = False
        if self.is_here and hasattr(os, "pidfd_open"):
            try:
                self._descriptor = os.pidfd_open(self.pid)
            except ProcessLookupError:
                self._ended = True
            except OSError:  # an old system, or a sandbox: then only silence tells
                pass

    @classmethod
    def own(cls) -> "_Person":
        return cls(socket.gethostname(), os.getpid(), _machine())

    @property
    def is_here(self) -> bool:
        return self.machine != "" and self.machine == _machine()

    @property
    def gone(self) -> bool:
        """Whether the system says that the process has ended."""
        if self._descriptor is not None and not self._ended:
            self._ended = bool(select.select([self._descriptor], [], [], 0)[0])
        return self._ended

    def kill(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _machine() -> str:
    """Tells machines, and on one the name spaces of process numbers, apart; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@contextmanager
def watching(launch: Launch, stuck_after: float) -> Iterator[None]:
    """Let this process be watched, and watch the others, for the time of the block. Alone, or with 0, nobody is.

    stuck_after: seconds beyond a process's longest piece of work so far, after which it is dead.
    """
    if launch.count == 1 or not stuck_after:
        yield
        return
    PULSE.restart()
    watchdog = Watchdog(launch, stuck_after)
    watchdog.start()
    try:
        yield
    except BaseException:
        watchdog.close("left")
        raise
    watchdog.close("done")
