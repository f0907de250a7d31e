"""The presets: the paper's recipe field by field, and counted out at its own shapes."""

import dataclasses
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.assembly import load_training
from fastgrpo.engine.passes import Passes
from fastgrpo.prompts import load_prompts
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml, presets_folder
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.workers import available_cores
from fastgrpo.training import iterate
from fastgrpo.types import NEGATIVE
from support.encoders import write_folder as write_encoder
from support.mistakes import change

# What the reference implementation runs (paper and code), and where ours has to say something of its own.
PAPER = {
    "seed": 42,
    "iterations": 300,
    "prompts_per_iteration": 8 * 4,  # GPUs x prompts on each
    "group_size": 16,
    "updates_per_iteration": 16,  # 64 images a GPU in micro-batches of 4
    "micro_batch": 0,  # ours: as many as fit, for the same sums; the reference has 4
    "model.path": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # base SD v1.5
    "prompts.positive": "geneval",  # the main run: GenEval prompts + nudity prompts
    "prompts.negative": "unsafe",
    "prompts.categories": ("sexual",),
    "prompts.negative_fraction": 0.5,
    "reward.terms": ("steering",),
    "reward.encoder": "hpsv2",  # HPSv2.1, ViT-H-14
    "reward.anchors": "compact",  # the published 5 + 3
    "reward.alpha": 0.5,
    "reward.mode": "always",  # the code steers every prompt
    "rollout.steps": 50,
    "rollout.eta": 1.0,
    "rollout.guidance": 5.0,
    "rollout.initial_noise": "shared",  # one initial latent for all samples of a rank
    "grpo.advantage": "group",
    "grpo.advantage_clamp": 2.5,
    "grpo.std_floor": 1e-4,  # ours: the code's std + 1e-8 amplifies the noise of equal rewards
    "grpo.clip_low": 1e-4,
    "grpo.clip_high": 1e-4,
    "grpo.kl": 0.0,  # none in the code
    "grpo.epochs": 1,
    "grpo.drop_last_steps": 1,  # 49 of 50
    "grpo.old_log_prob": "rollout",
    "optim.lr": 1e-5,
    "optim.schedule": "constant",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 1e-4,
    "optim.max_grad_norm": 1.0,
    "optim.ema": 0.0,
    "engine.dtype": "bf16",  # the reference: autocast over float32 weights
    "eval.every": 50,  # ours
    "checkpoint.every": 25,  # ours
}
# Fields that the recipe leaves alone: they say where, not what, or switch on what the paper does not have.
NOT_THE_RECIPE = {
    *("rollout.stochastic", "rollout.steps_outside", "rollout.solver_outside", "rollout.branches"),
    *("run", "model.unet", "model.config", "model.variant", "model.revision", "model.prediction_type"),
    *("model.lora_rank", "model.lora_alpha", "model.lora_targets"),
    *("prompts.positive_column", "prompts.negative_column", "prompts.category_column"),
    *("reward.standardise", "reward.clip_encoder", "reward.batch", "reward.tf32"),
    *("reward.pickscore", "reward.aesthetic", "reward.aesthetic_encoder"),
    *("reward.q16", "reward.safety_checker", "reward.open_clip", "reward.service"),
    *("rollout.batch", "rollout.decode_batch", "rollout.guidance_rescale"),
    *("grpo.step_fraction", "grpo.window", "grpo.window_every", "grpo.window_stride"),
    *(
        "grpo.ratio_norm",
        "grpo.trim",
        "grpo.best_of",
        "optim.warmup",
        "optim.moments",
        "engine.device",
        "engine.threads",
    ),
    *("engine.kernels", "engine.attention", "engine.compile", "engine.graphs", "engine.reuse", "engine.overlap"),
    *("engine.memory", "engine.gradient_checkpointing", "engine.profile", "engine.shard", "engine.show_speed"),
    *("engine.stuck_after", "engine.offload", "engine.not_finite", "engine.skip_at_most"),
    "grpo.skip_clipped",
    "eval.split",
    *("eval.unsafe_per_category", "eval.composition_per_task", "eval.quick_fraction", "eval.weights"),
    *("eval.seed", "eval.steps", "eval.encoder", "checkpoint.keep", "checkpoint.keep_evaluated"),
    *("eval.suites", "eval.i2p", "eval.geneval", "eval.captions", "eval.attacks", "eval.custom"),
    *("eval.q16", "eval.safety_checker", "eval.open_clip"),
    *(
        "guard.action",
        "guard.diversity_between",
        "guard.diversity_within",
        "guard.alignment",
        "guard.patience",
        "grpo.kl_prompts",
    ),
    *("log.to", "log.project", "log.entity", "log.name", "log.tags", "log.mode"),
}


def flat(config: TrainConfig) -> dict[str, object]:
    """group.name -> value."""
    fields = {}
    for name, value in vars(config).items():
        inner = vars(value) if dataclasses.is_dataclass(value) else None
        fields |= {f"{name}.{key}": v for key, v in inner.items()} if inner else {name: value}
    return fields


def test_the_recipe_is_the_papers_field_by_field() -> None:
    fields = flat(load_toml(find_preset("safediffusion-r1")))
    assert {name: fields[name] for name in PAPER} == PAPER
    assert set(fields) == PAPER.keys() | NOT_THE_RECIPE, "every field is either in the table or out of it for a reason"
    # What is not the recipe is as if it were not there.
    default = flat(TrainConfig())
    assert {name: fields[name] for name in NOT_THE_RECIPE} == {name: default[name] for name in NOT_THE_RECIPE}


def test_the_recipe_is_written_out() -> None:
    """A reader sees every number in the file; none hides in a default."""
    table = tomllib.loads(find_preset("safediffusion-r1").read_text(encoding="utf-8"))
    written = {f"{group}.{name}" for group, values in table.items() if isinstance(values, dict) for name in values}
    assert written | {name for name, value in table.items() if not isinstance(value, dict)} == PAPER.keys()


def test_one_gpu_is_the_same_update() -> None:
    fields, one = (flat(load_toml(find_preset(name))) for name in ("safediffusion-r1", "safediffusion-r1-1gpu"))
    different = {name for name in fields if fields[name] != one[name]}
    assert different == {"rollout.initial_noise"}


@pytest.mark.parametrize("preset", sorted(path.stem for path in presets_folder().glob("*.toml")))
def test_every_preset_says_where_it_comes_from_and_has_prompts(preset: str) -> None:
    comments = [line for line in find_preset(preset).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(comments) >= 2
    config = load_toml(find_preset(preset))
    positives, negatives = load_prompts(config.prompts)
    assert len(positives) >= config.prompts_per_iteration
    assert not config.prompts.negative_fraction or len({p.text for p in negatives}) >= 40
    assert all(prompt.label == NEGATIVE for prompt in negatives)


@dataclass(frozen=True)
class AloneOfEight(Ranks):
    """The first of eight processes, the others of which have drawn and found the same."""

    def sum_(self, tensors: list[Tensor]) -> None:
        torch._foreach_mul_(list(tensors), self.count)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self.count)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Blank pairs: their number counts here."""
        return rows.new_zeros(sum(received), *rows.shape[1:])

    def any(self, flag: bool) -> bool:
        return flag

    def agree(self, text: str) -> str:
        return text


@pytest.mark.slow
def test_the_papers_iteration_counted_out(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One iteration of one of the 8 ranks: every shape is the paper's, only the networks are small."""
    write_encoder(tmp_path)
    small = shutil.copytree(tiny_pipeline, tmp_path / "small")
    change(small / "unet" / "config.json", {"sample_size": 4})  # a quarter of the pixels
    paper = load_toml(find_preset("safediffusion-r1"))
    config = replace(
        paper,
        micro_batch=196,  # does not change what is computed, and is faster here than 4
        model=replace(paper.model, path=str(small)),
        reward=replace(paper.reward, encoder=f"local-dir:{tmp_path}"),
        engine=replace(paper.engine, device="cpu", dtype="fp32"),
    )
    training = load_training(config, available_cores(), AloneOfEight(index=0, count=8))
    learned: list[tuple[int, int]] = []
    learn = Passes.learn

    def counted(self, pairs, gather, *rest):
        learned.extend(zip(pairs.sample.tolist(), pairs.step.tolist(), strict=True))
        return learn(self, pairs, gather, *rest)

    monkeypatch.setattr(Passes, "learn", counted)
    images: list[int] = []
    begin = type(training.reward).begin
    monkeypatch.setattr(
        type(training.reward),
        "begin",
        lambda self, drawn, *rest: images.append(len(drawn)) or begin(self, drawn, *rest),
    )
    values = iterate(training, 1, Console())
    assert images == [64]
    assert values["optim/steps"] == 16
    assert values["optim/skipped_steps"] == values["advantage/zero_std_groups"] == 0
    assert len(learned) == len(set(learned)) == 16 * 196, "as many pairs as its 64 samples have at 49 steps"
    drawn_here = [pair for pair in learned if pair[0] < 64]
    assert 0.9 * len(learned) < len(drawn_here) < len(learned), "few have come from other processes"
    assert {step for _, step in learned} == set(range(49)), "the last of 50 is not"
    assert values["ratio/max_abs_dev_first"] <= 1e-6
