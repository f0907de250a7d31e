"""Which checkpoint a run goes on from: the newest good one, also where newer ones are damaged."""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from fastgrpo.run.checkpoint import find_damage, folders, read_state, record_best
from fastgrpo.system.console import warn
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError

_DAMAGED = "damaged-"
"""Begins the name of a checkpoint that was set aside: nothing that looks for checkpoints finds it."""


def recover(run: Path, ranks: Ranks = Ranks()) -> Path | None:  # noqa: B008 (frozen)
    """The newest good checkpoint of a claimed run, every file verified, or None where the run has none.

    Newer ones, which are damaged, are set aside with a warning: iter-000050 becomes damaged-iter-000050, so that it is
    neither lost nor counted, and best.json, where there is one, names none of them. All processes are to call this; the
    first one verifies, and the others are told.
    Raises ConfigError on all of them where there are checkpoints and none is good: which file is damaged, and what to
    remove. Then nothing is set aside. Raises OSError where a checkpoint can be neither read nor renamed.
    """
    told = json.loads(ranks.agree(json.dumps(_recover(run)) if ranks.first else ""))
    if told["refusal"]:
        raise ConfigError(told["refusal"])
    return Path(told["good"]) if told["good"] else None


def find_good(run: Path) -> tuple[Path | None, str]:
    """The newest good checkpoint, every file verified, None where the run has none; and what is wrong with newer ones.

    Changes nothing. Raises ConfigError and OSError as `recover`.
    """
    good, damages = _search(run)
    return good, " and ".join(damages.values())


def _search(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest good checkpoint and, of the newer ones, folder -> what is wrong with it, the newest first."""
    damages: dict[Path, str] = {}
    for folder in reversed(folders(run)):
        if not (damage := find_damage(folder)):
            return folder, damages
        damages[folder] = damage
    if damages:
        remove = " and ".join(map(str, damages))
        raise ConfigError(
            f"{next(iter(damages.values()))}; there is no earlier good checkpoint: to start from the beginning, remove "
            f"{remove}."
        )
    return None, damages


def _recover(run: Path) -> dict[str, str]:
    """Returns the newest good checkpoint's folder, "" where there is none, and a refusal, "" where there is none."""
    try:
        good, damages = _search(run)
    except ConfigError as error:
        return {"good": "", "refusal": str(error)}
    if good and damages:
        _set_aside(run, damages, good)
    return {"good": str(good or ""), "refusal": ""}


def _set_aside(run: Path, damages: Mapping[Path, str], good: Path) -> None:
    """Rename damaged checkpoints. damages: folder -> what is wrong with it, the newest first."""
    record_best(run, read_state(good))  # first: were this cut short, it would name none that is away
    aside = [folder.rename(_free_name(folder)) for folder in damages]
    warn(
        f"{' and '.join(damages.values())}: the run goes on from {good}; what is damaged was set aside and may be "
        f"removed ({', '.join(map(str, aside))})"
    )


def _free_name(folder: Path) -> Path:
    """Where a damaged checkpoint is kept: damaged-iter-000050, with -2, -3, ... where there was one before."""
    names = (f"{_DAMAGED}{folder.name}{f'-{number}' if number > 1 else ''}" for number in count(1))
    return next(path for name in names if not (path := folder.with_name(name)).exists())
