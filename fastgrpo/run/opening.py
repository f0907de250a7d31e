"""Finding what a run left behind, for the commands that use it; and refusing first what cannot come of it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgrpo.settings.commands import Weights
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.errors import ConfigError

EMA_FILE = "trainer/ema.safetensors"


def read_run(run: Path) -> TrainConfig:
    """The config of a run, from its folder. Raises ConfigError where there is no run in it."""
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder; accepted is the folder of a run.")
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: there is no config.toml in it, so it is not the folder of a run.")
    return load_toml(run / "config.toml")


@contextmanager
def blaming_config(run: Path) -> Iterator[None]:
    """Let a ConfigError of the block say that the run's own config asks for what is refused."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{run / 'config.toml'}: {error}") from error


def find_checkpoint(run: Path, iteration: int | None, weights: Weights) -> Path:
    """The folder of the checkpoint of `iteration`, or of the newest, every file of it verified.

    Raises ConfigError where there is none, it is damaged (which other one is good), or it lacks the `weights`.
    """
    found = _iterations(run)
    if not found:
        raise ConfigError(f"{run}: there is no checkpoint in it yet.")
    if iteration is not None and iteration not in found:
        raise ConfigError(
            f"--checkpoint {iteration}: {run} has no such checkpoint; there are {', '.join(map(str, found))}."
        )
    from fastgrpo.run.checkpoint import checkpoint_folder, find_damage  # only now: it takes seconds

    folder = checkpoint_folder(run, found[-1] if iteration is None else iteration)
    if damage := find_damage(folder):
        good = next((n for n in reversed(found) if find_damage(checkpoint_folder(run, n)) is None), None)
        advice = "there is no good checkpoint" if good is None else f"the last good one is --checkpoint {good}"
        raise ConfigError(f"{damage}; {advice}.")
    if weights == "ema" and not (folder / EMA_FILE).is_file():
        raise ConfigError("--weights ema: the run kept no moving average (its optim.ema is 0); accepted is trained.")
    return folder


def check_new_file(flag: str, path: Path) -> None:
    """Raise ConfigError, naming the `flag` that asks for it, where writing `path` would replace something."""
    if path.exists():
        raise ConfigError(f"{flag} {path}: it is there already; accepted is a new file.")


def check_new_folder(flag: str, path: Path) -> None:
    """The same for a folder, which may be there and empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{flag} {path}: it is there already; accepted is a folder that is new or empty.")


def check_writable(flag: str, folder: Path) -> None:
    """Raise ConfigError, naming the `flag` that asks for it, where no file can be made in `folder`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag}: cannot write in {str(folder)!r} ({error.strerror}); accepted is a place in a folder that exists "
            "and can be written."
        ) from error


def _iterations(run: Path) -> list[int]:
    """Those that have a checkpoint, ascending."""
    names = (folder.name.removeprefix("iter-") for folder in (run / "checkpoints").glob("iter-*"))
    return sorted(int(name) for name in names if name.isdigit())
