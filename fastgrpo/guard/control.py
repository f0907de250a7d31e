"""What steers the KL weight beta and the learning rate from one iteration to the next. Plain numbers.

A KL target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2), with their K = 0.1:

    e    = clip(KL / target - 1, -0.2, 0.2)
    beta <- beta * (1 + K * e)

The brake, a factor b from 1 to 10 that alarms tighten, in the same proportional form with a gain of 1:

    b    <- clip(b * (1 + clip(x, -0.2, 0.2)), 1, 10)         x: the largest excess over a limit (alarm.py)
    beta_used = b * max(beta, 0.01 where b > 1),   rate_used = rate / b

From 1 it moves only in an alarm; then it follows x, which falls below 0 once all numbers are within their limits.
"""

KL_GAIN = 0.1
KL_FLOOR = 0.01
"""The KL weight that the brake begins with where it is less: half of what preset `shapes` trains with."""
MOST = 10.0
"""The tightest brake: KL weight times ten, learning rate a tenth."""

_CLIP = 0.2


def kl_weight_after(weight: float, kl: float, target: float) -> float:
    """The KL weight after an iteration whose mean divergence was `kl`. kl, target: in the unit of kl/mean."""
    return weight * (1 + KL_GAIN * _clipped(kl / target - 1))


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
