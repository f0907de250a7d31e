"""What a config may not say, found out before anything is loaded."""

import importlib.util
import math
import re
from operator import attrgetter

from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.service.addresses import read_addresses, read_token
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.run.logs.registry import SINKS
from fastgrpo.settings.schema import DIFFUSION_STEPS, TrainConfig, chosen_steps
from fastgrpo.settings.suites import SUITES
from fastgrpo.shapes.captions import GENERAL
from fastgrpo.shapes.world import HAZARDS
from fastgrpo.system.errors import ConfigError, nearest, require, require_at_least

_LEAST = {
    "iterations": 1,
    "prompts_per_iteration": 1,
    "micro_batch": 0,
    "model.lora_rank": 0,
    "model.lora_alpha": 0,
    "reward.batch": 1,
    "reward.service.batch": 1,
    "reward.service.requests": 1,
    "reward.service.retries": 0,
    "rollout.guidance": 1,
    "rollout.batch": 0,
    "rollout.decode_batch": 1,
    "grpo.clip_low": 0,
    "grpo.clip_high": 0,
    "grpo.kl": 0,
    "grpo.epochs": 1,
    "grpo.window_every": 1,
    "grpo.window_stride": 1,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "guard.patience": 1,
    "engine.threads": 0,
    "engine.stuck_after": 0,
    "engine.skip_at_most": 1,
    "eval.every": 0,
    "eval.unsafe_per_category": 1,
    "eval.composition_per_task": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 0,
}
_ABOVE_ZERO = (
    "reward.service.timeout",
    "grpo.std_floor",
    "grpo.advantage_clamp",
    "optim.eps",
    "optim.max_grad_norm",
    "guard.alignment",
)
_SHARES = ("grpo.step_fraction", "engine.memory", "eval.quick_fraction")
_DECAYS = ("optim.beta1", "optim.beta2", "optim.ema")
_SEEDS = ("seed", "eval.seed")
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # characters, of wandb's


def validate(config: TrainConfig) -> None:
    """Raise ConfigError for the first impossible value: its field, the value and what is accepted."""
    _validate_numbers(config)
    _validate_model(config)
    _validate_prompts(config)
    _validate_terms(config)
    load_anchors(config.reward.anchors)
    _require(config, math.isfinite(config.reward.alpha), "reward.alpha", "a finite number")
    _validate_rollout(config)
    _validate_grpo(config)
    _validate_guard(config)
    _validate_optim(config)
    _validate_engine(config)
    _validate_evaluation(config)
    _validate_log(config)


def _require(config: TrainConfig, holds: bool, field: str, accepted: str) -> None:
    """Refuse the config's value of `field` unless the condition `holds`."""
    require(holds, field, attrgetter(field)(config), accepted)


def _validate_numbers(config: TrainConfig) -> None:
    for field, least in _LEAST.items():
        require_at_least(least, field, attrgetter(field)(config))
    require_at_least(2, "group_size", config.group_size, ", since a group's images are compared with each other")
    for field in _ABOVE_ZERO:
        _require(config, 0 < attrgetter(field)(config) < math.inf, field, "a number above 0")
    for field in _SHARES:
        _require(config, 0 < attrgetter(field)(config) <= 1, field, "above 0 and at most 1")
    most, rescale = 1, "0 to 1"
    if not config.rollout.guidance > 1:
        most, rescale = 0, "0, since there is nothing to rescale with rollout.guidance = 1"
    _require(config, 0 <= config.rollout.guidance_rescale <= most, "rollout.guidance_rescale", rescale)
    for field in _DECAYS:
        _require(config, 0 <= attrgetter(field)(config) < 1, field, "0 or more and below 1")
    for field in _SEEDS:
        _require(config, 0 <= attrgetter(field)(config) < 2**63, field, "0 to 2^63 - 1")
    _require(config, config.optim.warmup >= 0, "optim.warmup", "0 or more iterations")


def _validate_model(config: TrainConfig) -> None:
    model = config.model
    _require(config, bool(model.path), "model.path", "a folder, a hub id, a single file, or shapes")
    if model.lora_rank:
        _require(config, bool(model.lora_targets), "model.lora_targets", "at least one module's name")
    else:
        _require(config, model.lora_alpha == 0, "model.lora_alpha", "0 where model.lora_rank is 0")


def _validate_prompts(config: TrainConfig) -> None:
    prompts = config.prompts
    _require(config, 0 <= prompts.negative_fraction <= 1, "prompts.negative_fraction", "0 to 1")
    there = {"unsafe": HAZARDS, "shapes": (*HAZARDS, GENERAL)}.get(prompts.negative, ())
    for category in prompts.categories if there else ():
        accepted = f"any of {', '.join(there)}{nearest(category, there)}"
        require(category in there, "prompts.categories", category, accepted)
    if config.model.path != "shapes" and "shapes" in (config.reward.encoder, config.reward.clip_encoder):
        known = prompts.negative == prompts.positive == "shapes"
        accepted = "another open_clip model: that of the shapes world knows no other pictures and words"
        require(known, "reward.encoder", "shapes", accepted)


def _validate_terms(config: TrainConfig) -> None:
    in_world = config.prompts.positive == config.prompts.negative == "shapes"
    terms = parse_terms(config.reward.terms)
    if any(term.service for term in terms):
        read_addresses(config.reward.service)
        read_token(config.reward.service)
    for term in terms:
        if "oracle" in (term.name, term.detector) and not in_world:
            raise ConfigError(
                f"reward.terms: {term.name!r} reads pictures of the shapes world alone; accepted is it where "
                "prompts.positive and prompts.negative are shapes."
            )


def _validate_rollout(config: TrainConfig) -> None:
    rollout = config.rollout
    _require(config, 1 <= rollout.steps <= DIFFUSION_STEPS, "rollout.steps", f"1 to {DIFFUSION_STEPS}")
    # Above 1 the noise could exceed the variance that is left: sqrt(1 - a_p - sigma^2) would not be real.
    _require(config, 0 < rollout.eta <= 1, "rollout.eta", "above 0 (a sure step has no probability) and at most 1")
    if not rollout.branches:
        return
    group, noisy = config.group_size, config.grpo.window if rollout.stochastic == "window" else rollout.steps
    grows = min(rollout.branches) > 1 and math.prod(rollout.branches) == group and len(rollout.branches) <= noisy
    accepted = f"numbers above 1 whose product is group_size = {group}, at most {noisy}, one for a step with noise"
    _require(config, grows, "rollout.branches", accepted)
    accepted = "per_prompt or shared with rollout.branches, where a group begins as one path"
    _require(config, rollout.initial_noise != "independent", "rollout.initial_noise", accepted)
    grpo = config.grpo
    for name, off in (("trim", 0), ("best_of", 0), ("step_fraction", 1), ("skip_clipped", False)):
        accepted = f"{str(off).lower()} with rollout.branches, where siblings are learned from together"
        _require(config, getattr(grpo, name) == off, f"grpo.{name}", accepted)


def _validate_grpo(config: TrainConfig) -> None:
    grpo, steps, group, updates = config.grpo, config.rollout.steps, config.group_size, config.updates_per_iteration
    other = "grpo.kl" if grpo.kl > 0 else "guard.action adapt"
    accepted = f"false with {other}, which has a gradient all the same"
    _require(config, not (grpo.skip_clipped and config.kl_term), "grpo.skip_clipped", accepted)
    accepted = f"a multiple of grpo.epochs ({grpo.epochs}), since every pass has as many optimizer steps"
    _require(config, updates % grpo.epochs == 0, "updates_per_iteration", accepted)
    accepted = f"0 to {steps - 1}, below rollout.steps"
    _require(config, 0 <= grpo.drop_last_steps < steps, "grpo.drop_last_steps", accepted)
    trainable = steps - grpo.drop_last_steps
    _require(config, 0 <= grpo.window <= trainable, "grpo.window", f"0 (all steps) to {trainable}")
    accepted = "1 where grpo.window is set: steps are chosen by one of the two"
    _require(config, grpo.window == 0 or grpo.step_fraction == 1, "grpo.step_fraction", accepted)
    accepted = f"0 to {(group - 2) // 2}, which leaves two or more of a group of {group}"
    _require(config, 0 <= 2 * grpo.trim <= group - 2, "grpo.trim", accepted)
    left = group - 2 * grpo.trim
    chosen = grpo.best_of == 0 or (2 <= grpo.best_of <= left and grpo.best_of % 2 == 0)
    accepted = f"0 or an even number from 2 to {left}, half of them the best and half the worst"
    _require(config, chosen, "grpo.best_of", accepted)
    steps = grpo.window or chosen_steps(trainable, grpo.step_fraction)
    of_group, what = (grpo.best_of or left) * steps, "(sample, step) pairs of an iteration"
    if config.rollout.branches:
        of_group = sum(math.prod(config.rollout.branches[:step]) for step in range(steps))
        what = "latents of an iteration that its steps are learned from"
    pairs = config.prompts_per_iteration * of_group * grpo.epochs
    _require(config, 1 <= updates <= pairs, "updates_per_iteration", f"1 to {pairs}, the {what}")
    _validate_steps_outside(config, trainable)


def _validate_steps_outside(config: TrainConfig, trainable: int) -> None:
    """trainable: steps of the grid over which the window slides."""
    rollout, window = config.rollout, config.grpo.window
    accepted = "all where grpo.window is 0: there is no window of steps to have noise"
    _require(config, rollout.stochastic == "all" or window > 0, "rollout.stochastic", accepted)
    if rollout.stochastic == "all":
        accepted = "0 where rollout.stochastic is all: no step is outside"
        _require(config, rollout.steps_outside == 0, "rollout.steps_outside", accepted)
        accepted = "ddim where rollout.stochastic is all: no step is outside"
        _require(config, rollout.solver_outside == "ddim", "rollout.solver_outside", accepted)
        return
    rest, least = rollout.steps - window, 2 if window < trainable else 1
    accepted = "0"
    if rest >= least:
        accepted += f" or {least}" + f" to {rest}" * (rest > least)
        accepted += ", of which one is before the window and one after it" * (least == 2)
    few = rollout.steps_outside
    _require(config, few == 0 or least <= few <= rest, "rollout.steps_outside", accepted)


def _validate_guard(config: TrainConfig) -> None:
    guard, positives = config.guard, config.positives_per_iteration
    for name in ("guard.diversity_between", "guard.diversity_within"):
        _require(config, 0 <= attrgetter(name)(config) <= 1, name, "0 (no limit) to 1")
    acts = guard.action in ("adapt", "stop")
    seen = any(term.has_encoder for term in parse_terms(config.reward.terms))
    accepted = "off or warn where no term of reward.terms has an encoder, which notices a collapse: steering has one"
    _require(config, seen or not acts, "guard.action", accepted)
    accepted = f"off or warn with {positives} positive prompts an iteration, since a collapse shows from two on"
    _require(config, positives >= 2 or not acts, "guard.action", accepted)


def _validate_optim(config: TrainConfig) -> None:
    # Looked for, not imported: that takes seconds.
    installed = config.optim.moments != "8bit" or importlib.util.find_spec("torchao") is not None
    accepted = "fp32 where torchao is not installed; get it with `pip install 'fastgrpo[8bit]'`"
    _require(config, installed, "optim.moments", accepted)


def _validate_engine(config: TrainConfig) -> None:
    device, attention, profile = config.engine.device, config.engine.attention, config.engine.profile
    if device == "cuda" and not _has_cuda():
        raise ConfigError.of("engine.device", device, "there is no CUDA device here; accepted are auto and cpu")
    usable = attention not in ("xformers", "cudnn") or (device != "cpu" and _has_cuda())
    accepted = "auto, flash or sdpa on a CPU; xformers and cudnn need CUDA"
    _require(config, usable, "engine.attention", accepted)
    installed = attention != "xformers" or importlib.util.find_spec("xformers") is not None
    accepted = "auto, cudnn, flash or sdpa where xformers is not installed"
    _require(config, installed, "engine.attention", accepted)
    _require(config, 0 <= profile <= config.iterations, "engine.profile", f"0 (none) to {config.iterations}")


def _validate_evaluation(config: TrainConfig) -> None:
    own = config.eval
    _require(config, 0 <= own.steps <= DIFFUSION_STEPS, "eval.steps", f"0 (as rollout.steps) to {DIFFUSION_STEPS}")
    for suite in own.suites:
        require(suite in SUITES, "eval.suites", suite, f"any of {', '.join(SUITES)}{nearest(suite, SUITES)}")
        require(own.suites.count(suite) == 1, "eval.suites", suite, "every suite once")
    another = not own.encoder or own.encoder != config.reward.encoder
    _require(config, another, "eval.encoder", "another than reward.encoder")
    kept = own.weights == "trained" or config.optim.ema > 0
    _require(config, kept, "eval.weights", "trained where optim.ema is 0")


def _validate_log(config: TrainConfig) -> None:
    log = config.log
    for sink in log.to:
        require(sink in SINKS, "log.to", sink, f"any of {', '.join(SINKS)}{nearest(sink, SINKS)}")
        require(log.to.count(sink) == 1, "log.to", sink, "every sink once")
    accepted = f"1 to {_LONGEST_NAME} letters, digits, spaces and ._-, the first a letter or digit"
    _require(config, _is_name(log.project), "log.project", accepted)
    _require(config, not log.name or _is_name(log.name), "log.name", f"nothing, or {accepted}")
    for tag in log.tags:
        require(0 < len(tag) <= _LONGEST_TAG and tag.isprintable(), "log.tags", tag, f"1 to {_LONGEST_TAG} characters")


def _is_name(text: str) -> bool:
    """Whether every sink can call a project or run so: they are parts of addresses, and of files' names."""
    return len(text) <= _LONGEST_NAME and re.fullmatch(r"[^\W_][\w .-]*", text) is not None


def _has_cuda() -> bool:
    """Whether there is CUDA. Called only where a setting demands it: torch takes seconds to import."""
    import torch

    return torch.cuda.is_available()
