"""How much better than its group a sample is."""

import torch
from torch import Tensor


def advantages(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> tuple[Tensor, Tensor]:
    """Rewards relative to their group (Shao et al., arXiv 2402.03300, section 4.1.2).

        group    A = (r - group mean) / group std
        global   A = (r - group mean) / std of all the centred rewards
        none     A = r - group mean

    then clamped to plus or minus `clamp`. A group is flat when its std is not above `std_floor` (with "global" also
    when the common std is not): its differences are noise, and its advantages are exactly 0. All stds are unbiased.
    rewards: [P, G], finite, G at least 2.
    Returns the advantages [P, G] float32 and flat [P] bool. Raises ValueError for rewards that cannot be compared.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group has {rewards.shape[1]} reward; at least 2 are needed to compare them")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite: the reward model or the images it was given are broken")
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    group_std = centred.std(dim=1, keepdim=True)
    flat = group_std <= std_floor
    if mode == "group":
        scale = group_std
    elif mode == "global":
        scale = centred.std()
        flat = flat | (scale <= std_floor)
    elif mode == "none":
        scale = torch.ones_like(group_std)
    else:
        raise ValueError(f"advantage mode is {mode!r}; group, global or none is accepted")
    # Flat groups are masked after the division, which may be 0 / 0 for them.
    advantage = (centred / scale).clamp(-clamp, clamp).masked_fill(flat, 0.0)
    return advantage.float(), flat.squeeze(1)
