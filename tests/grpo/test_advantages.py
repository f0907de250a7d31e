"""Advantages against numpy in float64, and which samples are learned from."""

import numpy as np
import pytest
import torch

from fastgrpo.grpo.advantages import advantages, learned_from


@pytest.mark.parametrize("mode", ["group", "global", "none"])
def test_advantages_are_numpy_in_float64(mode):
    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    r = rewards.numpy().astype(np.float64)
    centred = r - r.mean(axis=1, keepdims=True)
    scale = {"group": r.std(axis=1, ddof=1, keepdims=True), "global": centred.std(ddof=1), "none": 1.0}[mode]
    advantage, flat = advantages(rewards, mode, std_floor=1e-4, clamp=1.2)
    assert advantage.dtype == torch.float32
    assert not flat.any()
    # One rounding of a number below 2 to float32.
    np.testing.assert_allclose(advantage.numpy(), (centred / scale).clip(-1.2, 1.2), rtol=0, atol=2 * 2.0**-24)
    assert advantage.abs().max() == np.float32(1.2)


@pytest.mark.parametrize("mode", ["group", "global", "none"])
def test_a_group_below_the_floor_gets_exactly_zero(mode):
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.5, 0.50001, 0.5], [1.0, 2.0, 3.0]])
    advantage, flat = advantages(rewards, mode, std_floor=1e-4, clamp=2.5)
    assert flat.tolist() == [True, True, False]
    assert (advantage[:2] == 0).all()
    assert (advantage[2] != 0).any()
    assert advantages(rewards, mode, std_floor=0.0, clamp=2.5)[1].tolist() == [True, False, False]


def test_global_is_flat_throughout_when_the_common_std_is():
    """Unbiased stds: each group's is 0.0141; all four together divide by 3 instead of 2: 0.0115."""
    rewards = torch.tensor([[0.0, 0.02], [0.0, 0.02]])
    assert advantages(rewards, "global", std_floor=0.013, clamp=2.5)[1].tolist() == [True, True]
    assert advantages(rewards, "group", std_floor=0.013, clamp=2.5)[1].tolist() == [False, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_cannot_be_compared_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        advantages(torch.tensor([[0.0, bad]]), "group", 1e-4, 2.5)
    with pytest.raises(ValueError, match="at least 2"):
        advantages(torch.zeros(2, 1), "group", 1e-4, 2.5)


# --- options ---------------------------------------------------------------------------------------------------------


def test_trimmed_rewards_have_no_part_in_mean_std_or_learning():
    rewards = torch.tensor([[9.0, 0.1, 0.4, -7.0, 0.2], [0.3, 0.5, 0.1, 0.2, 0.9]])
    advantage, flat = advantages(rewards, "group", std_floor=1e-4, clamp=2.5, trim=1)
    expected = np.zeros((2, 5))
    for row, kept in ((0, [1, 2, 4]), (1, [0, 1, 3])):
        r = rewards[row, kept].double().numpy()
        expected[row, kept] = (r - r.mean()) / r.std(ddof=1)
    # One rounding of a number below 2 to float32.
    np.testing.assert_allclose(advantage.numpy(), expected, rtol=0, atol=2 * 2.0**-24)
    kept = [[False, True, True, False, True], [True, True, False, True, False]]
    assert learned_from(rewards, trim=1, best_of=0).tolist() == kept
    assert not flat.any()
    with pytest.raises(ValueError, match="at least 2"):
        advantages(rewards, "group", 1e-4, 2.5, trim=2)


def test_best_of_keeps_the_best_and_the_worst():
    rewards = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7, 0.2]])
    assert learned_from(rewards, trim=0, best_of=4).tolist() == [[False, True, True, False, True, True]]
    assert learned_from(rewards, trim=1, best_of=2).tolist() == [[False, False, False, False, True, True]]
    assert learned_from(rewards, trim=0, best_of=0).all()
