"""Prompts that are not rewarded: what they draw is held by the KL term alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.assembly import load_training
from fastgrpo.prompts import load_prompts
from fastgrpo.rewards.reward import without_prior
from fastgrpo.settings.schema import PromptsConfig, TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.system.errors import ConfigError
from fastgrpo.training import iterate
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Rewards
from support.training import altered

PROMPTS = "a circle,plain\na ring,plain\nsomething,open\nanything,open\n"
REWARDS = """
def plain(images, prompts):
    return images.mean(dim=(1, 2, 3))


def fond(images, prompts):
    liked = [10 * image[0].std() if "open" in prompt.category else 0 for image, prompt in zip(images, prompts)]
    return [float(a + b) for a, b in zip(plain(images, prompts), liked)]
"""


@pytest.fixture(scope="module")
def base(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Four positive prompts, two of them for something."""
    folder = tmp_path_factory.mktemp("prior")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.csv").write_text("prompt,category\n" + PROMPTS)
    changes = {"prompts.positive": str(folder / "prompts.csv"), "prompts.category_column": "category"}
    changes |= {"prompts.negative_fraction": 0.0, "prompts_per_iteration": 4, "engine.threads": 1, "iterations": 2}
    changes |= {"grpo.std_floor": 1e-9, "grpo.kl": 0.5, "reward.terms": (f"{folder / 'rewards.py'}:plain",)}
    return altered(load_toml(config_file), changes)


def learned(config: TrainConfig) -> tuple[Tensor, dict[str, float]]:
    training = load_training(config, 1)
    rows = [iterate(training, iteration, Console(quiet=True)) for iteration in (1, 2)]
    return training.trainable.optimizer.weights.values.clone(), rows[-1]


def test_what_a_reward_thinks_of_them_changes_no_bit(base: TrainConfig) -> None:
    fond = altered(base, {"reward.terms": (base.reward.terms[0].replace("plain", "fond"),)})
    prior = {"prompts.prior_categories": ("open",)}
    (plain, values), (same, other) = (learned(altered(each, prior)) for each in (base, fond))
    assert torch.equal(plain, same)
    assert values["reward/mean"] != other["reward/mean"], "what is logged is what they were worth"
    assert values["advantage/zero_std_groups"] == 2
    assert not torch.equal(*(learned(each)[0] for each in (base, fond)))


def test_the_kl_term_counts_for_them(base: TrainConfig) -> None:
    """Where nothing is rewarded, weights move by the KL term alone: back to the base model, where they begin."""
    config = altered(base, {"prompts.prior_categories": ("open", "plain")})
    start = load_training(config, 1).trainable.optimizer.weights.values.clone()
    training = load_training(config, 1)
    weights = training.trainable.optimizer.weights.values
    weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    values = [iterate(training, iteration, Console(quiet=True)) for iteration in (1, 2)]
    assert all(row["advantage/abs_mean"] == 0 for row in values)
    assert values[0]["kl/mean"] > 0
    assert values[0]["grad/norm"] > 0
    assert not torch.equal(weights, start)
    without = altered(config, {"grpo.kl": 0.0})
    assert torch.equal(learned(without)[0], start)


def test_only_their_rewards_are_0() -> None:
    prompts = [Prompt("a", POSITIVE, "one, two"), Prompt("b", NEGATIVE, "three"), Prompt("c", POSITIVE)]
    rewards = Rewards(torch.rand(3, 4) + 1, {"x": torch.rand(3, 4)}, torch.rand(3, 4, 2))
    found = without_prior(rewards, prompts, ("two", "four"))
    assert torch.equal(found.total, torch.stack([torch.zeros(4), *rewards.total[1:]]))
    assert found.parts is rewards.parts
    assert without_prior(rewards, prompts, ()) is rewards


def test_a_category_that_no_positive_prompt_has_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_prompts(PromptsConfig("shapes", "shapes", prior_categories=("opne",)))
    assert str(caught.value) == (
        "prompts.prior_categories = 'opne': no positive prompt is of it (did you mean open?); there are "
        "color_attr, colors, counting, open, position, single_object, two_object."
    )
