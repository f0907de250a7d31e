"""Advantages: how much better than its group a reward is. `grpo_step` computes them on its way, by the same functions.

    A = (r - mean of its group) / std, clamped      (Shao et al., arXiv 2402.03300, section 4.1.2)

for P groups of G rewards, where std is that of the group, or of all groups' centred rewards, or 1; unbiased. A group
whose std is not above a floor is flat: its differences are noise, and its advantages exactly 0. Inside it is float64.
Bytes for a reward: 4 read, 4 written; with mode "global" every group reads all.
"""

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import on_its_device
from fastgrpo.kernels.step_math import EXACT

MODES = ("group", "global", "none")


def advantages_of(
    rewards: Tensor, mode: str, std_floor: float, clamp: float, own: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `group_advantages` in PyTorch: [P, G] float64 and flat [P] bool, of rewards [P, G].

    own: (group [N] int64, reward [N] float32): of these rewards in their groups instead, both [N].
    """
    rewards = rewards.double()
    mean = rewards.mean(dim=1, keepdim=True)
    centred = rewards - mean
    group_std = centred.std(dim=1, keepdim=True)
    flat = group_std <= std_floor
    scale = group_std if mode == "group" else torch.ones_like(group_std)
    if mode == "global":
        scale = centred.std()
        flat = flat | (scale <= std_floor)
    if own:
        group, reward = own
        centred, flat = reward.double()[:, None] - mean[group], flat[group]
        scale = scale if mode == "global" else scale[group]
    # Flat groups are masked after the division, which may be 0 / 0 for them.
    advantage = (centred / scale).clamp(-clamp, clamp).masked_fill(flat, 0.0)
    if own:
        advantage = advantage.squeeze(1)
    return advantage, flat.squeeze(1)


@triton.jit
def group_advantage(
    rewards, group, own, groups, std_floor, clamp, MODE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Returns the advantages, float64, of `own`, a reward or a block of them, in a group; and whether that is flat."""
    j = tl.arange(0, BLOCK_G)
    r = tl.load(rewards + group * GROUP_SIZE + j, mask=j < GROUP_SIZE, other=0.0).to(tl.float64)
    mean = tl.sum(r) / GROUP_SIZE
    gap = tl.where(j < GROUP_SIZE, r - mean, 0.0)
    std = tl.sqrt(tl.sum(gap * gap) / (GROUP_SIZE - 1))
    flat = std <= std_floor
    scale = std
    if MODE == "global":
        scale = common_std(rewards, groups, GROUP_SIZE, BLOCK_G)
        flat = flat | (scale <= std_floor)
    advantage = own.to(tl.float64) - mean
    if MODE != "none":
        advantage = advantage / tl.where(flat, 1.0, scale)
    # Comparisons, unlike minimum and maximum, let a NaN through to the loss, where it is noticed.
    advantage = tl.where(advantage > clamp, clamp, tl.where(advantage < -clamp, -clamp, advantage))
    return tl.where(flat, 0.0, advantage), flat


@triton.jit
def common_std(rewards, groups, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Returns the unbiased std of all groups' centred rewards, whose mean is 0."""
    BLOCK_P: tl.constexpr = max(1, 1024 // BLOCK_G)
    j = tl.arange(0, BLOCK_G)[None, :]
    squares = tl.zeros([BLOCK_P], tl.float64)
    for start in range(0, groups, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < groups) & (j < GROUP_SIZE)
        r = tl.load(rewards + p * GROUP_SIZE + j, mask=inside, other=0.0).to(tl.float64)
        mean = tl.sum(r, axis=1) / GROUP_SIZE
        gap = tl.where(inside, r - mean[:, None], 0.0)
        squares += tl.sum(gap * gap, axis=1)
    return tl.sqrt(tl.sum(squares) / (groups * GROUP_SIZE - 1))


@triton.jit
def group_advantages_kernel(
    rewards, advantage, flat, groups, std_floor, clamp,
    MODE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program a group."""
    group = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_G)
    own = tl.load(rewards + group * GROUP_SIZE + j, mask=j < GROUP_SIZE, other=0.0)
    a, is_flat = group_advantage(rewards, group, own, groups, std_floor, clamp, MODE, GROUP_SIZE, BLOCK_G)
    tl.store(advantage + group * GROUP_SIZE + j, a.to(tl.float32), mask=j < GROUP_SIZE)
    tl.store(flat + group, is_flat)


@on_its_device
def _launch_group_advantages(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> tuple[Tensor, Tensor]:
    rewards = rewards.contiguous()
    groups, group_size = rewards.shape
    advantage = torch.empty_like(rewards)
    flat = torch.empty(groups, dtype=torch.bool, device=rewards.device)
    block = triton.next_power_of_2(group_size)
    group_advantages_kernel[(groups,)](
        rewards, advantage, flat, groups, std_floor, clamp, MODE=mode, GROUP_SIZE=group_size, BLOCK_G=block, **EXACT
    )  # fmt: skip
    return advantage, flat


_group_advantages = torch.library.custom_op(
    "fastgrpo::group_advantages", _launch_group_advantages, mutates_args=(), device_types="cuda"
)


@_group_advantages.register_kernel("cpu")
def _group_advantages_cpu(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> tuple[Tensor, Tensor]:
    advantage, flat = advantages_of(rewards, mode, std_floor, clamp)
    return advantage.float().contiguous(), flat


_group_advantages.register_fake(
    lambda rewards, *_: (rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape[0], dtype=torch.bool))
)


def check_rewards(rewards: Tensor, mode: str) -> None:
    """Raises ValueError, in one sentence, for what cannot be compared. Reads no values from the device."""
    if rewards.dim() != 2 or rewards.shape[1] < 2 or rewards.dtype != torch.float32:
        raise ValueError(
            f"rewards are {list(rewards.shape)} {rewards.dtype}; float32 [P, G], G at least 2, is accepted"
        )
    if mode not in MODES:
        raise ValueError(f"advantage mode is {mode!r}; {', '.join(MODES[:-1])} or {MODES[-1]} is accepted")


def group_advantages(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> tuple[Tensor, Tensor]:
    """Returns advantages [P, G] float32 and flat [P] bool, of rewards [P, G] float32, finite, G at least 2.

    mode: "group", "global" or "none", what centred rewards are divided by. std_floor: where the std is not above it a
    group's advantages are exactly 0. clamp: the largest advantage. Not differentiable.
    Raises ValueError for another mode or shape.
    """
    check_rewards(rewards, mode)
    return _group_advantages(rewards, mode, std_floor, clamp)
