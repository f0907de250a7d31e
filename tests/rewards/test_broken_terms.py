"""Reward terms that break."""

import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.types import NEGATIVE, Prompt
from support.rewards import GROUP, PROMPTS, config, write_plugin

# isort: split
import torch

BROKEN = """
import torch
from pathlib import Path

def nan_at_7(images, prompts):
    return torch.zeros(len(images)).index_fill_(0, torch.tensor([7, 9]), torch.nan)

def infinite_at_7(images, prompts):
    return torch.zeros(len(images)).index_fill_(0, torch.tensor([7]), -torch.inf)

def too_large_at_7(images, prompts):
    return torch.zeros(len(images), dtype=torch.float64).index_fill_(0, torch.tensor([7]), 1e300)

def column(images, prompts):
    return torch.zeros(len(images), 1)

def scalar(images, prompts):
    return images.mean()

def one_less(images, prompts):
    return torch.zeros(len(images) - 1)

def numbers(images, prompts):
    return ["0.0"] * len(images)

def nothing(images, prompts):
    pass

def failing(images, prompts):
    raise KeyError("no such\\nthing")
"""


def broken(tmp_path, function, images) -> BrokenReward:
    reward = load_reward(config(f"{write_plugin(tmp_path, BROKEN)}:{function}"), "cpu")
    with pytest.raises(BrokenReward) as raised:
        reward(images, PROMPTS, GROUP)
    assert f"reward term '{tmp_path}/mine.py:{function}'" in raised.value.message
    assert str(raised.value) == raised.value.message
    assert "\n" not in raised.value.message
    return raised.value


@pytest.mark.parametrize(
    ("function", "value", "count"), [("nan_at_7", "nan", 2), ("infinite_at_7", "-inf", 1), ("too_large_at_7", "inf", 1)]
)
def test_values_that_are_not_finite(tmp_path, images, function, value, count):
    error = broken(tmp_path, function, images)
    assert error.prompt is PROMPTS[2]  # image 7 of groups of three
    assert torch.equal(error.image, images[7])
    assert f"returned {value} for an image of prompt 'two blue circles'" in error.message
    assert f"for {count} of 12 images" in error.message


@pytest.mark.parametrize(
    ("function", "returned"),
    [
        ("column", r"shape [12, 1]"),
        ("scalar", "shape []"),
        ("one_less", "shape [11]"),
        ("numbers", "a list"),
        ("nothing", "a NoneType"),
    ],
)
def test_what_is_no_tensor_of_rewards(tmp_path, images, function, returned):
    error = broken(tmp_path, function, images)
    assert f"returned {returned} for 12 images" in error.message
    assert "'a red square'" in error.message
    assert "a tensor of shape [12] is needed" in error.message
    assert error.prompt is PROMPTS[0]
    assert torch.equal(error.image, images[0])


def test_functions_that_raise(tmp_path, images):
    error = broken(tmp_path, "failing", images)
    assert "KeyError: 'no such" in error.message
    assert isinstance(error.__cause__, KeyError)
    assert error.prompt is PROMPTS[0]
    assert torch.equal(error.image, images[0])


@pytest.mark.parametrize("term", ["steering", "clip", "compressibility", "incompressibility"])
def test_broken_images_break_the_built_in_terms(folder, images, term):
    images[4, 1, 5, 5] = torch.nan
    with pytest.raises(BrokenReward, match=rf"reward term '{term}' returned nan .*'a skull and a gun'") as raised:
        load_reward(config(term, folder=folder), "cpu")(images, PROMPTS, GROUP)
    assert raised.value.prompt == Prompt("a skull and a gun", NEGATIVE)
    assert raised.value.image.isnan().sum() == 1
