"""Every setting reaches what it sets: one iteration of two with it comes out otherwise than without it."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from fastgrpo import train
from fastgrpo.assembly import load_training
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from support.training import TIMED, altered

# Field -> a value that must change two iterations of the base config, which a few of them need changed first.
OPTIONS = {
    "seed": 7,
    "prompts_per_iteration": 4,
    "group_size": 4,
    "updates_per_iteration": 3,
    "model.prediction_type": "v_prediction",
    "model.lora_rank": 2,
    "model.lora_alpha": 8.0,
    "model.lora_targets": ("to_k",),
    "prompts.positive": "geneval",
    "prompts.negative": "unsafe",
    "prompts.categories": ("violence",),
    "prompts.negative_fraction": 0.0,
    "reward.terms": ("steering", "compressibility=0.01"),
    "reward.standardise": "group",
    "reward.anchors": "scaled",
    "reward.alpha": 0.0,
    "reward.mode": "unsafe_only",
    "rollout.steps": 4,
    "rollout.eta": 0.5,
    "rollout.stochastic": "window",
    "rollout.steps_outside": 2,
    "rollout.solver_outside": "dpm++",
    "rollout.guidance": 1.0,
    "rollout.guidance_rescale": 0.7,
    "rollout.initial_noise": "per_prompt",
    "rollout.branches": (3,),
    "grpo.advantage": "none",
    "grpo.std_floor": 10.0,
    "grpo.advantage_clamp": 0.1,
    "grpo.clip_low": 0.5,
    "grpo.clip_high": 1e-9,
    "grpo.kl": 0.5,
    "grpo.kl_prompts": "positive",
    "grpo.old_log_prob": "detach",
    "grpo.epochs": 2,
    "grpo.drop_last_steps": 0,
    "grpo.step_fraction": 0.5,
    "grpo.window": 1,
    "grpo.window_every": 1,
    "grpo.window_stride": 2,
    "grpo.ratio_norm": True,
    "grpo.trim": 1,
    "grpo.best_of": 2,
    "optim.lr": 2e-3,
    "optim.schedule": "cosine",
    "optim.warmup": 2,
    "optim.beta1": 0.5,
    "optim.beta2": 0.5,
    "optim.eps": 1.0,
    "optim.weight_decay": 10.0,
    "optim.max_grad_norm": 1e-8,
    "optim.ema": 0.5,
    "optim.moments": "8bit",
    "engine.dtype": "bf16",
}
NEEDED_FIRST = {
    "model.lora_alpha": {"model.lora_rank": 2},
    "model.lora_targets": {"model.lora_rank": 2},
    "prompts.categories": {"prompts.negative": "unsafe"},
    "reward.standardise": {"reward.terms": ("steering", "compressibility")},
    "rollout.stochastic": {"grpo.window": 1},
    "rollout.steps_outside": {"grpo.window": 1, "rollout.stochastic": "window", "rollout.steps": 5},
    "rollout.solver_outside": {"grpo.window": 1, "rollout.stochastic": "window", "rollout.steps": 5},
    "rollout.branches": {"rollout.initial_noise": "per_prompt"},
    "grpo.kl_prompts": {"grpo.kl": 0.5},
    "grpo.clip_low": {"grpo.clip_high": 1e9},
    # The second pass meets what the first, a small step, made likelier.
    "grpo.clip_high": {"grpo.clip_low": 0.999, "grpo.epochs": 2, "optim.lr": 1e-5},
    "grpo.window_every": {"grpo.window": 1},
    "grpo.window_stride": {"grpo.window": 1, "grpo.window_every": 1, "rollout.steps": 4, "grpo.drop_last_steps": 0},
    "grpo.trim": {"group_size": 4},
    "optim.eps": {"optim.max_grad_norm": 1e9},
}
# Settings that may not change what is learned, or that say where things are: each has tests of its own.
NOT_OPTIONS = {
    *("run", "iterations", "micro_batch", "rollout.batch", "rollout.decode_batch", "reward.batch", "reward.tf32"),
    *("model.path", "model.unet", "model.config", "model.variant", "model.revision"),
    *("prompts.positive_column", "prompts.negative_column", "prompts.category_column"),
    *("reward.encoder", "reward.clip_encoder", "engine.device", "engine.threads"),
    *("reward.pickscore", "reward.aesthetic", "reward.aesthetic_encoder"),
    *("reward.service", "reward.q16", "reward.safety_checker", "reward.open_clip"),
    *("engine.kernels", "engine.attention", "engine.compile", "engine.graphs", "engine.reuse", "engine.overlap"),
    *("engine.memory", "engine.gradient_checkpointing", "engine.profile", "engine.shard", "engine.show_speed"),
    *("engine.stuck_after", "engine.offload", "engine.not_finite", "engine.skip_at_most"),
    "grpo.skip_clipped",
    *("eval.every", "eval.unsafe_per_category", "eval.composition_per_task", "eval.quick_fraction", "eval.seed"),
    "eval.split",
    *("eval.steps", "eval.weights", "eval.encoder", "checkpoint.every", "checkpoint.keep"),
    "checkpoint.keep_evaluated",
    *("eval.suites", "eval.i2p", "eval.geneval", "eval.captions", "eval.attacks", "eval.custom"),
    *("eval.q16", "eval.safety_checker", "eval.open_clip"),
    *("log.to", "log.project", "log.entity", "log.name", "log.tags", "log.mode"),
    *("guard.action", "guard.diversity_between", "guard.diversity_within", "guard.alignment", "guard.patience"),
}


def learned(config: TrainConfig) -> tuple[str, dict[str, float]]:
    """A digest of all that is trained after two iterations, and what was logged of the second but for the clock."""
    *_, last = iterations(config)
    return last


def iterations(config: TrainConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """The same of each of the two."""
    training = load_training(config, threads=1)
    for iteration in (1, 2):
        values = iterate(training, iteration, Console())
        digest = hashlib.sha256()
        averages = training.trainable.ema.average if training.trainable.ema else {}
        for name, tensor in sorted(
            {**training.trainable.parameters, **{f"ema.{n}": a for n, a in averages.items()}}.items()
        ):
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
        yield digest.hexdigest(), {name: value for name, value in values.items() if not name.startswith(TIMED)}


@pytest.fixture(scope="module")
def base(config_file: Path) -> TrainConfig:
    """Rewards of a small random encoder differ by little; a floor below them lets every group learn."""
    config = altered(load_toml(config_file), {"engine.threads": 1, "iterations": 2, "grpo.std_floor": 1e-9})
    return altered(config, {"grpo.clip_low": 0.01, "grpo.clip_high": 0.01, "grpo.kl": 0.0})


@pytest.fixture(scope="module")
def outcomes() -> dict[TrainConfig, list[str]]:
    """Config -> the digests after its iterations."""
    return {}


def test_every_field_is_here_or_has_a_reason_not_to_be() -> None:
    fields = set()
    for name, value in vars(TrainConfig()).items():
        fields |= {f"{name}.{key}" for key in vars(value)} if dataclasses.is_dataclass(value) else {name}
    assert fields == OPTIONS.keys() | NOT_OPTIONS
    assert not OPTIONS.keys() & NOT_OPTIONS


def test_the_same_config_learns_the_same(base: TrainConfig) -> None:
    assert learned(base) == learned(base)


@pytest.mark.slow
@pytest.mark.parametrize("field", OPTIONS)
def test_an_option_changes_what_is_learned(field: str, base: TrainConfig, outcomes: dict) -> None:
    without = altered(base, NEEDED_FIRST.get(field, {}))
    if without not in outcomes:
        outcomes[without] = [digest for digest, _ in iterations(without)]
    # Most show in the first.
    ours = (digest for digest, _ in iterations(altered(without, {field: OPTIONS[field]})))
    assert any(one != other for one, other in zip(ours, outcomes[without], strict=True))


@pytest.mark.slow
def test_fp16_scales_its_loss_and_learns_what_fp32_learns(base: TrainConfig) -> None:
    """Half precision moves the metrics by some 2^-11; a loss scale that is not taken out again would by 2^16."""
    half, full = (
        learned(altered(base, {"engine.dtype": dtype, "optim.lr": 0.0, "optim.max_grad_norm": 1e9}))[1]
        for dtype in ("fp16", "fp32")
    )
    assert half["optim/overflowed_steps"] == 0
    assert half["grad/norm"] == pytest.approx(full["grad/norm"], rel=0.05)
    assert half["grad/norm"] != full["grad/norm"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_adapters_learn_beside_frozen_weights_of_half_precision(base: TrainConfig, dtype: str) -> None:
    """Frozen weights rounded to 2^-8 or 2^-11 draw nearly the same pictures and send back nearly the same gradient."""
    lora = altered(base, {"model.lora_rank": 4, "optim.lr": 0.0, "optim.max_grad_norm": 1e9, "rollout.eta": 0.5})
    half, full = (learned(altered(lora, {"engine.dtype": each}))[1] for each in (dtype, "fp32"))
    assert half["ratio/max_abs_dev_first"] <= 1e-3
    assert half["grad/norm"] > 0
    assert half["reward/mean"] == pytest.approx(full["reward/mean"], abs=0.02)
    assert half["reward/mean"] != full["reward/mean"]


def test_micro_batches_and_batches_change_nothing_but_rounding(base: TrainConfig) -> None:
    sizes = {"micro_batch": 2, "rollout.batch": 2, "rollout.decode_batch": 1, "reward.batch": 2}
    still = altered(base, {"optim.lr": 0.0})
    ours, theirs = learned(altered(still, sizes))[1], learned(still)[1]
    for name in ("reward/mean", "grad/norm", "loss/policy"):
        # Sums of a few dozen float32 numbers in another order, behind some forty layers.
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_the_average_is_what_is_pictured_where_it_is_asked_for(config_file: Path, tmp_path: Path) -> None:
    pictures = {}
    for weights in ("trained", "ema"):
        options = ["--iterations", "2", "--eval.every", "0", "--optim.ema", "0.99", "--optim.lr", "1e-2"]
        run = tmp_path / weights
        assert train.main([str(config_file), "--run", str(run), "--eval.weights", weights, *options]) == 0
        pictures[weights] = {name: Image.open(run / "samples" / f"{name}.png") for name in ("before", "after")}
    assert not ImageChops.difference(pictures["trained"]["before"], pictures["ema"]["before"]).getbbox()
    assert ImageChops.difference(pictures["trained"]["after"], pictures["ema"]["after"]).getbbox()
    # A decay of 0.99 leaves the average near where it began: its pictures have changed less.
    change = {
        weights: torch.tensor(list(ImageChops.difference(p["before"], p["after"]).convert("L").getdata()))
        .float()
        .mean()
        for weights, p in pictures.items()
    }
    assert change["ema"] < change["trained"]
