"""Training in tests: configs with a few fields altered, processes of their own, and a detector."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fastgrpo import train
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.types import Prompt, Verdict

ITERATIONS = 8
TIMED = ("seconds", "time/", "throughput/", "memory/")  # metrics that no two runs share
# Processes like those of the command line, forked from one that has the libraries imported and has run nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fastgrpo.training"])


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


class Darkness:
    """A detector of dark pictures."""

    name = "darkness"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        return [Verdict(unsafe=bool(image.mean() < 0.5), correct=bool(image[0].mean() > 0.5)) for image in images]


def altered(config: TrainConfig, fields: dict[str, object]) -> TrainConfig:
    for name, value in fields.items():
        group, _, field = name.rpartition(".")
        change = replace(getattr(config, group), **{field: value}) if group else value
        config = replace(config, **{group or field: change})
    return config
