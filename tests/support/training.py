"""Training in tests: configs with a few fields altered and processes of their own."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgrpo import train
from fastgrpo.settings.schema import TrainConfig
from support.processes import SERVER

ITERATIONS = 8
TIMED = ("seconds", "time/", "throughput/", "memory/")  # metrics that no two runs share


def _main(argv: Sequence[str], output: Path) -> None:
    """A process of its own."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(train.main(argv))


def start(argv: Sequence[str], output: Path) -> multiprocessing.Process:
    process = SERVER.Process(target=_main, args=(argv, output))
    process.start()
    return process


def altered(config: TrainConfig, fields: dict[str, object]) -> TrainConfig:
    for name, value in fields.items():
        group, _, field = name.rpartition(".")
        change = replace(getattr(config, group), **{field: value}) if group else value
        config = replace(config, **{group or field: change})
    return config
