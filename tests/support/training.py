"""Training in tests: configs with a few fields altered and processes of their own."""

import gc
import itertools
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
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from support.processes import SERVER

ITERATIONS = 8
TIMED = ("seconds", "time/", "throughput/", "memory/")  # metrics that no two runs share
FIXED = {"engine.graphs": "on", "engine.kernels": "on", "engine.reuse": "on"}


def _main(argv: Sequence[str], output: Path) -> None:
    """A process of its own."""
    gc.freeze()  # as in support.processes
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


def assert_same_run(run: Path, expected: Path) -> None:
    """Weights, moments, pictures and every metric but the clock's, bit for bit."""
    newest = f"checkpoints/iter-{ITERATIONS:06d}"
    for name in (f"{newest}/unet/diffusion_pytorch_model.safetensors", f"{newest}/trainer/optimizer.safetensors"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    pictures = sorted(path.name for path in (expected / "samples").iterdir())
    assert sorted(path.name for path in (run / "samples").iterdir()) == pictures
    for name in pictures:
        assert (run / "samples" / name).read_bytes() == (expected / "samples" / name).read_bytes(), name
    records, expected_records = read_metrics(run / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl")
    assert [record["iteration"] for record in records] == list(range(1, ITERATIONS + 1))
    untimed = [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in records]
    assert untimed == [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in expected_records]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(records))


def run_here(argv: Sequence[str], capsys) -> tuple[int, str, str]:
    code = train.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
