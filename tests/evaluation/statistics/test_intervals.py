"""Intervals of rates against independent solutions and published values."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from fastgrpo.evaluation.statistics.intervals import entropy, mean_of_rates, wilson


def score_root(successes: int, n: int, side: int) -> float:
    """One end of the score interval by bisection on the test statistic itself, without the closed form."""
    z = NormalDist().inv_cdf(0.975)
    rate = successes / n
    inside, outside = rate, float(side > 0)

    def rejected(p: float) -> bool:
        return abs(rate - p) > z * math.sqrt(p * (1 - p) / n)

    for _ in range(200):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (1, 40), (17, 40), (137, 280)])
def test_wilson_ends_are_the_roots_of_the_score_test(successes: int, n: int) -> None:
    low, high = wilson(successes, n)
    # Bisection ends within one ulp; near a root at 0 or 1 the statistic's cancellation leaves some 1e-8.
    assert low == pytest.approx(score_root(successes, n, -1), abs=1e-7)
    assert high == pytest.approx(score_root(successes, n, +1), abs=1e-7)
    assert 0.0 <= low <= successes / n <= high <= 1.0


def test_wilson_gives_the_published_values() -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), limits in published.items():
        assert wilson(successes, n) == pytest.approx(limits, abs=5e-5)  # printed to four digits


def test_no_observation_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_wilson_covers_the_true_rate(p: float) -> None:
    n = 60
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(w for k, w in enumerate(weights) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
    # The sum is exact. A discrete distribution cannot hit 95%: whether one more k counts as covered is worth its
    # chance, which at the ends of these intervals is up to 3 points.
    assert 0.92 <= covered <= 0.98


def test_the_mean_of_one_rate_has_that_rates_interval() -> None:
    assert mean_of_rates([17], [40]) == pytest.approx(wilson(17, 40), abs=1e-12)


@pytest.mark.parametrize("rates", [(0.4, 0.5, 0.6, 0.5, 0.3, 0.7), (0.98, 0.95, 0.3, 0.75, 0.03, 0.06)])
def test_the_mean_of_rates_interval_covers_the_true_mean(rates: tuple[float, ...]) -> None:
    trials, n = 2000, 60
    hits = np.random.default_rng(0).binomial(n, rates, size=(trials, len(rates)))
    intervals = [mean_of_rates(row.tolist(), [n] * len(rates)) for row in hits]
    covered = sum(low <= np.mean(rates) <= high for low, high in intervals) / trials
    # A 95% interval; 2,000 trials have a standard error of 0.5%, the method itself is within 1% (Zou et al. 2009).
    assert 0.93 <= covered <= 0.975


def test_the_mean_of_rates_is_narrower_than_pooling_when_rates_differ() -> None:
    # Between-task spread is no sampling error: stratification must remove it.
    low, high = mean_of_rates([60, 0, 60, 0], [60] * 4)
    pooled_low, pooled_high = wilson(120, 240)
    assert low < 0.5 < high
    assert high - low < 0.75 * (pooled_high - pooled_low)


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[1] * 7], math.log2(7)),
        ([[3, 0, 0], [5, 0, 0]], 0.0),
        ([[2, 0, 0], [0, 1, 1]], 1.5),
        ([[1, 0], [1, 0], [1, 0], [0, 1]], 2 - 0.75 * math.log2(3)),
    ],
)
def test_entropy_of_known_shares(counts: list[list[int]], bits: float) -> None:
    found = entropy(counts)
    assert found.value == pytest.approx(bits, abs=1e-12)
    assert math.copysign(1, found.value) == 1  # no table shows "-0.0"
    assert found.n == len(counts)
    if len(counts) == 1:
        assert (found.low, found.high) == (None, None)
    else:
        assert -1e-12 <= found.low <= found.high <= math.log2(len(counts[0])) + 1e-12


@pytest.mark.parametrize("counts", [[], [[0, 0]], [[0, 0], [0, 0]]])
def test_nothing_that_is_shown_has_no_entropy(counts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="something that is shown"):
        entropy(counts)


def test_the_interval_of_an_entropy_is_the_bootstraps_over_prompts() -> None:
    """Against a bootstrap that draws prompts one by one; both are random, so that quantiles differ by some of both."""
    rng = np.random.default_rng(5)
    counts = rng.multinomial(3, [0.5, 0.25, 0.15, 0.1], size=60)
    draws = 3000
    own = []
    for _ in range(draws):
        shares = counts[rng.integers(60, size=60)].sum(0) / 180
        own.append(-sum(p * math.log2(p) for p in shares if p))
    found = entropy(counts)
    slack = 4 * math.sqrt(0.025 * 0.975 * (1 / draws + 1 / 10_000))  # four standard errors of the rank of a quantile
    for end, quantile in ((found.low, 0.025), (found.high, 0.975)):
        low, high = np.quantile(own, [max(0.0, quantile - slack), min(1.0, quantile + slack)])
        assert low <= end <= high
