"""Finding a run's settings and its checkpoints, for the commands that use it."""

from pathlib import Path

from fastgrpo.settings.commands import Weights
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.errors import ConfigError


def read_run(run: Path) -> TrainConfig:
    """The config of a run, from its folder. Raises ConfigError where there is no run in it."""
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder; accepted is the folder of a run.")
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: there is no config.toml in it, so it is not the folder of a run.")
    return load_toml(run / "config.toml")


def find_checkpoint(run: Path, iteration: int | None, weights: Weights) -> Path:
    """The folder of the checkpoint of `iteration`, or of the newest, every file of it verified.

    Raises ConfigError where there is none, it is damaged (which other one is good), or it lacks the `weights`.
    """
    names = (folder.name.removeprefix("iter-") for folder in (run / "checkpoints").glob("iter-*"))
    found = sorted(int(name) for name in names if name.isdigit())
    if not found:
        raise ConfigError(f"{run}: there is no checkpoint in it yet.")
    if iteration is not None and iteration not in found:
        raise ConfigError(
            f"--checkpoint {iteration}: {run} has no such checkpoint; there are {', '.join(map(str, found))}."
        )
    from fastgrpo.run.checkpoint import EMA_FILE, checkpoint_folder, find_damage  # only now: it takes seconds

    folder = checkpoint_folder(run, found[-1] if iteration is None else iteration)
    if damage := find_damage(folder):
        good = next((n for n in reversed(found) if find_damage(checkpoint_folder(run, n)) is None), None)
        advice = "there is no good checkpoint" if good is None else f"the last good one is --checkpoint {good}"
        raise ConfigError(f"{damage}; {advice}.")
    if weights == "ema" and not (folder / EMA_FILE).is_file():
        raise ConfigError("--weights ema: the run kept no moving average (its optim.ema is 0); accepted is trained.")
    return folder
