"""How far pictures are from each other, by an encoder's unit vectors z: mean cosine distances 1 - z . z'.

    within(p)       = mean over pairs of prompt p's images                    what varies where the prompt does not
    between         = mean over pairs of images of different prompts          what varies with the prompt

Means over pairs are unbiased for any number of images, so that groups of 16 can stand beside the base model's pairs.
A sum over pairs needs no pair: sum over i != j of z_i . z_j = |sum z|^2 - sum |z|^2.
Letters in shapes: P prompts, G images each, D the encoder's width. Everything is computed in float64.
"""

from torch import Tensor


def mean_features(features: Tensor) -> Tensor:
    """[P, G, D] unit vectors -> [P, D] float64, each prompt's mean, which is no unit vector."""
    return features.double().mean(dim=1)


def within_distance(features: Tensor) -> Tensor:
    """[P, G, D] unit vectors, G at least 2 -> [P] float64: `within` of each prompt, from 0, all alike, to 2."""
    return 1 - _mean_product(features.double())


def between_distance(means: Tensor) -> Tensor:
    """[P, D] float64 of `mean_features`, P at least 2 -> a scalar, `between`."""
    return 1 - _mean_product(means.double())


def _mean_product(vectors: Tensor) -> Tensor:
    """[..., N, D] -> [...]: the mean of v_i . v_j over i != j."""
    count = vectors.shape[-2]
    everything, own = vectors.sum(dim=-2).square().sum(dim=-1), vectors.square().sum(dim=(-2, -1))
    return (everything - own) / (count * (count - 1))
