"""SPEC of `layer_norm`, and of the sums over programs that it shares with `geglu`."""

import math
from typing import Any

import torch

from fastgrpo.kernels import layer_norm as op
from fastgrpo.kernels import program_sums
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.spec import POINTERS, AotKernel, Arguments, Case, OpSpec

_WIDTHS = (320, 640, 1280)  # of SD 1.x and 2.x


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) for outputs and gradients of the cases: sums of deviation 1.4, weight about 1, standard normal dy.

    rtol: the result is rounded once, by truncation in Triton's interpreter: below an ulp. atol, for float32: z and dx
    are sums and products of numbers below 6 with about ten roundings of half an ulp, and a mean of C adds log2(C) / 2
    more: 6 * 16 * 2^-24 is 6e-6. dweight and dbias sum at most 24 terms below 36, with partial sums below 128: 24 * 128
    * 2^-24 is 2e-4 if every rounding went one way, and 1 / sqrt(24) of that, 4e-5, if they go either way.
    """
    return torch.finfo(dtype).eps, 4e-5


def _case(*shape: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        # Multiples of 1/16 below 8: their sum is exact in every dtype, and what y is off by is the norm's own.
        x, residual = ((16 * torch.randn(shape, generator=generator)).round() / 16 for _ in range(2))
        weight = 1 + 0.2 * torch.randn(shape[-1], generator=generator)
        bias = 0.2 * torch.randn(shape[-1], generator=generator)
        x, weight, bias, residual = (tensor.to(device, dtype) for tensor in (x, weight, bias, residual))
        return x, weight, bias, 1e-5, residual

    return Case("x".join(map(str, shape)), make, bytes=8 * math.prod(shape))


def _aot(direction: str, dtype: torch.dtype, width: int, residual: bool) -> AotKernel:
    kernel = op._forward_kernel if direction == "forward" else op._backward_kernel
    constants: dict[str, Any] = op._blocks(op._MAX_PROGRAMS, width)
    warps = constants.pop("num_warps")
    constants |= {"AFFINE": True} if direction == "backward" else {}
    if not residual:
        constants |= dict.fromkeys(("residual_ptr", "sum_ptr") if direction == "forward" else ("dsum_ptr",))
    types = dict.fromkeys(("mean_ptr", "rstd_ptr", "parts_ptr"), "*fp32") | {"eps": "fp32"}
    types |= dict.fromkeys(("rows", "width", "run"), "i32")
    name = f"{direction}{' residual' * residual} {POINTERS[dtype][1:]} {width}"
    return AotKernel(name, kernel, types, constants, warps, other=POINTERS[dtype])


_SUM = AotKernel(
    "sum",
    program_sums._sum_kernel,
    {"programs": "i32", "width": "i32"},
    {"PROGRAMS": program_sums._PROGRAMS, "COLUMNS": program_sums._COLUMNS},
)

SPEC = OpSpec(
    name="layer_norm",
    function=op.layer_norm,
    reference=op.reference,
    cases=(_case(1, 1), _case(3, 5), _case(24, 33), *(_case(2, 3, width) for width in (32, 64, 320, 640, 768, 1280))),
    bench=tuple(
        _case(batch, tokens, width)
        for batch in (16, 128)
        for tokens, width in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))  # SD 1.x at 512 x 512
    ),
    tolerance=_tolerance,
    differentiable=(0, 1, 2, 4),
    aot=(
        *(
            _aot(direction, *variant)
            for variant in (
                *((dtype, width, True) for dtype in DTYPES for width in _WIDTHS),
                *((torch.bfloat16, width, False) for width in _WIDTHS),
                (torch.bfloat16, op.MAX_WIDTH, True),
            )
            for direction in ("forward", "backward")
        ),
        _SUM,
    ),
)
