"""A run's folder while a process trains in it: claimed by one, stopped by signals."""

import errno
import fcntl
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from safetensors.torch import save

from fastgrpo import base_pictures
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.system import pictures
from fastgrpo.system.console import Stopped, warn
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import PARTIAL_SUFFIX, naming, write_atomically
from fastgrpo.system.finite import BrokenPicture
from fastgrpo.system.kept import kept_files
from fastgrpo.system.output import say_in_handler

_LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems without them
_KEPT = [file.name for file in kept_files(Path(base_pictures.STEM))]
# What a start that was killed before there was a run can leave; what is kept is looked at before it is used.
_BEFORE_A_RUN = {_LOCK, *_KEPT, *(f"{name}{PARTIAL_SUFFIX}" for name in ("config.toml", *_KEPT))}


def new_folder(preset: str) -> Path:
    """Make runs/PRESET-DATE-TIME, with -2, -3, ... where others began in the same second. Raises ConfigError."""
    first = Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = first
    for number in count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            why = f"cannot be made ({error.strerror}); --run names another"
            raise ConfigError.of("run", str(folder), why) from error
    return folder


@contextmanager
def claim(folder: Path, resumed: bool) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system frees it again even when this one is killed.

    A new run's folder is made, and removed again if nothing came of it. Where the file system has no locks, there is a
    warning instead. Raises ConfigError when the folder is in use, or is to be new and has something in it.
    """
    _refuse_file(folder)
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "w")  # noqa: SIM115 (closed by the block below)
    with lock:
        _lock(lock, folder, fcntl.LOCK_EX)
        _refuse_other_things(folder, resumed)
        try:
            yield
        finally:
            with suppress(OSError):  # some file systems keep what is still open
                if os.listdir(folder) == [_LOCK]:
                    os.remove(folder / _LOCK)
                    os.rmdir(folder)


def check_claim(folder: Path, resumed: bool) -> None:
    """Raise ConfigError for a run's folder that `claim` would refuse now. Nothing is made or changed."""
    _refuse_file(folder)
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with _refusing(folder):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tempfile.TemporaryFile(dir=place).close()  # has no name there, and is gone at once
        lock = open(folder / _LOCK) if (folder / _LOCK).exists() else nullcontext()  # noqa: SIM115 (closed below)
    with lock as held:
        if held:
            _lock(held, folder, fcntl.LOCK_SH)  # all that a file takes that is open for reading, on some file systems
    if place == folder.absolute():
        _refuse_other_things(folder, resumed)


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run = {str(folder)!r}: this is a file; accepted is a folder that is new or empty.")


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block, in which something is made in the folder, into a ConfigError."""
    try:
        yield
    except OSError as error:
        why = f"cannot be written ({error.strerror}); accepted is a folder that is new or empty"
        raise ConfigError.of("run", str(folder), why) from error


def _refuse_other_things(folder: Path, resumed: bool) -> None:
    if not resumed and not set(os.listdir(folder)) <= _BEFORE_A_RUN:
        why = f"accepted is a folder that is new or empty; to go on with the run in it, say --resume {folder}"
        raise ConfigError.of("run", str(folder), why)


def _lock(lock: TextIO, folder: Path, kind: int) -> None:
    """Lock the open file, or warn where that cannot be done. kind: fcntl.LOCK_EX, for oneself alone, or LOCK_SH.

    Raises ConfigError where another process has locked it for itself.
    """
    try:
        with naming(folder / _LOCK):
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
    # The second where the system makes a lock of a file one of its bytes.
    except (BlockingIOError, PermissionError) as error:
        raise ConfigError(f"run = {str(folder)!r}: another process is training in this folder.") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        what = f"{folder / _LOCK} cannot be locked ({error.strerror})"
        warn(f"{what}: see to it that no other process trains in this folder")


def keep_evidence(run: Path, error: BrokenReward | BrokenPicture) -> tuple[Path, Path]:
    """Save the prompt and the image that a reward or the model failed on. Returns the two files.

    broken_reward.json and .png; of a picture that is not finite broken_picture.json and .safetensors, which holds the
    numbers, `image` and `latents`, since no PNG can.
    """
    if isinstance(error, BrokenReward):
        path, of = run / "broken_reward.json", asdict(error.prompt)
        image = path.with_suffix(".png")
        pictures.write_image(image, error.image)
    else:
        path, of = run / "broken_picture.json", asdict(error.request)
        image = path.with_suffix(".safetensors")
        tensors = {"image": error.image, "latents": error.latents}
        write_atomically(image, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    write_atomically(path, json.dumps({"message": error.message, **of}, indent=2, ensure_ascii=False).encode())
    return path, image


class StopSignal:
    """Asks for a stop after the iteration at hand, at the first signal. Before the first iteration it raises Stopped.

    These are Ctrl-C and SIGTERM; SIGHUP, of a terminal that goes away; SIGUSR1, with which SLURM warns of a job's end.
    A second Ctrl-C or SIGTERM ends the process. Not so one of several processes, whose launcher repeats what the
    terminal has told them all. Ignored signals stay so: SIGHUP under nohup, Ctrl-C in a shell's background.
    Weights in the middle of an iteration are never saved, since an exact resume cannot use them.
    Python handles signals in the main thread alone: in another thread this leaves them alone and says so.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    _ENDING = (signal.SIGTERM, signal.SIGINT)  # the others may come twice for one reason

    def __init__(self, processes: int = 1) -> None:
        """processes: how many train together."""
        self.number: int | None = None
        self._agreed = 0
        self._several = processes > 1
        self._begun = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            warn("signals are handled in a program's main thread, and this is another: none asks for a checkpoint")
            return self
        handled = [number for number in self._NUMBERS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._previous = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin_iterations(self) -> None:
        """From now on a signal lets the iteration at hand be finished and saved."""
        self._begun = True

    @property
    def requested(self) -> bool:
        return self.number is not None

    def agreed(self, ranks: Ranks) -> bool:
        """Whether a stop has been asked for on any process; all get the same answer, and the same exit code."""
        self._agreed = ranks.largest(self.number or 0)
        return self._agreed > 0

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self._agreed or self.number or 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._begun:
            for again in self._previous:
                signal.signal(again, signal.SIG_DFL)
            raise Stopped(number)
        first, self.number = self.number is None, self.number or number
        advice = "The last checkpoint on disk remains."
        if number in self._ENDING and not self._several:
            for again in self._previous.keys() & self._ENDING:
                signal.signal(again, signal.SIG_DFL)
            advice = "A second signal stops at once; the last checkpoint on disk remains."
        elif not first:
            return
        say_in_handler(f"\n{signal.Signals(number).name}: finishing this iteration, then saving. {advice}\n")
