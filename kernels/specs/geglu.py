"""SPEC of `geglu`."""

import math
from itertools import product
from typing import Any

import torch

from fastgrpo.kernels import geglu as op
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.spec import POINTERS, AotKernel, Arguments, Case, OpSpec


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) for outputs and gradients of standard normal inputs, with a bias of deviation 1/5.

    atol: below six standard deviations erf, off by 2 ulp of 1, moves y by at most 36 * 2^-23, about 4e-6; the density
    adds as much to dg, and dbias sums up to nine of those. rtol: half precision rounds at most twice on the CPU, and
    once, by truncation, in Triton's interpreter: an ulp. float32 multiplies four times, half an ulp each.
    """
    return (2 if dtype == torch.float32 else 1.01) * torch.finfo(dtype).eps, 1e-5


def _case(*shape: int, bias: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, dtype)
        return (x, (0.2 * torch.randn(2 * shape[-1], generator=generator)).to(device, dtype)) if bias else (x,)

    return Case("x".join(map(str, shape)) + " bias" * bias, make, bytes=6 * math.prod(shape))


def _aot(direction: str, dtype: torch.dtype, bias: bool) -> AotKernel:
    forward = direction == "forward"
    kernel, tile = (op._forward_kernel, op._TILE) if forward else (op._backward_kernel, op._BACKWARD_TILE)
    constants: dict[str, Any] = {"ROWS": tile // op._COLUMNS, "COLUMNS": op._COLUMNS}
    constants |= {} if forward else {"SUMS": bias}
    constants |= {} if bias else {"bias_ptr": None}
    types = {"parts_ptr": "*fp32"} | dict.fromkeys(("rows", "width", "run"), "i32")
    name = f"{direction}{' bias' * bias} {POINTERS[dtype][1:]}"
    return AotKernel(name, kernel, types, constants, op._WARPS, other=POINTERS[dtype])


SPEC = OpSpec(
    name="geglu",
    function=op.geglu,
    reference=op.reference,
    cases=(
        *(_case(*shape, bias=bias) for shape in ((1, 1), (3, 7), (9, 257)) for bias in (True, False)),
        *(_case(2, 3, width, bias=width == 256) for width in (128, 256, 1280, 2560, 5120)),
    ),
    # A bias costs its rivals a pass that a linear layer before them would spare.
    bench=tuple(
        _case(batch, tokens, width)
        for batch in (16, 128)
        for tokens, width in ((4096, 1280), (1024, 2560), (256, 5120), (64, 5120))  # SD 1.x at 512 x 512
    ),
    tolerance=_tolerance,
    differentiable=(0, 1),
    aot=tuple(
        _aot(direction, dtype, bias)
        for dtype, bias, direction in product(DTYPES, (True, False), ("forward", "backward"))
    ),
)
