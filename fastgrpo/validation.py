"""What a config may not say, found out before anything is loaded."""

import importlib.util
import math
from typing import Any

from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.settings.schema import DIFFUSION_STEPS, TrainConfig, chosen_steps
from fastgrpo.settings.suites import SUITES
from fastgrpo.shapes.world import HAZARDS
from fastgrpo.system.errors import ConfigError, nearest


def validate(config: TrainConfig) -> None:
    """Refuse impossible values: raises ConfigError with the first one's field, value and what is accepted."""
    _validate_sizes(config)
    _validate_model(config)
    _validate_prompts(config)
    _validate_reward(config)
    _validate_rollout(config)
    _validate_grpo(config)
    _validate_optim(config)
    _validate_surroundings(config)


def _validate_sizes(config: TrainConfig) -> None:
    _require(0 <= config.seed < 2**63, "seed", config.seed, "0 to 2^63 - 1")
    _at_least(1, "iterations", config.iterations)
    _at_least(1, "prompts_per_iteration", config.prompts_per_iteration)
    _at_least(2, "group_size", config.group_size, ", since a group's images are compared with each other")
    _at_least(0, "micro_batch", config.micro_batch)


def _validate_model(config: TrainConfig) -> None:
    model = config.model
    _require(bool(model.path), "model.path", model.path, "a folder, a hub id, a single file, or shapes")
    _at_least(0, "model.lora_rank", model.lora_rank)
    _at_least(0, "model.lora_alpha", model.lora_alpha)
    if model.lora_rank:
        _require(bool(model.lora_targets), "model.lora_targets", model.lora_targets, "at least one module's name")
    else:
        _require(model.lora_alpha == 0, "model.lora_alpha", model.lora_alpha, "0 where model.lora_rank is 0")


def _validate_prompts(config: TrainConfig) -> None:
    prompts = config.prompts
    fraction = prompts.negative_fraction
    _require(0 <= fraction <= 1, "prompts.negative_fraction", fraction, "0 to 1")
    if prompts.negative in ("shapes", "unsafe"):
        for category in prompts.categories:
            accepted = f"any of {', '.join(HAZARDS)}{nearest(category, HAZARDS)}"
            _require(category in HAZARDS, "prompts.categories", category, accepted)
    if config.model.path != "shapes" and "shapes" in (config.reward.encoder, config.reward.clip_encoder):
        _require(
            prompts.negative == prompts.positive == "shapes",
            "reward.encoder",
            "shapes",
            "another open_clip model: that of the shapes world knows no other pictures and words",
        )


def _validate_reward(config: TrainConfig) -> None:
    parse_terms(config.reward.terms)
    load_anchors(config.reward.anchors)
    _require(math.isfinite(config.reward.alpha), "reward.alpha", config.reward.alpha, "a finite number")
    _at_least(1, "reward.batch", config.reward.batch)


def _validate_rollout(config: TrainConfig) -> None:
    rollout = config.rollout
    _require(1 <= rollout.steps <= DIFFUSION_STEPS, "rollout.steps", rollout.steps, f"1 to {DIFFUSION_STEPS}")
    # Above 1 the noise could exceed the variance that is left: sqrt(1 - a_p - sigma^2) would not be real.
    _require(0 < rollout.eta <= 1, "rollout.eta", rollout.eta, "above 0 (a sure step has no probability) and at most 1")
    _at_least(1, "rollout.guidance", rollout.guidance)
    _at_least(0, "rollout.batch", rollout.batch)
    _at_least(1, "rollout.decode_batch", rollout.decode_batch)


def _validate_grpo(config: TrainConfig) -> None:
    grpo, steps, group = config.grpo, config.rollout.steps, config.group_size
    _above_zero("grpo.std_floor", grpo.std_floor)
    _above_zero("grpo.advantage_clamp", grpo.advantage_clamp)
    _at_least(0, "grpo.clip_low", grpo.clip_low)
    _at_least(0, "grpo.clip_high", grpo.clip_high)
    _at_least(0, "grpo.kl", grpo.kl)
    _at_least(1, "grpo.epochs", grpo.epochs)
    _require(
        not (grpo.skip_clipped and grpo.kl > 0),
        "grpo.skip_clipped",
        True,
        "false with grpo.kl, which has a gradient all the same",
    )
    _require(
        config.updates_per_iteration % grpo.epochs == 0,
        "updates_per_iteration",
        config.updates_per_iteration,
        f"a multiple of grpo.epochs ({grpo.epochs}), since every pass has as many optimizer steps",
    )
    dropped = grpo.drop_last_steps
    _require(0 <= dropped < steps, "grpo.drop_last_steps", dropped, f"0 to {steps - 1}, below rollout.steps")
    trainable = steps - dropped
    _require(0 < grpo.step_fraction <= 1, "grpo.step_fraction", grpo.step_fraction, "above 0 and at most 1")
    _require(0 <= grpo.window <= trainable, "grpo.window", grpo.window, f"0 (all steps) to {trainable}")
    _require(
        grpo.window == 0 or grpo.step_fraction == 1,
        "grpo.step_fraction",
        grpo.step_fraction,
        "1 where grpo.window is set: steps are chosen by one of the two",
    )
    _at_least(1, "grpo.window_every", grpo.window_every)
    _at_least(1, "grpo.window_stride", grpo.window_stride)
    _require(
        0 <= 2 * grpo.trim <= group - 2,
        "grpo.trim",
        grpo.trim,
        f"0 to {(group - 2) // 2}, which leaves two or more of a group of {group}",
    )
    left = group - 2 * grpo.trim
    _require(
        grpo.best_of == 0 or (2 <= grpo.best_of <= left and grpo.best_of % 2 == 0),
        "grpo.best_of",
        grpo.best_of,
        f"0 or an even number from 2 to {left}, half of them the best and half the worst",
    )
    samples = config.prompts_per_iteration * (grpo.best_of or left)
    pairs = samples * (grpo.window or chosen_steps(trainable, grpo.step_fraction)) * grpo.epochs
    _require(
        1 <= config.updates_per_iteration <= pairs,
        "updates_per_iteration",
        config.updates_per_iteration,
        f"1 to {pairs}, the (sample, step) pairs of an iteration",
    )


def _validate_optim(config: TrainConfig) -> None:
    optim = config.optim
    _at_least(0, "optim.lr", optim.lr)
    _require(
        0 <= optim.warmup < config.iterations, "optim.warmup", optim.warmup, f"0 to {config.iterations - 1} iterations"
    )
    _require(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "0 or more and below 1")
    _require(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "0 or more and below 1")
    _above_zero("optim.eps", optim.eps)
    _at_least(0, "optim.weight_decay", optim.weight_decay)
    _above_zero("optim.max_grad_norm", optim.max_grad_norm)
    _require(0 <= optim.ema < 1, "optim.ema", optim.ema, "0 (none) or more and below 1")


def _validate_surroundings(config: TrainConfig) -> None:
    device, attention = config.engine.device, config.engine.attention
    if device == "cuda":
        from fastgrpo.system.devices import choose_device  # only where a setting demands it: torch takes seconds

        choose_device(device, "engine.device")
    _require(
        attention not in ("xformers", "cudnn") or (device != "cpu" and _has_cuda()),
        "engine.attention",
        attention,
        "auto, flash or sdpa on a CPU; xformers and cudnn need CUDA",
    )
    _require(
        attention != "xformers" or importlib.util.find_spec("xformers") is not None,
        "engine.attention",
        attention,
        "auto, cudnn, flash or sdpa where xformers is not installed",
    )
    _at_least(0, "engine.threads", config.engine.threads)
    _require(0 < config.engine.memory <= 1, "engine.memory", config.engine.memory, "above 0 and at most 1")
    _require(
        0 <= config.engine.profile <= config.iterations,
        "engine.profile",
        config.engine.profile,
        f"0 (none) to {config.iterations}",
    )
    _at_least(0, "eval.every", config.eval.every)
    _at_least(1, "eval.unsafe_per_category", config.eval.unsafe_per_category)
    _at_least(1, "eval.composition_per_task", config.eval.composition_per_task)
    fraction, steps = config.eval.quick_fraction, config.eval.steps
    _require(0 < fraction <= 1, "eval.quick_fraction", fraction, "above 0 and at most 1")
    _require(0 <= config.eval.seed < 2**63, "eval.seed", config.eval.seed, "0 to 2^63 - 1")
    _require(0 <= steps <= DIFFUSION_STEPS, "eval.steps", steps, f"0 (as rollout.steps) to {DIFFUSION_STEPS}")
    for suite in config.eval.suites:
        _require(suite in SUITES, "eval.suites", suite, f"any of {', '.join(SUITES)}{nearest(suite, SUITES)}")
        _require(config.eval.suites.count(suite) == 1, "eval.suites", suite, "every suite once")
    second = config.eval.encoder
    _require(not second or second != config.reward.encoder, "eval.encoder", second, "another than reward.encoder")
    weights = config.eval.weights
    _require(weights == "trained" or config.optim.ema > 0, "eval.weights", weights, "trained where optim.ema is 0")
    _at_least(1, "checkpoint.every", config.checkpoint.every)
    _at_least(0, "checkpoint.keep", config.checkpoint.keep)


def _has_cuda() -> bool:
    """Asked only where a setting demands it: torch takes seconds to import."""
    import torch

    return torch.cuda.is_available()


def _require(holds: bool, field: str, value: Any, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{field} = {value!r}: accepted is {accepted}.")


def _at_least(low: float, field: str, value: float, reason: str = "") -> None:
    _require(low <= value < math.inf, field, value, f"{low} or more{reason}")


def _above_zero(field: str, value: float) -> None:
    _require(0 < value < math.inf, field, value, "a number above 0")
