"""SPEC of `accumulate`, as a function of tensors. in_place: on `total`, otherwise on a copy."""

from collections.abc import Sequence
from itertools import accumulate as running_sum

import torch
from torch import Tensor

from fastgrpo.kernels.accumulate import _BLOCK, _COUNT, _WARPS, ALIGNMENT, _accumulate_kernel, accumulate
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.spec import POINTERS, AotKernel, Arguments, Case, OpSpec


def starts_of(gradients: Sequence[Tensor]) -> list[int]:
    """Where each gradient begins, and where the last one ends."""
    return list(running_sum((-(-g.numel() // ALIGNMENT) * ALIGNMENT for g in gradients), initial=0))


def _function(in_place: bool, total: Tensor, *gradients: Tensor) -> Tensor:
    total = total if in_place else total.clone()
    accumulate(total, gradients, starts_of(gradients)[:-1])
    return total


def _reference(in_place: bool, total: Tensor, *gradients: Tensor) -> Tensor:
    """The definition, one gradient after the other."""
    total = total.clone()
    for gradient, start in zip(gradients, starts_of(gradients), strict=False):
        total[start : start + gradient.numel()] += gradient.flatten()
    return total


def _case(name: str, sizes: Sequence[int], in_place: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        gradients = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
        total = torch.randn(starts_of(gradients)[-1], generator=generator).to(device)
        return in_place, total, *gradients

    return Case(name, make, 10 * sum(sizes))


def _aot(dtype: torch.dtype) -> AotKernel:
    types = dict.fromkeys(("starts", "sizes", "firsts"), ("i32",) * _COUNT)
    types |= {"gradients": (POINTERS[dtype],) * _COUNT}
    return AotKernel(POINTERS[dtype][1:], _accumulate_kernel, types, {"BLOCK": _BLOCK}, _WARPS)


SPEC = OpSpec(
    name="accumulate",
    function=_function,
    reference=_reference,
    cases=(_case("1", [1]), _case("odd", [7, 4096, 4097, 1, 33]), _case("two launches", range(1, 71))),
    # As many as the UNet of SD 1.x has, half of them vectors, and as many elements.
    bench=(_case("686", [1280, 2_504_635] * 343, in_place=True),),
    # One rounding, in float32 whatever the gradients are.
    tolerance=lambda dtype: (torch.finfo(torch.float32).eps, 0.0),
    aot=tuple(map(_aot, DTYPES)),
)
