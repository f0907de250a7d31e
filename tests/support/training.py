"""Training in tests: configs with a few fields altered and processes of their own."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastgrpo import train
from fastgrpo.assembly import Training, load_training
from fastgrpo.engine.passes import Passes
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from support.processes import SERVER

ITERATIONS = 8
TIMED = ("seconds", "time/", "throughput/", "memory/")  # metrics that no two runs share
FIXED = {"engine.graphs": "on", "engine.kernels": "on", "engine.reuse": "on"}


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


def trained(config: TrainConfig) -> tuple[Training, torch.Tensor, list[dict[str, float]]]:
    """The training after two iterations of five updates each, how far the weights moved, and the metrics."""
    training = load_training(config, threads=1)
    before = training.trainable.optimizer.weights.values.clone()
    metrics = [iterate(training, iteration, Console()) for iteration in (1, 2)]
    return training, training.trainable.optimizer.weights.values - before, metrics


def engine_of(config: TrainConfig) -> Passes:
    return load_training(config, threads=1, say=lambda line: None).engine


def counted_scores(training: Training, monkeypatch) -> list[int]:
    """How many images each call of the reward got, filled in as it is called."""
    begin, calls = training.reward.begin, []

    def counting(images, *rest):
        calls.append(len(images))
        return begin(images, *rest)

    monkeypatch.setattr(training.reward, "begin", counting)
    return calls
