"""Vendi score: how many different images a set amounts to (D. Friedman, A. B. Dieng, arXiv 2210.02410).

With K the similarities of N images, here the cosines of their features, and l_k the eigenvalues of K / N, which are 0
or more and sum to 1,

    V = exp(-sum_k l_k log l_k)

from 1, where all images are alike, to N, where no two have anything in common. It grows with the number of images:
scores of different numbers cannot be compared, and ratios of two models' are of the same prompts and seeds.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Vendi:
    """score: in [1, N]. influence: [N] float64, see `vendi`."""

    score: float
    influence: np.ndarray


def vendi(features: np.ndarray) -> Vendi:
    """The score of N images and the influence function of its logarithm. features: [N, D] unit vectors, N 1 or more.

    With C = sum_i x_i x_i' / N, which has the eigenvalues of K / N, log V = -tr(C log C). Giving image i a little more
    weight changes it at the rate

        -x_i' (log C) x_i - log V

    whose mean over the images is 0: an image in a direction of few others adds diversity, one among many takes it away.
    """
    count = len(features)
    left, singular, _ = np.linalg.svd(np.asarray(features, np.float64) / count**0.5, full_matrices=False)
    values = singular**2
    values = values / values.sum()  # features in float32 are of unit length but for rounding
    terms = np.zeros_like(values)
    np.multiply(values, np.log(values, out=np.zeros_like(values), where=values > 0), out=terms)
    entropy = -terms.sum()
    # x_i is sqrt(N) sum_k left_ik s_k v_k, with v_k the eigenvectors of C.
    return Vendi(float(np.exp(entropy)), -count * (left**2 @ terms) - entropy)
