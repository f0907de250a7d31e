"""Tests of whether two checkpoints differ, on images of the same prompts and seeds.

An image of one checkpoint and that of the other with the same prompt and seed are a pair. Only pairs are compared, so
that what prompts and seeds do to both falls out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from fastgrpo.evaluation.statistics import intervals
from fastgrpo.evaluation.statistics.intervals import Estimate

MCNEMAR = "McNemar, exact"


@dataclass(frozen=True)
class McNemar:
    """The pairs of verdicts that differ, by which image's holds, and the two-sided p-value."""

    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True)
class PairedMeans:
    """Means over the same prompts. difference: second - first; its n counts pairs. p: two-sided, None of one prompt."""

    first: float
    second: float
    difference: Estimate
    p: float | None


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test of N pairs of verdicts, in the same order.

    Were the two checkpoints alike, each discordant pair would be as likely one way as the other: with b and c of them,
    p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2), and 1 where there are none. Pairs count as independent,
    which those of one prompt are not: where prompts have several images, `paired_means` keeps them together.
    Source: Q. McNemar, Psychometrika 12 (1947) 153-157; the exact form as in A. Agresti, Categorical Data Analysis.
    """
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    discordant = only_first + only_second
    p = min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5))) if discordant else 1.0
    return McNemar(only_first, only_second, p)


def paired_means(
    first: ArrayLike, second: ArrayLike, counts: ArrayLike, members: ArrayLike | None = None
) -> PairedMeans:
    """The means over all images, or the plain means of K groups' means, compared by a bootstrap over prompts.

    first, second: [P], of each prompt the sum over its images of a checkpoint: scores, or 1 for a verdict that holds.
    counts: [P], its pairs of images; prompts with none say nothing.
    members: [P, K], whether a prompt belongs to a group; without it all are one. Groups without pairs are left out.
    p is twice the share of resamples in which the difference has not the sign it has in most, the data themselves
    counted as one more resample: it is never below 2 / 10,001.
    Raises ValueError where there are no pairs.
    """
    one, two, sizes = (np.asarray(values, np.float64) for values in (first, second, counts))
    weights = np.ones((len(sizes), 1)) if members is None else np.asarray(members, np.float64)
    weights = weights * (sizes > 0)[:, None]
    kept = weights.any(1)
    if not kept.any():
        raise ValueError("there are no pairs of images.")
    one, two, sizes, weights = one[kept], two[kept], sizes[kept], weights[kept]

    once = np.ones((1, len(sizes)))
    mean_one, mean_two = (float(intervals.group_means(once, sums, sizes, weights).item()) for sums in (one, two))
    value, n = mean_two - mean_one, int(sizes.sum())
    if len(sizes) == 1:
        return PairedMeans(mean_one, mean_two, Estimate(value, n, None, None, intervals.NO_INTERVAL), None)
    # Each prompt's own difference, so that what is equal in both cancels exactly.
    differences = intervals.resampled_means(two - one, sizes, weights)
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p = min(1.0, 2 * (1 + rarer) / (1 + intervals.RESAMPLES))
    difference = Estimate(value, n, *intervals.percentiles(differences), intervals.BOOTSTRAP)
    return PairedMeans(mean_one, mean_two, difference, p)
