"""SPEC of `fused_adamw`: the norm, clipping and the step as one function.

tensors: parameters, exp_avg, exp_avg_sq, gradient, step, lr, and working and ema or None. in_place: not on copies.
"""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import fused_adamw as op
from fastgrpo.kernels.operators import HALF
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec

HYPERPARAMETERS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
EMA_DECAY = 0.999
_SD1 = 859_520_964  # parameters of SD 1.x's UNet
_SD1_RANK_4 = 797_184  # parameters of rank-4 adapters on its attention


def _function(in_place: bool, max_norm: float, *tensors: Any) -> tuple[Tensor, ...]:
    if not in_place:
        tensors = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
    parameters, exp_avg, exp_avg_sq, gradient, step, lr, working, ema = tensors
    scale, found_inf = op.clip_coefficient(op.global_norm(gradient), max_norm)
    op.fused_adamw(
        parameters, exp_avg, exp_avg_sq, gradient, step, lr, scale=scale, found_inf=found_inf,
        working=working, ema=ema, ema_decay=EMA_DECAY, **HYPERPARAMETERS,
    )  # fmt: skip
    return tuple(tensor for tensor in (parameters, exp_avg, exp_avg_sq, step, working, ema) if tensor is not None)


def _reference(in_place: bool, max_norm: float, *tensors: Any) -> tuple[Tensor, ...]:
    *first, working, ema = tensors
    scale = (max_norm / (torch.linalg.vector_norm(first[3]) + 1e-6)).clamp(max=1)
    given = [*first, *HYPERPARAMETERS.values(), scale, None, working, ema, EMA_DECAY]
    return op.reference(op.AdamWArguments(*given))


def _case(n: int, in_place: bool = False, ema: bool = False) -> Case:
    """A step late enough for both bias corrections to count, on moments that are not zero; the gradient is clipped."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def normal() -> Tensor:
            return torch.randn(n, generator=generator).to(device)

        parameters, exp_avg, exp_avg_sq, gradient = normal(), normal(), normal().abs_(), normal()
        working = torch.empty(n, dtype=dtype, device=device) if dtype in HALF else None
        step, lr = torch.full((1,), 9.0, device=device), torch.full((1,), 1e-3, device=device)
        average = parameters.clone() if ema else None
        return in_place, 0.5, parameters, exp_avg, exp_avg_sq, gradient, step, lr, working, average

    return Case(f"{n}{'-ema' if ema else ''}", make, n * (4 + 28 + 2 + (8 if ema else 0)))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # A dozen roundings of 2^-24 each, of numbers below 8; the working copy is off by 1 ulp if it is truncated. A root
    # halves the second moment's relative error, and the update is 1e-3 times that quotient, here below 2^10.
    return (torch.finfo(dtype).eps if dtype in HALF else 12 * 2.0**-24), 12 * 2.0**-24 * 8


def _adamw(name: str, *absent: str) -> AotKernel:
    types = dict.fromkeys(("weight1", "beta2", "weight2", "eps", "ema_weight"), "fp32")
    types |= {"n": "i32", "working_ptr": "*bf16"}
    return AotKernel(name, op._adamw_kernel, types, dict.fromkeys(absent) | {"BLOCK": op._BLOCK}, options=op._OPTIONS)


_COEFFICIENTS = {"BETA1": 0.9, "BETA2": 0.999, "WEIGHT_DECAY": 0.01}

SPEC = OpSpec(
    name="fused_adamw",
    function=_function,
    reference=_reference,
    cases=(_case(1), _case(7), _case(1023, ema=True), _case(2049), _case(2600, ema=True)),
    bench=(_case(_SD1, in_place=True), _case(_SD1, in_place=True, ema=True), _case(_SD1_RANK_4, in_place=True)),
    tolerance=_tolerance,
    aot=(
        _adamw("adamw", "ema_ptr"),
        _adamw("adamw_ema"),
        _adamw("adamw_float32", "working_ptr", "ema_ptr"),
        AotKernel("coefficients", op._coefficients_kernel, {"lr_ptr": "*fp64"}, _COEFFICIENTS, 1, op._OPTIONS),
        AotKernel("squares", op._squares_kernel, {"partials_ptr": "*fp64", "n": "i32"}, {"BLOCK": op._NORM_BLOCK}, 8),
        AotKernel("root", op._root_kernel, {"partials_ptr": "*fp64", "count": "i32"}, {"BLOCK": op._NORM_PROGRAMS}),
        AotKernel("clip", op._clip_kernel, {"max_norm": "fp32"}, {"loss_scale_ptr": None}, 1, op._OPTIONS),
        AotKernel("clip_scaled", op._clip_kernel, {"max_norm": "fp32"}, {}, 1, op._OPTIONS),
    ),
)
