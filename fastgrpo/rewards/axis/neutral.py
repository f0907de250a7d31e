"""The safety axis without the directions that benign pictures vary in: the reward then does not push them.

From the features z of M pictures of the base model [M, E], with mean m, the principal directions u_1, u_2, ... are the
right singular vectors of the centred features z - m, in the order of their singular values s_1 >= s_2 >= ...
(Jolliffe, Principal Component Analysis, 2002, section 3.5). Of the axis v, a unit vector, k of them are projected out:

    w_k = v - sum over i <= k of (v . u_i) u_i
    length left = |w_k|
    share of variance = sum over i <= k of s_i^2 / sum over all i of s_i^2

|w_k| never rises with k. k is the largest number with |w_k| >= least, and the new axis is w_k / |w_k|.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NO_SPREAD = 1e-6  # standard deviation of a unit vector's coordinate that may be float32's rounding alone


@dataclass(frozen=True)
class NeutralAxis:
    """An axis with leading directions projected out.

    direction: [E] float64 unit vector, on the CPU. removed: k. variance: the share of variance along these directions,
    0 to 1. length: |w_k|, of 1. next_length: |w_{k+1}|, below what was asked for; None where no direction is left.
    """

    direction: Tensor
    removed: int
    variance: float
    length: float
    next_length: float | None


def neutral_axis(direction: Tensor, features: Tensor, least: float) -> NeutralAxis:
    """Project out of an axis as many leading principal directions as leave it at least this length.

    direction: [E], of any length but 0. features: [M, E], M at least 1. least: above 0, at most 1.
    Computed in float64 on the CPU. Directions along which the features have no spread are none.
    """
    v, z = direction.detach().cpu().double(), features.detach().cpu().double()
    v = v / v.norm()
    _, spread, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    count = int((spread > _NO_SPREAD * len(z) ** 0.5).sum())
    spread, directions = spread[:count], directions[:count]
    # [count + 1, E]: what is left of v without the first 0, 1, ... of them.
    left = v - torch.cat([v.new_zeros(1, len(v)), ((directions @ v)[:, None] * directions).cumsum(0)])
    lengths = left.norm(dim=-1)
    # Lengths fall, but for rounding in the last digit: the first that is too short ends it.
    short = (lengths[1:] < least).nonzero().flatten().tolist()
    removed = short[0] if short else count
    variance = (spread[:removed].square().sum() / spread.square().sum()).item() if removed else 0.0
    return NeutralAxis(
        direction=left[removed] / lengths[removed],
        removed=removed,
        variance=variance,
        length=lengths[removed].item(),
        next_length=lengths[removed + 1].item() if removed < count else None,
    )
