"""Squared MMD against its definition, pair by pair in float64; without bias; its interval and test; bad input."""

import math
from itertools import product

import numpy as np
import pytest

from fastgrpo.evaluation.metrics.mmd import median_distance, paired_mmd, squared_mmd
from fastgrpo.evaluation.statistics.intervals import NO_INTERVAL

WIDTH = 0.7


def features(seed: int, count: int, shift: float = 0.0, dim: int = 5) -> np.ndarray:
    """[count, dim] float32 unit vectors around one direction, as an encoder's are."""
    values = np.random.default_rng(seed).normal(size=(count, dim)) + np.eye(dim)[0] * 2 + np.eye(dim)[1] * shift
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def kernel(x: np.ndarray, y: np.ndarray, width: float = WIDTH) -> float:
    return math.exp(-sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) / (2 * width**2))


def by_pairs(first, second, one: list[str], two: list[str], width: float = WIDTH) -> float:
    """The three means over pairs of different prompts, summed one by one."""

    def mean(a, b, of_a: list[str], of_b: list[str]) -> float:
        pairs = [(i, j) for i, j in product(range(len(a)), range(len(b))) if of_a[i] != of_b[j]]
        return math.fsum(kernel(a[i], b[j], width) for i, j in pairs) / len(pairs)

    return mean(first, first, one, one) + mean(second, second, two, two) - 2 * mean(first, second, one, two)


def test_two_sets_are_compared_as_in_gretton_s_equation_3() -> None:
    first, second = features(0, 7), features(1, 11, shift=0.5)
    names = [f"a{i}" for i in range(7)], [f"b{i}" for i in range(11)]
    # A hundred kernels of size 1, each rounded by some 2^-52 per operation.
    assert squared_mmd(first, second, WIDTH) == pytest.approx(by_pairs(first, second, *names), abs=1e-13)


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_pairs_of_one_prompt_are_left_out(per_prompt: int) -> None:
    prompts = [f"p{i // per_prompt}" for i in range(12)]
    first, second = features(0, 12), features(1, 12, shift=0.5)
    width = median_distance(first, prompts)
    distances = [
        np.linalg.norm(first[i].astype(np.float64) - first[j].astype(np.float64))
        for i, j in product(range(12), range(12))
        if prompts[i] != prompts[j]
    ]
    assert width == pytest.approx(float(np.median(distances)), abs=1e-9)
    expected = by_pairs(first, second, prompts, prompts, width)
    found = paired_mmd(first, second, prompts)
    assert squared_mmd(first, second, width, (prompts, prompts)) == pytest.approx(expected, abs=1e-13)
    assert (found.squared.value, found.squared.n) == (pytest.approx(expected, abs=1e-13), 12)


def test_what_did_not_change_is_at_distance_0() -> None:
    found = paired_mmd(features(0, 9), features(0, 9), [str(i) for i in range(9)])
    assert found.squared.value == pytest.approx(0.0, abs=1e-12)
    assert (found.squared.low, found.squared.high, found.squared.method) == (None, None, NO_INTERVAL)
    assert found.p == 1.0


def test_sets_of_one_distribution_are_at_distance_0_in_the_mean() -> None:
    """The N (N - 1) / 2 terms h of equation 4 are in [-2, 2], of mean 0 and uncorrelated where the two are alike.

    So the estimate's variance is at most 2 * 4 / (N (N - 1)), and that of a mean of R estimates an R-th of it.
    """
    count, repeats = 12, 400
    prompts = [str(i) for i in range(count)]
    sets = [(features(2 * r, count), features(2 * r + 1, count)) for r in range(repeats)]
    estimates = [squared_mmd(first, second, WIDTH, (prompts, prompts)) for first, second in sets]
    error = math.sqrt(8 / (count * (count - 1)) / repeats)
    assert abs(np.mean(estimates)) < 5 * error
    assert min(estimates) < 0 < max(estimates)
    moved = [squared_mmd(first, features(r, count, 4.0), WIDTH) for r, (first, _) in enumerate(sets)]
    assert np.mean(moved) > 5 * error


def test_the_test_finds_what_moved_and_the_interval_holds_the_distance() -> None:
    count = 40
    prompts = [str(i) for i in range(count)]
    first, second = features(0, count), features(1, count, shift=1.0)
    found = paired_mmd(first, second, prompts)
    assert found.p < 0.001
    assert 0 < found.squared.low < found.squared.value < found.squared.high
    many = squared_mmd(features(2, 1500), features(3, 1500, shift=1.0), median_distance(first, prompts))
    assert found.squared.low < many < found.squared.high
    assert paired_mmd(first, features(4, count), prompts).p > 0.001


def test_a_swap_within_any_pair_leaves_the_chance_of_a_small_p_small() -> None:
    """Pairs that may be swapped are what the test is exact for: p <= 0.1 in a tenth of cases, here in 30 draws.

    Of Binomial(30, 0.1) more than 12 have a chance below 1e-5.
    """
    below = 0
    for seed in range(30):
        both = np.stack([features(2 * seed, 10), features(2 * seed + 1, 10)])
        below += paired_mmd(*both, [str(i) for i in range(10)]).p <= 0.1
    assert below <= 12


def test_one_prompt_is_too_few() -> None:
    with pytest.raises(ValueError, match="two prompts or more"):
        paired_mmd(features(0, 3), features(1, 3), ["a", "a", "a"])
    with pytest.raises(ValueError, match="two prompts or more"):
        squared_mmd(features(0, 1), features(1, 3), WIDTH)


def test_equal_pictures_before_training_have_a_width_all_the_same() -> None:
    same = np.repeat(features(0, 1), 5, axis=0)
    assert paired_mmd(same, features(1, 5), [str(i) for i in range(5)]).squared.value > 0.9
