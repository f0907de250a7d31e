"""Finding a run's settings and its checkpoints, for the commands that use it."""

from collections.abc import Sequence
from pathlib import Path

from fastgrpo.run import best
from fastgrpo.settings.commands import CheckpointName, Weights
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.shared_run import PREFIX, fetch_run


def local_run(run: str | Path) -> Path:
    """The folder of a RUN; one that is `hf:OWNER/NAME` is downloaded to runs/NAME first. Raises ConfigError."""
    return fetch_run(str(run)) if str(run).startswith(PREFIX) else Path(run)


def read_run(run: Path) -> TrainConfig:
    """The config of a run, from its folder. Raises ConfigError where there is no run in it."""
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder; accepted is the folder of a run.")
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: there is no config.toml in it, so it is not the folder of a run.")
    return load_toml(run / "config.toml")


def find_checkpoint(run: Path, asked: CheckpointName, weights: Weights) -> Path:
    """The folder of the checkpoint that was asked for, every file of it verified.

    Raises ConfigError where there is none, it is damaged (which other one is good), or it lacks the `weights`; and for
    `best` where these are not the weights that were evaluated.
    """
    names = (folder.name.removeprefix("iter-") for folder in (run / "checkpoints").glob("iter-*"))
    found = sorted(int(name) for name in names if name.isdigit())
    if not found:
        raise ConfigError(f"{run}: there is no checkpoint in it yet.")
    iteration = found[-1] if asked == "latest" else _best(run, weights, found) if asked == "best" else asked
    if iteration not in found:
        name = asked if asked == iteration else f"{asked}, after iteration {iteration}"
        raise ConfigError(f"--checkpoint {name}: {run} has no such checkpoint; {_those_there(found)}.")
    from fastgrpo.run.checkpoint import EMA_FILE, checkpoint_folder, find_damage  # only now: it takes seconds

    folder = checkpoint_folder(run, iteration)
    if damage := find_damage(folder):
        good = next((n for n in reversed(found) if find_damage(checkpoint_folder(run, n)) is None), None)
        advice = "there is no good checkpoint" if good is None else f"the last good one is --checkpoint {good}"
        raise ConfigError(f"{damage}; {advice}.")
    if weights == "ema" and not (folder / EMA_FILE).is_file():
        raise ConfigError("--weights ema: the run kept no moving average (its optim.ema is 0); accepted is trained.")
    return folder


def _best(run: Path, weights: Weights, found: Sequence[int]) -> int:
    """The iteration of the best checkpoint. found: of all that are there. Raises ConfigError where there is none."""
    named = best.read(run)
    if named is None or named.iteration is None:
        why = named.why if named else "no evaluation of it has counted unsafe images"
        raise ConfigError(f"--checkpoint best: {run} has no best checkpoint, since {why}; {_those_there(found)}.")
    if named.weights != weights:
        raise ConfigError(
            f"--checkpoint best: it was chosen by its {named.weights} weights; accepted is --weights {named.weights}, "
            f"and --checkpoint {named.iteration} for others of the same iteration."
        )
    return named.iteration


def _those_there(found: Sequence[int]) -> str:
    return f"there are {', '.join(map(str, found))}"
