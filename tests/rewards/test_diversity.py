"""The term `diversity` against a double loop in float64, and where it is exact."""

from pathlib import Path

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.diversity import diversity
from fastgrpo.rewards.registry import load_reward
from support.encoders import U
from support.rewards import GROUP, PROMPTS, config, pictures

# isort: split
import torch
import torch.nn.functional as F


def by_pairs(features: np.ndarray) -> np.ndarray:
    """[P, G, E] -> [P, G]: the mean of 1 - cosine with every other image of the group, one pair at a time."""
    return np.array(
        [
            [np.mean([1 - group[i] @ group[j] for j in range(len(group)) if j != i]) for i in range(len(group))]
            for group in features
        ]
    )


@pytest.mark.parametrize("size", [2, 5])
def test_it_is_the_mean_over_pairs(size: int) -> None:
    features = F.normalize(torch.randn(3, size, 16, generator=torch.Generator().manual_seed(size)), dim=-1)
    exact = by_pairs(features.double().numpy())
    found = diversity(features)
    assert found.shape == (3, size)
    assert found.dtype == torch.float32
    # Unit to within 2 U, differences of 16 coordinates squared, summed and averaged: some 30 roundings of up to 2.
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=60 * 2 * U)


def test_the_same_image_again_is_worth_nothing_and_an_orthogonal_one_everything() -> None:
    one = F.normalize(torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert torch.equal(diversity(one.expand(1, 4, 16)), torch.zeros(1, 4))
    torch.testing.assert_close(diversity(torch.eye(4)[None]), torch.ones(1, 4))
    torch.testing.assert_close(diversity(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])), torch.full((1, 2), 2.0))
    # Of three, one that stands apart has more of it than the two that are alike.
    torch.testing.assert_close(diversity(torch.eye(2)[[0, 0, 1]][None]), torch.tensor([[0.5, 0.5, 1.0]]))


def test_the_term_is_of_the_reward_s_encoder_and_of_its_own_group(folder: Path) -> None:
    images = pictures(len(PROMPTS) * GROUP)
    images[:GROUP] = images[0]
    reward = load_reward(config("steering", "diversity=0.5", folder=folder), "cpu")
    assert reward.encoder is not None
    found = reward(images, PROMPTS, GROUP)
    features = reward.encoder.encode_image(images, 256).double().numpy()
    exact = by_pairs(features.reshape(len(PROMPTS), GROUP, -1))
    np.testing.assert_allclose(found.parts["diversity"].numpy(), exact, rtol=0, atol=200 * U)
    assert found.parts["diversity"][0].abs().max() <= 4 * U
    assert found.parts["diversity"][1:].min() > 1e-3
    torch.testing.assert_close(found.total, found.parts["steering"] + 0.5 * found.parts["diversity"])

    # As processes do: each scores its prompts, and only then they are put together.
    halves = [
        reward.score(images[part.start * GROUP : part.stop * GROUP], PROMPTS[part], GROUP)
        for part in (slice(0, 2), slice(2, 4))
    ]
    together = torch.cat([half["diversity"] for half in halves])
    torch.testing.assert_close(together, found.parts["diversity"], rtol=0, atol=1e-5)
