"""Training where only a window's steps have noise: the ratio, what is drawn, and going on after a stop."""

from pathlib import Path

import pytest

from fastgrpo.assembly import load_training
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from support.training import altered

# 6 places, of which the last is not trained on: windows of 2 begin at 0, 2 and 3, one iteration each.
WINDOW = {
    "rollout.steps": 6,
    "rollout.stochastic": "window",
    "rollout.steps_outside": 3,
    "grpo.window": 2,
    "grpo.window_every": 1,
    "grpo.window_stride": 2,
    "grpo.kl": 0.0,
    "grpo.std_floor": 1e-9,
    "engine.threads": 1,
}


# As many rows in the update as in the rollout: BLAS sums very few in another order.
TREE = {"rollout.initial_noise": "per_prompt", "rollout.branches": (3,), "updates_per_iteration": 1, "micro_batch": 6}


@pytest.fixture(scope="module")
def config(config_file: Path) -> TrainConfig:
    return altered(load_toml(config_file), WINDOW)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout.solver_outside": "dpm++", "engine.graphs": "on"},
        {"rollout.solver_outside": "dpm++", "rollout.steps_outside": 0, "grpo.ratio_norm": True, "engine.graphs": "on"},
        TREE | {"rollout.solver_outside": "dpm++"},
    ],
    ids=["ddim", "dpm++", "dpm++ on the whole grid", "a tree"],
)
def test_the_ratio_is_exactly_one_on_every_learned_step(config: TrainConfig, changes: dict[str, object]) -> None:
    training = load_training(altered(config, changes), threads=1, say=lambda line: None)
    places = []
    for iteration in (1, 2, 3):
        values = iterate(training, iteration, Console(quiet=True))
        assert values["ratio/max_abs_dev_first"] == 0
        assert values["grad/norm"] > 0
        places.append(training.schedule.timesteps[training.schedule.trainable].tolist())
    assert training.engine.old_log_prob == "rollout"
    assert places == [[831, 665], [499, 333], [333, 167]]
