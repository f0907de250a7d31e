"""Confidence intervals of rates: of one binomial rate, and of the plain mean of several."""

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a binomial rate: every p with |successes / n - p| <= z * sqrt(p * (1 - p) / n).

    Its ends solve that quadratic in p. Unlike the normal interval it stays inside [0, 1] and has width at 0 and n
    successes. n = 0 says nothing: (0, 1). Source: E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22 (1927) 209-212.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n successes an end is 0 or 1 exactly; rounding must not put it on the rate's wrong side.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mean_of_rates(successes: Sequence[int], counts: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of (1 / K) * sum_k p_k for K independent binomial rates, from their Wilson intervals (l_k, u_k).

    With m the mean of the observed rates r_k: (m - sqrt(sum_k (r_k - l_k)^2) / K, m + sqrt(sum_k (u_k - r_k)^2) / K).
    It recovers each rate's variance near that rate's own limits, so it keeps its coverage where rates are near 0 or 1
    and needs no random numbers. Every count is at least 1. Source: G. Y. Zou, W. Huang, X. Zhang, "A note on
    confidence interval estimation for a linear function of binomial proportions", CSDA 53 (2009) 1080-1085.
    """
    rates = [s / n for s, n in zip(successes, counts, strict=True)]
    limits = [wilson(s, n, confidence) for s, n in zip(successes, counts, strict=True)]
    mean = sum(rates) / len(rates)
    below = math.hypot(*(rate - low for rate, (low, _) in zip(rates, limits, strict=True))) / len(rates)
    above = math.hypot(*(high - rate for rate, (_, high) in zip(rates, limits, strict=True))) / len(rates)
    return mean - below, mean + above
