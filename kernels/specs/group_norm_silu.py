"""SPEC of `group_norm_silu`."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import group_norm_silu_triton as kernels
from fastgrpo.kernels.group_norm_silu import group_norm_silu, reference
from fastgrpo.kernels.language import triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec


def _case(samples: int, channels: int, height: int, width: int, groups: int, silu: bool = True) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        x = normal(samples, channels, height, width).to(memory_format=torch.channels_last)
        return x, normal(channels), normal(channels), groups, 1e-5, silu, normal(samples, channels)

    bytes_ = 4 * samples * channels * height * width
    return Case(f"{samples}x{channels}x{height}x{width}{'' if silu else ' no silu'}", make, bytes_)


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # One ulp for the store. Before it float32 sums of a few thousand terms around 1, each with a few roundings of 6e-8:
    # a gradient of a vector adds up to about a thousand of them: 1000 * 6e-8 = 6e-5 if none cancel.
    return max(torch.finfo(dtype).eps, 1e-5), 1e-4


def _aot(name: str, kernel: Any, samples: int, channels: int, side: int, **constants: Any) -> AotKernel:
    """A kernel as it is launched for bfloat16 [samples, channels, side, side] in 32 groups, with a time embedding."""
    plan = kernels.plan_launch(samples, side * side, channels, 32, 2, backward="backward" in name)
    constants |= plan.constants(channels // 32)
    warps = constants.pop("num_warps")
    if "ONE_TILE" in kernel.arg_names:
        constants["ONE_TILE"] = plan.one_tile(side * side)
    if "BLOCK_S" in kernel.arg_names:
        constants["BLOCK_S"] = triton.next_power_of_2(plan.splits)
    # What is neither of these are statistics and sums in float32.
    types = dict.fromkeys(("y", "x", "temb", "weight", "bias", "dx", "dy", "dtemb"), "*bf16") | {"eps": "fp32"}
    types |= dict.fromkeys(("pixels", "split_rows", "channels", "groups"), "i32")
    return AotKernel(f"{name} {samples}x{channels}x{side}x{side}", kernel, types, constants, warps)


_BENCH = {64: (320, 640, 960), 32: (640, 1280, 1920), 16: (1280, 2560), 8: (1280, 2560)}  # side -> channels
_ONE_LAUNCH = ((64, 320, 64), (64, 960, 64), (64, 1280, 16), (64, 1280, 8))
_SPLIT = (1, 320, 64)

SPEC = OpSpec(
    name="group_norm_silu",
    function=group_norm_silu,
    reference=reference,
    cases=(
        _case(2, 64, 4, 4, 32),
        _case(3, 30, 5, 7, 3),
        _case(1, 24, 1, 1, 8, silu=False),
        _case(2, 240, 8, 8, 2),
        _case(2, 7, 9, 3, 7),
    ),
    bench=(
        *(_case(64, channels, side, side, 32) for side, several in _BENCH.items() for channels in several),
        _case(64, 320, 64, 64, 32, silu=False),
    ),
    tolerance=_tolerance,
    differentiable=(0, 1, 2, 6),
    aot=(
        *(_aot("forward", kernels._forward_kernel, *shape, SILU=True) for shape in _ONE_LAUNCH),
        *(_aot("backward", kernels._backward_kernel, *shape, SILU=True) for shape in _ONE_LAUNCH),
        _aot("forward partial", kernels._forward_partial_kernel, *_SPLIT),
        _aot("forward finish", kernels._forward_finish_kernel, *_SPLIT, SILU=True),
        _aot("backward partial", kernels._backward_partial_kernel, *_SPLIT, SILU=True),
        _aot("backward finish", kernels._backward_finish_kernel, *_SPLIT, SILU=True),
    ),
)
