"""A run's folder while a process trains in it: claimed by one, stopped by signals."""

import dataclasses
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors.torch import save

from fastgrpo import pictures
from fastgrpo.config import ConfigError
from fastgrpo.files import write_atomically
from fastgrpo.finite import BrokenPicture
from fastgrpo.rewards.terms import BrokenReward

_LOCK = ".lock"
_BEFORE_A_RUN = {_LOCK, "config.toml.partial"}  # what a start that was killed before there was a run can leave


@contextmanager
def claim(folder: Path, resumed: bool) -> Iterator[None]:
    """Keep other processes out of a run's folder; the system frees it again even when this one is killed.

    A new run's folder is made, and removed again if nothing came of it.
    Raises ConfigError when the folder is in use, or is to be new and has something in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run = {str(folder)!r}: this is a file; accepted is a folder that is new or empty.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "w")  # noqa: SIM115 (closed by the block below)
    except OSError as error:
        raise ConfigError(
            f"run = {str(folder)!r}: cannot be written ({error.strerror}); accepted is a folder that is new or empty."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run = {str(folder)!r}: another process is training in this folder.") from error
        if not resumed and not set(os.listdir(folder)) <= _BEFORE_A_RUN:
            raise ConfigError(
                f"run = {str(folder)!r}: accepted is a folder that is new or empty; to go on with the run in it, "
                f"say --resume {folder}."
            )
        try:
            yield
        finally:
            if os.listdir(folder) == [_LOCK]:
                os.remove(folder / _LOCK)
                os.rmdir(folder)


def keep_evidence(run: Path, error: BrokenReward | BrokenPicture) -> tuple[Path, Path]:
    """Save the prompt and the image that something failed on. Returns the two files.

    broken_reward.json and .png; of a picture that is not finite broken_picture.json and .safetensors, which holds the
    numbers, `image` and `latents`, since no PNG can.
    """
    if isinstance(error, BrokenReward):
        path, of = run / "broken_reward.json", error.prompt
        image = path.with_suffix(".png")
        pictures.write_image(image, error.image)
    else:
        path, of = run / "broken_picture.json", error.request
        image = path.with_suffix(".safetensors")
        tensors = {"image": error.image, "latents": error.latents}
        write_atomically(image, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    record = {"message": error.message, **dataclasses.asdict(of)}
    write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False).encode())
    return path, image


class StopSignal:
    """The first SIGTERM or Ctrl-C asks for a stop once the iteration at hand is complete; a second ends the process.

    Weights in the middle of an iteration are of no use to an exact resume, so they are never saved.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.number or 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for again in self._previous:
            signal.signal(again, signal.SIG_DFL)
        message = (
            f"\n{signal.Signals(number).name}: finishing this iteration, then saving. "
            "A second signal stops at once; the last checkpoint on disk remains.\n"
        )
        os.write(2, message.encode())  # print is not safe inside a signal handler
