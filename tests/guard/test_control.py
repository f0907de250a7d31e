"""The brake against its closed form."""

import math

import pytest

from fastgrpo.guard.control import KL_FLOOR, MOST, brake_after, braked_kl_weight


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
