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
    told = json.loads(ranks.agree(json.dumps(_search(run)) if ranks.first else ""))
    if told["refusal"]:
        raise ConfigError(told["refusal"])
    return Path(told["good"]) if told["good"] else None


def _search(run: Path) -> dict[str, str]:
    """Returns the newest good checkpoint's folder, "" where there is none, and a refusal, "" where there is no reason.

    Sets aside damaged ones that are newer.
    """
    damages: dict[Path, str] = {}
    for folder in reversed(folders(run)):
        if damage := find_damage(folder):
            damages[folder] = damage
            continue
        if damages:
            _set_aside(run, damages, folder)
        return {"good": str(folder), "refusal": ""}
    return {"good": "", "refusal": _refusal(damages) if damages else ""}


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


def _refusal(damages: Mapping[Path, str]) -> str:
    newest = next(iter(damages.values()))
    remove = " and ".join(map(str, damages))
    return f"{newest}; there is no earlier good checkpoint: to start from the beginning, remove {remove}."
