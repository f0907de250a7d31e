"""How much better than its group a sample is, and which samples of a group are learned from."""

import torch
from torch import Tensor

from fastgrpo.kernels.group_advantages import group_advantages


def advantages(rewards: Tensor, mode: str, std_floor: float, clamp: float, trim: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards relative to their group (Shao et al., arXiv 2402.03300, section 4.1.2).

        group    A = (r - group mean) / group std
        global   A = (r - group mean) / std of all the centred rewards
        none     A = r - group mean

    then clamped to plus or minus `clamp`. A group is flat when its std is not above `std_floor` (with "global" also
    when the common std is not): its differences are noise, and its advantages are exactly 0. All stds are unbiased.
    rewards: [P, G], finite, G - 2 * trim at least 2. trim: so many highest and lowest rewards of a group have no part
    in means and stds, and advantage 0.
    Returns the advantages [P, G] float32 and flat [P] bool. Raises ValueError for rewards that cannot be compared.
    """
    if rewards.shape[1] - 2 * trim < 2:
        raise ValueError(f"a group has {rewards.shape[1] - 2 * trim} reward; at least 2 are needed to compare them")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite: the reward model or the images it was given are broken")
    if trim:
        inner = _inner(rewards, trim)
        advantage, flat = advantages(rewards.gather(1, inner), mode, std_floor, clamp)
        return torch.zeros_like(rewards, dtype=torch.float32).scatter(1, inner, advantage), flat
    return group_advantages(rewards.float(), mode, std_floor, clamp)


def compared_rewards(rewards: Tensor, trim: int) -> Tensor:
    """Returns the rewards [P, G - 2 * trim] float32 that `advantages` compares."""
    return rewards.gather(1, _inner(rewards, trim)).float() if trim else rewards.float()


def _inner(rewards: Tensor, trim: int) -> Tensor:
    """[P, G - 2 * trim] int64: the samples without the `trim` highest and lowest of every group."""
    return rewards.double().argsort(dim=1, stable=True)[:, trim:-trim]


def learned_from(rewards: Tensor, trim: int, best_of: int) -> Tensor:
    """[P, G] bool: the samples whose steps are trained on.

    rewards: [P, G]. trim: how many highest and lowest of every group are left out. best_of: of the others only the
    best_of / 2 highest and lowest (DanceGRPO, arXiv 2505.07818); 0 is all.
    """
    order = rewards.argsort(dim=1, stable=True)
    kept = order[:, trim : order.shape[1] - trim]
    if best_of:
        kept = torch.cat([kept[:, : best_of // 2], kept[:, -(best_of // 2) :]], dim=1)
    return torch.zeros_like(rewards, dtype=torch.bool).scatter(1, kept, True)
