"""How much better than its group a reward is, alone: `grpo_step` computes it on its way, by the same functions.

    A = (r - mean of its group) / std, clamped      (Shao et al., arXiv 2402.03300, section 4.1.2)

for P groups of G rewards, where std is that of the group, or of all groups' centred rewards, or 1; unbiased. A group whose
std is not above a floor is flat: its differences are noise, and its advantages are exactly 0. float64 inside, float32 out.

Bytes for a reward: 4 read, 4 written; with mode "global" every group reads all.
"""

import torch
from torch import Tensor

from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.step_math import EXACT

MODES = ("group", "global", "none")


def advantages_of(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> tuple[Tensor, Tensor]:
    """The reference: [P, G] float64 and flat [P] bool, of rewards [P, G]."""
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    group_std = centred.std(dim=1, keepdim=True)
    flat = group_std <= std_floor
    scale = group_std if mode == "group" else torch.ones_like(group_std)
    if mode == "global":
        scale = centred.std()
        flat = flat | (scale <= std_floor)
    # Flat groups are masked after the division, which may be 0 / 0 for them.
    advantage = (centred / scale).clamp(-clamp, clamp).masked_fill(flat, 0.0)
    return advantage, flat.squeeze(1)


# On the device.


@triton.jit
def group_advantage(
    rewards, group, slot, groups, std_floor, clamp, MODE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Advantages, float64, of the slots of one group: `slot` is one or a block of them. And whether the group is flat."""
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
    own = tl.load(rewards + group * GROUP_SIZE + slot, mask=slot < GROUP_SIZE, other=0.0).to(tl.float64)
    advantage = own - mean
    if MODE != "none":
        advantage = advantage / tl.where(flat, 1.0, scale)
    # Comparisons, unlike minimum and maximum, let a NaN through to the loss, where it is noticed.
    advantage = tl.where(advantage > clamp, clamp, tl.where(advantage < -clamp, -clamp, advantage))
    return tl.where(flat, 0.0, advantage), flat


@triton.jit
def group_squares(rewards, groups, start, GROUP_SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr):
    """The sums of squares of BLOCK_P groups' centred rewards, float64; 0 beyond the last group."""
    p = start + tl.arange(0, BLOCK_P)[:, None]
    j = tl.arange(0, BLOCK_G)[None, :]
    inside = (p < groups) & (j < GROUP_SIZE)
    r = tl.load(rewards + p * GROUP_SIZE + j, mask=inside, other=0.0).to(tl.float64)
    mean = tl.sum(r, axis=1) / GROUP_SIZE
    gap = tl.where(inside, r - mean[:, None], 0.0)
    return tl.sum(gap * gap, axis=1)


@triton.jit
def common_std(rewards, groups, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    """The unbiased std of all groups' centred rewards, whose mean is 0."""
    BLOCK_P: tl.constexpr = max(1, 1024 // BLOCK_G)
    squares = tl.zeros([BLOCK_P], tl.float64)
    for start in range(0, groups, BLOCK_P):
        squares += group_squares(rewards, groups, start, GROUP_SIZE, BLOCK_P, BLOCK_G)
    return tl.sqrt(tl.sum(squares) / (groups * GROUP_SIZE - 1))


@triton.jit
def count_flat(rewards, groups, std_floor, MODE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    """How many of all groups are flat, int32."""
    BLOCK_P: tl.constexpr = max(1, 1024 // BLOCK_G)
    count = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, groups, BLOCK_P):
        std = tl.sqrt(group_squares(rewards, groups, start, GROUP_SIZE, BLOCK_P, BLOCK_G) / (GROUP_SIZE - 1))
        count += ((std <= std_floor) & (start + tl.arange(0, BLOCK_P) < groups)).to(tl.int32)
    flat = tl.sum(count)
    if MODE == "global":
        flat = tl.where(common_std(rewards, groups, GROUP_SIZE, BLOCK_G) <= std_floor, groups, flat)
    return flat


@triton.jit
def group_advantages_kernel(
    rewards,
    advantage,
    flat,
    groups,
    std_floor,
    clamp,
    MODE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program a group."""
    group = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_G)
    a, is_flat = group_advantage(rewards, group, j, groups, std_floor, clamp, MODE, GROUP_SIZE, BLOCK_G)
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
def _group_advantages_cpu(rewards, mode, std_floor, clamp):
    advantage, flat = advantages_of(rewards, mode, std_floor, clamp)
    return advantage.float().contiguous(), flat


@_group_advantages.register_fake
def _group_advantages_fake(rewards, *_):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape[0], dtype=torch.bool)


def check_rewards(rewards: Tensor, mode: str) -> None:
    """Raise ValueError, in one sentence, for what cannot be compared. Reads no values from the device."""
    if rewards.dim() != 2 or rewards.shape[1] < 2 or rewards.dtype != torch.float32:
        raise ValueError(
            f"rewards are {list(rewards.shape)} {rewards.dtype}; float32 [P, G], G at least 2, is accepted"
        )
    if mode not in MODES:
        raise ValueError(f"advantage mode is {mode!r}; {', '.join(MODES[:-1])} or {MODES[-1]} is accepted")


def group_advantages(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> tuple[Tensor, Tensor]:
    """Advantages [P, G] float32 and flat [P] bool, of rewards [P, G] float32, finite, G at least 2. Not differentiable.

    mode: "group", "global" or "none", what centred rewards are divided by. std_floor: where the std is not above it a
    group's advantages are exactly 0. clamp: the largest advantage. Raises ValueError for another mode or shape.
    """
    check_rewards(rewards, mode)
    return _group_advantages(rewards, mode, std_floor, clamp)


def _case(groups: int, group_size: int, mode: str) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        # float32, whatever the model computes in. Of several groups the first is flat, at a number not exact in binary.
        rewards = torch.randn(groups, group_size, generator=generator)
        rewards[: groups > 1] = 0.1
        return rewards.to(device), mode, 1e-6, 1.2

    return Case(f"{groups}x{group_size}-{mode}", make, groups * (group_size * (4 + 4) + 1))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # float64 throughout, where sums in another order differ by 1e-15 of rewards of size 1; then rounded once to float32.
    return 2.0**-23, 1e-13


SPEC = OpSpec(
    name="group_advantages",
    function=group_advantages,
    reference=advantages_of,
    cases=(_case(1, 2, "none"), _case(3, 5, "group"), _case(17, 64, "global")),
    bench=(_case(64, 16, "group"), _case(64, 16, "global")),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    tolerance=_tolerance,
    aot=tuple(
        AotKernel(
            name=f"group_advantages_{mode}",
            kernel=group_advantages_kernel,
            signature={
                "rewards": "*fp32",
                "advantage": "*fp32",
                "flat": "*i1",
                "groups": "i32",
                "std_floor": "fp32",
                "clamp": "fp32",
                **dict.fromkeys(("MODE", "GROUP_SIZE", "BLOCK_G"), "constexpr"),
            },
            constants={"MODE": mode, "GROUP_SIZE": 16, "BLOCK_G": 16},
            options=EXACT,
        )
        for mode in MODES
    ),
)
