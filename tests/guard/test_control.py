"""The KL controller against Ziegler et al.'s own form, and the brake against its closed form."""

import math
import random

import pytest

from fastgrpo.guard.control import (
    KL_FLOOR,
    MOST,
    brake_after,
    braked_kl_weight,
    kl_weight_after,
)


class AdaptiveKLController:
    """As Ziegler et al. have it in their code (lm-human-preferences): K is steps / horizon."""

    def __init__(self, weight: float, target: float, horizon: float):
        self.value, self.target, self.horizon = weight, target, horizon

    def update(self, current: float, steps: float) -> None:
        error = max(-0.2, min(0.2, current / self.target - 1))
        self.value *= 1 + error * steps / self.horizon


def test_the_kl_weight_is_zieglers() -> None:
    generator = random.Random(0)
    theirs, ours = AdaptiveKLController(0.03, 0.01, horizon=10), 0.03
    for _ in range(100):
        kl = 0.02 * generator.random()
        theirs.update(kl, steps=1)
        ours = kl_weight_after(ours, kl, 0.01)
        assert ours == pytest.approx(theirs.value, rel=1e-12)
    assert kl_weight_after(1.0, 0.01, 0.01) == 1.0
    assert kl_weight_after(1.0, 5.0, 0.01) == pytest.approx(1.02)
    assert kl_weight_after(1.0, 0.0, 0.01) == pytest.approx(0.98)


def test_the_weight_finds_the_target_of_a_policy_that_answers_to_it() -> None:
    weight = 0.02
    for _ in range(300):
        weight = kl_weight_after(weight, 0.0001 / weight, 0.002)
    assert 0.0001 / weight == pytest.approx(0.002, rel=0.05)


def test_the_brake_waits_for_an_alarm_and_then_follows_the_excess() -> None:
    assert brake_after(1.0, 0.5, alarmed=False) == 1  # beyond the limit, but not for long enough
    assert brake_after(1.0, 0.1, alarmed=True) == pytest.approx(1.1)
    assert brake_after(1.0, math.inf, alarmed=True) == pytest.approx(1.2)
    brake, rows = 1.0, [0.5] * 4 + [0.1, -0.05] + [-0.5] * 10
    seen = [brake := brake_after(brake, excess, alarmed=excess > 0) for excess in rows]
    assert seen[5] == pytest.approx(1.2**4 * 1.1 * 0.95)
    assert seen[8] == pytest.approx(1.2**4 * 1.1 * 0.95 * 0.8**3)
    assert seen[-1] == 1


def test_the_brake_is_bounded() -> None:
    brake = 1.0
    for _ in range(50):
        brake = brake_after(brake, 1.0, alarmed=True)
    assert brake == MOST


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 2 * KL_FLOOR), (0.03, 0.06)])
def test_a_braked_kl_weight_has_something_to_begin_with(weight: float, expected: float) -> None:
    assert braked_kl_weight(weight, 1.0) == weight
    assert braked_kl_weight(weight, 2.0) == pytest.approx(expected)
