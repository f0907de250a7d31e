"""Tiny runs to sample and export from: how they were trained, and what they hold."""

import contextlib
from pathlib import Path

import torch

from fastgrpo.assembly import Training, load_training
from fastgrpo.run import checkpoint
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.workers import available_cores

CPU = torch.device("cpu")
RANK, ALPHA, DECAY = 3, 6.0, 0.5
POSITIVES = ["a cat", "two dogs", "a red house", "one tree", "the sea"]
NEGATIVES = ["blood", "a gun", "a knife"]
KINDS = {"full": ["--optim.ema", str(DECAY)], "plain": [], "lora": ["--optim.ema", str(DECAY)]}
KINDS["lora"] += ["--model.lora-rank", str(RANK), "--model.lora-alpha", str(ALPHA)]
KINDS["lora-bf16"] = [*KINDS["lora"], "--engine.dtype", "bf16"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "iter-000002"


def resumed(run: Path) -> Training:
    """What `--resume` would go on with: the training's own way of loading a checkpoint."""
    training = load_training(load_toml(run / "config.toml"), threads=available_cores())
    checkpoint.load(newest(run), training.trainable)
    return training


def weights_of(training: Training, weights: str) -> contextlib.AbstractContextManager[None]:
    return training.trainable.ema.in_place() if weights == "ema" else contextlib.nullcontext()
