"""The reward term `diversity`: what a group gets for not showing the same picture again and again.

With z_i the encoder's unit vector of image i of a group of G images

    d_i = 1 / (G - 1) * sum over j != i of (1 - z_i . z_j),  where  1 - z_i . z_j = |z_i - z_j|^2 / 2

so d is 0 where all images are the same to the encoder, and the mean of d over a group is its mean pairwise cosine
distance. An image's d depends on its group alone, which no process shares with another.
"""

import torch
from torch import Tensor

from fastgrpo.rewards.encoder import SharedEncoder


class DiversityReward:
    """The term `diversity`. encoder: the reward's; images that `steering` has scored are not encoded again."""

    def __init__(self, encoder: SharedEncoder, batch: int):
        """batch: images encoded at once."""
        self._encoder, self._batch = encoder, batch

    def __call__(self, images: Tensor, group_size: int) -> Tensor:
        """images: [P * G, 3, h, w] float32 in [0, 1], a group after the other. Returns [P * G] float32."""
        features = self._encoder.encode_image(images, self._batch)
        return diversity(features.unflatten(0, (-1, group_size))).flatten()


def diversity(features: Tensor) -> Tensor:
    """d as above. features: [P, G, E] unit vectors, G at least 2. Returns [P, G], 0 to 2, in their dtype and device."""
    # From differences, not from products: of images that are the same it is exactly 0, and of alike ones exact.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square().sum(-1) / (2 * (features.shape[1] - 1))
