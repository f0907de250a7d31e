"""A stage's process, in a session of its own, which ends with all that it started; and the machine that it runs on."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "FASTGRPO_STAGE"
"""In the environment of a stage, and so of all that it starts, whatever sessions and parents those choose."""

_ROUNDS = 5  # what is killed may start something meanwhile
_FILE_BYTES = 4 * 2**30  # of any file that a stage writes: endless output must leave room for the archive


class Process:
    """A program with its output in a file, which has every line as soon as it is written."""

    def __init__(self, words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        """Raises OSError where it cannot be started."""
        self._mark = f"{log.stem}-{os.getpid()}-{time.monotonic_ns()}"  # whose it is can be read from it
        variables = os.environ | environment | {"PYTHONUNBUFFERED": "1", MARK: self._mark}
        variables.pop("TRITON_INTERPRET", None)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                words,
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        with suppress(ProcessLookupError):  # it may be over
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Ask it to stop, as Ctrl-C does: Python then says where it was, pytest what had failed."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """It and all that it started. One that waits within the system stays until that lets it go."""
        _kill(lambda mark: mark == self._mark)


def kill_left_behind() -> None:
    """Kill what a run started that was killed itself, so that nothing of it holds the device."""
    _kill(lambda mark: not Path("/proc", mark.split("-")[-2]).exists())


def _kill(chosen: Callable[[str], bool]) -> None:
    """The processes whose mark is chosen."""
    for _ in range(_ROUNDS):
        found = [number for number, mark in _marked() if chosen(mark)]
        if not found:
            return
        for number in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)


def _marked() -> Iterator[tuple[int, str]]:
    """Number and mark. Dead ones that nobody has asked about have no environment any more."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        marks = [value.decode() for name, _, value in (v.partition(b"=") for v in variables) if name == MARK.encode()]
        if marks and int(folder.name) != os.getpid():
            yield int(folder.name), marks[0]


class Machine:
    """The one at hand. Its clock begins when it is made. stopped: why the run is to end, once a signal says so."""

    def __init__(self, root: Path) -> None:
        self._root, self._began = root, time.monotonic()
        self.stopped = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = signal.Signals(number).name

    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, name: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
        """name: of the stage. Raises OSError."""
        return Process(words, self._root, log, environment)
