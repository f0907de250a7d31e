"""A small training, what ten of its updates come to by plain calls, and what tests of the engine do with one."""

from pathlib import Path

import pytest
import torch

from fastgrpo.assembly import Training
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from support.training import altered, trained


@pytest.fixture(scope="session")
def base(config_file: Path) -> TrainConfig:
    """Linear in the gradient, with no decision near a bound: AdamW with an eps of 1, a wide clip range."""
    changes = {
        "engine.threads": 1,
        "iterations": 2,
        "updates_per_iteration": 5,
        "grpo.std_floor": 1e-9,
        "grpo.clip_low": 0.9,
        "grpo.clip_high": 10.0,
        "optim.eps": 1.0,
        "optim.lr": 1e-3,
        "optim.max_grad_norm": 1e9,
    }
    return altered(load_toml(config_file), changes)


@pytest.fixture(scope="session")
def plain(base: TrainConfig) -> tuple[Training, torch.Tensor, list[dict[str, float]]]:
    return trained(base)
