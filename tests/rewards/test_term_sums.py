"""Sums of reward terms."""

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.encoder import Encoders
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.reward import WeightedReward, standardised
from fastgrpo.rewards.terms import Term
from support.encoders import EMBED, U
from support.rewards import GROUP, MINE, PROMPTS, P, config, write_plugin

# isort: split
import torch


def reference_standardised(values: np.ndarray, over: str) -> np.ndarray:
    """In float64, one value at a time."""
    result = np.zeros(values.shape)
    for (p, g), value in np.ndenumerate(values):
        others = values if over == "iteration" else values[p]
        std = np.std(others, ddof=1)
        result[p, g] = value if over == "none" else (value - np.mean(others)) / std
    return result


@pytest.mark.parametrize("over", ["none", "group", "iteration"])
def test_weighted_sum(over):
    generator = torch.Generator().manual_seed(3)
    scales = {"first": 1e-2, "second": 300.0, "third": 1.0}
    raw = {name: scale * (torch.randn(5, 4, generator=generator) + 3) for name, scale in scales.items()}
    weights = {"first": 1.0, "second": -0.25, "third": 7.5}
    reward = WeightedReward(
        [Term(f"mine.py:{n}", w) for n, w in weights.items()], {}, over, Encoders(torch.device("cpu"))
    )
    rewards = reward.combine(raw)
    parts = {name: weights[name] * reference_standardised(raw[name].double().numpy(), over) for name in raw}
    # Both sides compute in float64 (at 20 values and a std of a third of the mean, some 100 * 2^-53 of each summand);
    # what remains is the total's rounding to float32.
    bound = U * np.abs(sum(parts.values())) + 100 * 2.0**-53 * sum(np.abs(part) for part in parts.values())
    assert rewards.total.dtype == torch.float32
    assert (np.abs(rewards.total.double().numpy() - sum(parts.values())) <= bound).all()
    assert rewards.parts == raw  # the very tensors: raw, whatever is done to the total


def test_flat_groups_are_zero():
    third = torch.tensor(1 / 3)
    ulp = torch.nextafter(third, torch.tensor(1.0))
    values = torch.stack(
        [third.expand(3), torch.stack([third, ulp, third]), torch.zeros(3), torch.tensor([0.0, 1.0, 2.0])]
    )
    assert standardised(values, "group").tolist() == [[0.0] * 3, [0.0] * 3, [0.0] * 3, [-1.0, 0.0, 1.0]]
    assert standardised(values[:2], "iteration").eq(0).all()
    # Differences of a thousandth are not rounding.
    assert standardised(torch.tensor([[1.0, 1.001, 1.002]]), "group")[0].numpy() == pytest.approx([-1, 0, 1], abs=1e-3)


def test_terms_are_scored_added_and_shown(folder, images, tmp_path):
    file = write_plugin(tmp_path, MINE)
    reward = load_reward(
        config("steering=0.5", f"{file}:brightness=-3", "clip", folder=folder, standardise="group"), "cpu"
    )
    raw = reward.score(images, PROMPTS, GROUP)
    rewards = reward(images, PROMPTS, GROUP)
    assert list(rewards.parts) == ["alignment", "safety", "steered", "steering", "brightness", "clip"]
    assert all(torch.equal(part, raw[name]) for name, part in rewards.parts.items())
    assert torch.equal(raw["steering"], raw["steered"])
    torch.testing.assert_close(raw["clip"], raw["alignment"], rtol=0, atol=2 * EMBED * U)  # two ways to a dot product
    assert torch.equal(raw["brightness"], images.mean(dim=(1, 2, 3)).view(P, GROUP))
    summands = [
        w * reference_standardised(raw[n].double().numpy(), "group")
        for n, w in (("steering", 0.5), ("brightness", -3), ("clip", 1))
    ]
    # As in test_weighted_sum, but cosines whose std is a hundredth of their mean lose two digits more.
    np.testing.assert_allclose(rewards.total.numpy(), sum(summands), rtol=2 * U, atol=1e-10)


def test_processes_score_apart_and_combine_together(images, tmp_path):
    file = write_plugin(tmp_path, MINE)
    reward = load_reward(config(f"{file}:first_pixel", "compressibility=0.1", standardise="iteration"), "cpu")
    whole = reward(images, PROMPTS, GROUP)
    halves = [
        reward.score(i, p, GROUP) for i, p in ((images[: 2 * GROUP], PROMPTS[:2]), (images[2 * GROUP :], PROMPTS[2:]))
    ]
    together = reward.combine({name: torch.cat([half[name] for half in halves]) for name in halves[0]})
    assert torch.equal(together.total, whole.total)
    apart = torch.cat([reward.combine(half).total for half in halves])
    assert (apart - whole.total).abs().max() > 0.01
