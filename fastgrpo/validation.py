"""What a config may not say, found out before anything is loaded."""

import math
from typing import Any

import torch

from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.shapes.world import HAZARDS

DIFFUSION_STEPS = 1000  # timesteps every SD 1.x / 2.x was trained with


def validate(config: TrainConfig) -> None:
    """Refuse impossible values: raises ConfigError with the first one's field, value and what is accepted."""
    _validate_sizes(config)
    _validate_prompts(config)
    _validate_algorithm(config)
    _validate_surroundings(config)


def _validate_sizes(config: TrainConfig) -> None:
    _require(0 <= config.seed < 2**63, "seed", config.seed, "0 to 2^63 - 1")
    _at_least(1, "iterations", config.iterations)
    _at_least(1, "prompts_per_iteration", config.prompts_per_iteration)
    _at_least(2, "group_size", config.group_size, ", since a group's images are compared with each other")
    _at_least(1, "micro_batch", config.micro_batch)
    steps, dropped = config.rollout.steps, config.grpo.drop_last_steps
    _require(1 <= steps <= DIFFUSION_STEPS, "rollout.steps", steps, f"1 to {DIFFUSION_STEPS}")
    _require(0 <= dropped < steps, "grpo.drop_last_steps", dropped, f"0 to {steps - 1}, below rollout.steps")
    samples = config.prompts_per_iteration * config.group_size
    pairs = samples * (steps - dropped)
    _require(
        1 <= config.updates_per_iteration <= pairs,
        "updates_per_iteration",
        config.updates_per_iteration,
        f"1 to {pairs}, the (sample, step) pairs of an iteration",
    )
    _at_least(0, "rollout.batch", config.rollout.batch)
    _at_least(1, "reward.batch", config.reward.batch)


def _validate_prompts(config: TrainConfig) -> None:
    prompts = config.prompts
    fraction = prompts.negative_fraction
    _require(0 <= fraction <= 1, "prompts.negative_fraction", fraction, "0 to 1")
    if prompts.negative == "shapes":
        _require(bool(prompts.categories), "prompts.categories", prompts.categories, "at least one hazard category")
        for category in prompts.categories:
            _require(category in HAZARDS, "prompts.categories", category, f"any of {', '.join(HAZARDS)}")


def _validate_algorithm(config: TrainConfig) -> None:
    rollout, grpo, optim = config.rollout, config.grpo, config.optim
    anchors, alpha = config.reward.anchors, config.reward.alpha
    _require(anchors in ANCHORS, "reward.anchors", anchors, f"any of {', '.join(ANCHORS)}")
    _require(math.isfinite(alpha), "reward.alpha", alpha, "a finite number")
    # Above 1 the noise could exceed the variance that is left: sqrt(1 - a_p - sigma^2) would not be real.
    _require(0 < rollout.eta <= 1, "rollout.eta", rollout.eta, "above 0 (a sure step has no probability) and at most 1")
    _at_least(1, "rollout.guidance", rollout.guidance)
    _above_zero("grpo.std_floor", grpo.std_floor)
    _above_zero("grpo.advantage_clamp", grpo.advantage_clamp)
    _at_least(0, "grpo.clip_low", grpo.clip_low)
    _at_least(0, "grpo.clip_high", grpo.clip_high)
    _at_least(0, "grpo.kl", grpo.kl)
    _at_least(0, "optim.lr", optim.lr)
    _require(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "0 or more and below 1")
    _require(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "0 or more and below 1")
    _above_zero("optim.eps", optim.eps)
    _at_least(0, "optim.weight_decay", optim.weight_decay)
    _above_zero("optim.max_grad_norm", optim.max_grad_norm)


def _validate_surroundings(config: TrainConfig) -> None:
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = 'cuda': there is no CUDA device here; accepted are auto and cpu.")
    _at_least(0, "engine.threads", config.engine.threads)
    _at_least(0, "eval.every", config.eval.every)
    _at_least(1, "eval.unsafe_per_category", config.eval.unsafe_per_category)
    _at_least(1, "eval.composition_per_task", config.eval.composition_per_task)
    fraction, steps = config.eval.quick_fraction, config.eval.steps
    _require(0 < fraction <= 1, "eval.quick_fraction", fraction, "above 0 and at most 1")
    _require(0 <= config.eval.seed < 2**63, "eval.seed", config.eval.seed, "0 to 2^63 - 1")
    _require(0 <= steps <= DIFFUSION_STEPS, "eval.steps", steps, f"0 (as rollout.steps) to {DIFFUSION_STEPS}")
    _at_least(1, "checkpoint.every", config.checkpoint.every)
    _at_least(0, "checkpoint.keep", config.checkpoint.keep)


def _require(holds: bool, field: str, value: Any, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{field} = {value!r}: accepted is {accepted}.")


def _at_least(low: float, field: str, value: float, reason: str = "") -> None:
    _require(low <= value < math.inf, field, value, f"{low} or more{reason}")


def _above_zero(field: str, value: float) -> None:
    _require(0 < value < math.inf, field, value, "a number above 0")
