"""SPEC of `group_advantages`."""

import torch

from fastgrpo.kernels.group_advantages import MODES, advantages_of, group_advantages, group_advantages_kernel
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.step_math import EXACT


def _case(groups: int, group_size: int, mode: str) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        # float32, whatever the model computes in. Of several groups the first is flat, at a number not exact in binary.
        rewards = torch.randn(groups, group_size, generator=generator)
        rewards[: groups > 1] = 0.1
        return rewards.to(device), mode, 1e-6, 1.2

    return Case(f"{groups}x{group_size}-{mode}", make, groups * (group_size * (4 + 4) + 1))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # float64, in which sums in another order differ by 1e-15 for rewards of size 1; then one rounding to float32.
    return 2.0**-23, 1e-13


SPEC = OpSpec(
    name="group_advantages",
    function=group_advantages,
    reference=advantages_of,
    cases=(_case(1, 2, "none"), _case(3, 5, "group"), _case(17, 64, "global")),
    bench=(_case(64, 16, "group"), _case(64, 16, "global")),
    tolerance=_tolerance,
    aot=tuple(
        AotKernel(
            name=f"group_advantages_{mode}",
            kernel=group_advantages_kernel,
            types={"flat": "*i1", "groups": "i32", "std_floor": "fp32", "clamp": "fp32"},
            constants={"MODE": mode, "GROUP_SIZE": 16, "BLOCK_G": 16},
            options=EXACT,
        )
        for mode in MODES
    ),
)
