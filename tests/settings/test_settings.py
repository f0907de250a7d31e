"""What is possible and what is not, and in which words it is refused."""

import dataclasses
import inspect
import re

import pytest
import torch

from fastgrpo.rewards.terms import BUILT_IN
from fastgrpo.settings.command_line import parse_command
from fastgrpo.settings.commands import Evaluate
from fastgrpo.settings.schema import EvalConfig, GrpoConfig, PromptsConfig, RewardConfig, TrainConfig
from fastgrpo.settings.suites import DETECTORS, NAMES, SUITES, PromptSettings
from fastgrpo.settings.toml import find_preset, load_toml, presets_folder
from fastgrpo.system.errors import ConfigError
from fastgrpo.validation import validate


def altered(field: str, value: object) -> TrainConfig:
    """The default config with one field, such as "grpo.kl", replaced."""
    group, _, name = field.rpartition(".")
    config = TrainConfig()
    if not group:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


@pytest.mark.parametrize("preset", sorted(path.stem for path in presets_folder().glob("*.toml")))
def test_every_preset_is_valid(preset: str) -> None:
    validate(load_toml(find_preset(preset)))


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("iterations", 0),
        ("prompts_per_iteration", 0),
        ("group_size", 1),
        ("updates_per_iteration", 0),
        ("updates_per_iteration", 32 * 16 * 49 + 1),  # one more than the default's pairs: P * G * (steps - 1)
        ("micro_batch", -1),
        ("prompts.negative_fraction", -0.1),
        ("prompts.negative_fraction", 1.1),
        ("prompts.negative_fraction", NAN),
        ("model.path", ""),
        ("model.lora_rank", -1),
        ("model.lora_alpha", 4.0),  # without a rank
        ("prompts.categories", ("violence", "rain")),
        ("reward.encoder", "shapes"),  # with a model and prompts of the real world
        ("reward.alpha", float("inf")),
        ("reward.batch", 0),
        ("rollout.steps", 0),
        ("rollout.steps", 1001),
        ("rollout.eta", 0.0),
        ("rollout.eta", -1.0),
        ("rollout.eta", 1.1),
        ("rollout.eta", NAN),
        ("rollout.guidance", 0.5),
        ("rollout.guidance_rescale", -0.1),
        ("rollout.guidance_rescale", 1.1),
        ("rollout.batch", -1),
        ("rollout.decode_batch", 0),
        ("grpo.std_floor", 0.0),
        ("grpo.advantage_clamp", 0.0),
        ("grpo.clip_low", -1e-4),
        ("grpo.clip_high", -1e-4),
        ("grpo.kl", -0.1),
        ("guard.diversity_between", -0.1),
        ("guard.diversity_between", 1.1),
        ("guard.diversity_within", NAN),
        ("guard.alignment", 0.0),
        ("guard.alignment", NAN),
        ("guard.patience", 0),
        ("grpo.drop_last_steps", -1),
        ("grpo.drop_last_steps", 50),
        ("grpo.epochs", 0),
        ("grpo.step_fraction", 0.0),
        ("grpo.step_fraction", 1.1),
        ("grpo.window", -1),
        ("grpo.window", 50),
        ("grpo.window_every", 0),
        ("grpo.window_stride", 0),
        ("grpo.trim", -1),
        ("grpo.trim", 8),
        ("grpo.best_of", 3),
        ("grpo.best_of", 18),
        ("optim.lr", -1e-5),
        ("optim.lr", NAN),
        ("optim.beta1", 1.0),
        ("optim.beta2", -0.1),
        ("optim.eps", 0.0),
        ("optim.weight_decay", -1.0),
        ("optim.max_grad_norm", 0.0),
        ("optim.warmup", -1),
        ("optim.ema", 1.0),
        ("optim.ema", -0.1),
        ("engine.threads", -1),
        ("engine.memory", 0.0),
        ("engine.memory", 1.1),
        ("engine.profile", -1),
        ("engine.profile", 301),
        ("eval.every", -1),
        ("eval.unsafe_per_category", 0),
        ("eval.composition_per_task", 0),
        ("eval.quick_fraction", 0.0),
        ("eval.quick_fraction", 1.5),
        ("eval.seed", -1),
        ("eval.steps", -1),
        ("eval.weights", "ema"),  # without optim.ema
        ("checkpoint.every", 0),
        ("checkpoint.keep", -1),
    ],
)
def test_impossible_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(altered(field, value))
    message = str(refusal.value)
    shown = "rain" if value == ("violence", "rain") else repr(value)
    assert message.startswith(f"{field} = ")
    assert shown in message
    assert "accepted is" in message
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("updates_per_iteration", 32 * 16 * 49),
        ("prompts.categories", ()),
        ("grpo.window", 49),
        ("grpo.trim", 7),
        ("grpo.best_of", 16),
        ("grpo.drop_last_steps", 49),
        ("grpo.clip_low", 0.0),
        ("rollout.guidance", 1.0),
        ("rollout.guidance_rescale", 0.7),
        ("optim.lr", 0.0),
        ("guard.action", "adapt"),
        ("guard.diversity_within", 0.0),
        ("prompts.negative_fraction", 1.0),
        ("eval.every", 0),
        ("checkpoint.keep", 0),
    ],
)
def test_the_edges_of_what_is_possible_are_accepted(field: str, value: object) -> None:
    validate(altered(field, value))


@pytest.mark.parametrize(
    ("grpo", "named"),
    [
        (GrpoConfig(epochs=3), "updates_per_iteration = 16: accepted is a multiple of grpo.epochs (3)"),
        (GrpoConfig(window=4, step_fraction=0.5), "grpo.step_fraction = 0.5: accepted is 1 where grpo.window is set"),
        (GrpoConfig(trim=4, best_of=10), "grpo.best_of = 10: accepted is 0 or an even number from 2 to 8"),
    ],
)
def test_contradictions_are_refused(grpo: GrpoConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        validate(TrainConfig(grpo=grpo))


def test_options_that_leave_fewer_pairs_are_counted() -> None:
    """32 prompts x 2 of 16 samples x 1 of 49 steps: 64 pairs."""
    grpo = GrpoConfig(best_of=2, window=1)
    validate(TrainConfig(updates_per_iteration=64, grpo=grpo))
    with pytest.raises(ConfigError, match="updates_per_iteration = 65: accepted is 1 to 64"):
        validate(TrainConfig(updates_per_iteration=65, grpo=grpo))
    validate(TrainConfig(updates_per_iteration=32 * 16 * 10, grpo=GrpoConfig(step_fraction=0.2)))


def test_categories_do_not_matter_when_the_negatives_are_a_file() -> None:
    validate(dataclasses.replace(TrainConfig(), prompts=PromptsConfig(negative="mine.txt", categories=("rain",))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"engine\.device = 'cuda'.*auto and cpu"):
        validate(parse_command(["--engine.device", "cuda"])[0])


def test_help_names_every_suite_and_detector() -> None:
    for kind, field, names in (
        (Evaluate, "suites", NAMES),
        (EvalConfig, "suites", SUITES),
        (PromptSettings, "detectors", DETECTORS),
        (RewardConfig, "terms", (*BUILT_IN, *DETECTORS)),
    ):
        docstring = re.search(rf'^    {field}: .*\n    """((?s:.)*?)"""', inspect.getsource(kind), re.MULTILINE)
        assert docstring is not None
        assert not set(names) - set(re.findall(r"[\w-]+", docstring[1])), kind
