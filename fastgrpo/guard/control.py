"""How an alarm brakes: what happens to the KL weight beta and the learning rate while it lasts. Plain numbers.

The brake is a factor b from 1 to 10, in the proportional form of an adaptive KL weight (Ziegler et al. 2019, arXiv
1909.08593, section 2.2), with a gain of 1:

    b    <- clip(b * (1 + clip(x, -0.2, 0.2)), 1, 10)         x: the largest excess over a limit (alarm.py)
    beta_used = b * max(beta, 0.01 where b > 1),   rate_used = rate / b

From 1 it moves only in an alarm; then it follows x, which falls below 0 once all numbers are within their limits.
"""

KL_FLOOR = 0.01
"""The KL weight that the brake begins with where it is less: half of what preset `shapes` trains with."""
MOST = 10.0
"""The tightest brake: KL weight times ten, learning rate a tenth."""

_CLIP = 0.2


def brake_after(brake: float, excess: float, alarmed: bool) -> float:
    """The brake after an iteration. excess: the largest over a limit, or infinite. alarmed: whether any alarm is on."""
    if brake == 1 and not alarmed:
        return 1.0
    return min(max(brake * (1 + _clipped(excess)), 1.0), MOST)


def braked_kl_weight(weight: float, brake: float) -> float:
    """beta_used."""
    return weight if brake == 1 else brake * max(weight, KL_FLOOR)


def _clipped(error: float) -> float:
    return min(max(error, -_CLIP), _CLIP)
