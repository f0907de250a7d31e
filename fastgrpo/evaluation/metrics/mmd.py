"""Squared maximum mean discrepancy: how far two sets of image features are from being drawn alike.

With k a kernel, x and x' independent features of the first set's distribution, y and y' of the second's, it is

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

and is estimated without bias by the means of k over pairs of features: those of two images of the first set, of two of
the second, and of one of each (A. Gretton et al., "A kernel two-sample test", JMLR 13 (2012) 723-773, equation 3).
Images of one prompt and seed by two models are no independent pair, nor are two images of one prompt: pairs of one
prompt are left out of all three means, which for one image a prompt is Gretton's equation 4. So the estimate of a model
that did not change is exactly 0; with them it would be below. Like any unbiased estimate of 0 it can be negative.

The kernel is a Gaussian, k(x, y) = exp(-|x - y|^2 / (2 s^2)), with s the median distance of the first set's images:
Gretton's median heuristic, but of the base model's images alone, so that all evaluations of a run measure by one
kernel. KID's cubic kernel, (x . y / D + 1)^3, is made for Inception's features, of lengths near sqrt(D): for unit
vectors x . y / D is at most 1 / D, the cube is a straight line but for 1 part in D, and only the means of the two sets
would be compared. A Gaussian tells any two distributions apart, and the median fits it to the narrow cone in which an
encoder's features lie (CMMD, arXiv 2401.09603, takes a Gaussian of CLIP's features too).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.evaluation.statistics import intervals
from fastgrpo.evaluation.statistics.intervals import Estimate

_ROUNDING = 1e-12  # in float64, of unit vectors' squared distances and of kernels, is far below
_SEED = 0  # of the swaps


@dataclass(frozen=True)
class PairedMmd:
    """squared: MMD^2 with a bootstrap over prompts; its n counts pairs of images. p: of the test by swaps."""

    squared: Estimate
    p: float


def median_distance(features: np.ndarray, prompts: Sequence[str]) -> float:
    """The median distance of two images of different prompts. features: [N, D]. prompts: [N], two or more different.

    It is 1e-6 or more: distances below are roundings of float32 features.
    """
    others = _different(prompts, prompts)
    return max(float(np.median(np.sqrt(_squared_distances(features, features)[others]))), _ROUNDING**0.5)


def gaussian(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    """[N, M] float64: exp(-|x - y|^2 / (2 width^2)) of all rows of [N, D] and [M, D]."""
    return np.exp(-_squared_distances(first, second) / (2 * width * width))


def squared_mmd(
    first: np.ndarray,
    second: np.ndarray,
    width: float,
    prompts: tuple[Sequence[str], Sequence[str]] | None = None,
) -> float:
    """The unbiased estimate of MMD^2. first, second: [N, D] and [M, D] features. width: the kernel's s.

    prompts: of the N and of the M images, whose pairs of one prompt are left out; None: no two images share one, which
    is Gretton's equation 3. Raises ValueError where a set has not two prompts.
    """
    one, two = prompts or ([f"a{i}" for i in range(len(first))], [f"b{i}" for i in range(len(second))])
    if len(set(one)) < 2 or len(set(two)) < 2:
        raise ValueError("each set needs images of two prompts or more.")
    within_first = gaussian(first, first, width)[_different(one, one)].mean()
    within_second = gaussian(second, second, width)[_different(two, two)].mean()
    return float(within_first + within_second - 2 * gaussian(first, second, width)[_different(one, two)].mean())


def paired_mmd(first: np.ndarray, second: np.ndarray, prompts: Sequence[str]) -> PairedMmd:
    """MMD^2 of two models' images of the same prompts and seeds, with its interval and a test.

    first, second: [N, D] features, row i of both of one prompt and seed; the first decides the kernel's width.
    prompts: [N], of each row. The interval is a percentile bootstrap over prompts, with pairs of one prompt left out of
    the resamples as of the data. Near 0, where the estimate's own spread is smallest, it is too wide rather than too
    narrow. p is the share of random swaps of the two models, prompt by prompt, in which the estimate is at least as
    large, the data themselves counted as one: were the models alike, any swap would have been as likely.
    Raises ValueError where there are not two prompts.
    """
    width = median_distance(first, prompts) if len(set(prompts)) > 1 else 0.0
    value = squared_mmd(first, second, width, (prompts, prompts))
    cross = gaussian(first, second, width)
    # h of Gretton's equation 4, summed by prompt: sums over pairs are quadratic forms of it.
    h = gaussian(first, first, width) + gaussian(second, second, width) - cross - cross.T
    h[np.abs(h) < _ROUNDING] = 0.0
    names, of = np.unique(np.asarray(prompts), return_inverse=True)
    members = np.equal.outer(np.arange(len(names)), of).astype(np.float64)
    sums, counts = members @ h @ members.T, members.sum(1)
    pairs = np.outer(counts, counts)
    np.fill_diagonal(sums, 0.0)
    np.fill_diagonal(pairs, 0.0)

    def estimates(times: np.ndarray, _: np.ndarray) -> np.ndarray:
        drawn = ((times @ pairs) * times).sum(1)
        found = np.full(len(times), np.nan)  # a sample of one prompt, again and again, has no pair
        np.divide(((times @ sums) * times).sum(1), drawn, out=found, where=drawn > 0)
        return found

    drawn = intervals.resampled(estimates, np.arange(len(names), dtype=np.float64)[:, None])
    low, high = intervals.percentiles(drawn[np.isfinite(drawn)])
    swaps = np.random.default_rng(_SEED).integers(0, 2, (intervals.RESAMPLES, len(names))) * 2.0 - 1
    swapped = ((swaps @ sums) * swaps).sum(1)  # a swap of a prompt's images changes the sign of its h
    p = (1 + int((swapped >= sums.sum() - _ROUNDING).sum())) / (1 + intervals.RESAMPLES)
    if high - low < _ROUNDING:
        return PairedMmd(Estimate(value, len(first), None, None, intervals.NO_INTERVAL), p)
    return PairedMmd(Estimate(value, len(first), low, high, intervals.BOOTSTRAP), p)


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[N, M] float64 of [N, D] and [M, D]."""
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return np.maximum((one * one).sum(1)[:, None] + (two * two).sum(1)[None] - 2 * one @ two.T, 0.0)


def _different(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """[N, M] bool: whether two images are of different prompts."""
    return np.not_equal.outer(np.asarray(first), np.asarray(second))
