"""The images' features that a reward hands on: those its terms have computed, once, and nothing where none has."""

from pathlib import Path

import pytest
import torch

from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.registry import load_reward
from support.rewards import GROUP, PROMPTS, config, pictures


@pytest.mark.parametrize("terms", [("steering",), ("compressibility", "clip"), ("clip", "steering")])
def test_features_are_the_encoders(folder: Path, terms: tuple[str, ...]) -> None:
    images = pictures(len(PROMPTS) * GROUP)
    reward = load_reward(config(*terms, folder=folder), "cpu")
    halves = [
        reward.score(images[part.start * GROUP : part.stop * GROUP], PROMPTS[part], GROUP)
        for part in (slice(0, 2), slice(2, 4))
    ]
    rewards = reward.combine({name: torch.cat([half[name] for half in halves]) for name in halves[0]})
    assert rewards.features is not None
    assert rewards.features.shape[:2] == (len(PROMPTS), GROUP)
    alone = load_encoder(f"local-dir:{folder}", "cpu").encode_image(images)
    torch.testing.assert_close(rewards.features.flatten(0, 1), alone, rtol=0, atol=1e-5)  # batches of other sizes
    assert all(part.shape == (len(PROMPTS), GROUP) for part in rewards.parts.values())


def test_a_reward_without_an_encoder_has_none() -> None:
    reward = load_reward(config("compressibility"), "cpu")
    assert reward(pictures(len(PROMPTS) * GROUP), PROMPTS, GROUP).features is None
