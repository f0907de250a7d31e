"""SPEC of `ddim_step`."""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.ddim_step import ddim_step, ddim_step_kernel, reference
from fastgrpo.kernels.spec import POINTERS, AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.step_math import tiling


def case_name(samples: int, shape: tuple[int, int, int], channels_last: bool) -> str:
    return f"{samples}x{'x'.join(map(str, shape))}{'-channels-last' if channels_last else ''}"


def case_step(
    samples: int, shape: tuple[int, int, int], channels_last: bool,
    device: torch.device, dtype: torch.dtype, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Makes the first six arguments of `ddim_step`."""
    output = torch.randn(2 * samples, *shape, generator=generator).to(device, dtype)
    if channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    latents, noise = torch.randn(2, samples, *shape, generator=generator).to(device)
    # A middle and a late step of SD 1.x's 50, to two digits.
    tables = torch.tensor([[1.02, 1.002], [-0.04, -0.03], [0.17, 0.04]], device=device)
    step = torch.arange(samples, device=device) % 2
    return output, latents, tables, step, torch.full((1,), 5.0, device=device), noise


def _case(samples: int, shape: tuple[int, int, int], channels_last: bool = False, keep_mean: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        return *case_step(samples, shape, channels_last, device, dtype, generator), 0.0, keep_mean

    return Case(case_name(samples, shape, channels_last), make, samples * math.prod(shape) * (4 + 4 + 4 + 4))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # Halves enter exactly. The guided output, of up to |u| + 5 |c - u| < 50, is rounded three times to float32 (3 * 50
    # * 2^-24 = 9e-6), times coef_output 0.04. y is rounded once, by 2^-24 of up to 8. The log-prob moves by the mean of
    # residual * error / sigma: at most 4e-7 + 5e-7 over sigma 0.04, so 2e-5, and by its own rounding.
    return 1e-6, 3e-5


def _aot(
    taken: bool, channels_last: bool = False, rescale: float = 0.0, keep_mean: bool = False,
    dtype: torch.dtype = torch.bfloat16, size: int = 4 * 64 * 64, guided: bool = True,
) -> AotKernel:  # fmt: skip
    """Named by what it differs in from SD 1.x's rollout."""
    block, num_warps, options = tiling(size, dtype, rescale)
    constants: dict[str, Any] = {"SIZE": size, "CHANNELS": 4, "CHANNELS_LAST": channels_last, "RESCALE": rescale}
    constants |= {"GUIDED": guided, "TAKEN": taken, "KEEP_MEAN": keep_mean, "BLOCK": block}
    constants |= {"history": None, "solver": None, "data": None} | ({} if guided else {"guidance": None})
    differs = {"channels_last": channels_last, "rescale": rescale, "mean": keep_mean, "float32": dtype == torch.float32}
    differs |= {"unguided": not guided, str(size): size != 4 * 64 * 64}
    name = "_".join(["ddim_step", "taken" if taken else "given", *(name for name, so in differs.items() if so)])
    types = {"output": POINTERS[dtype], "step": "*i64", "samples": "i32", "steps": "i32", "step_stride": "i32"}
    return AotKernel(name, ddim_step_kernel, types, constants, num_warps, options)


_VARIANTS: list[dict[str, Any]] = [{}, {"channels_last": True}, {"guided": False}]
_VARIANTS += [{"rescale": 0.7}, {"keep_mean": True}, {"rescale": 0.7, "keep_mean": True}]

SPEC = OpSpec(
    name="ddim_step",
    function=ddim_step,
    reference=reference,
    cases=(
        _case(3, (4, 5, 7)),
        _case(2, (4, 8, 8), channels_last=True, keep_mean=True),
        _case(1, (1, 1, 1)),
        _case(2, (3, 83, 67)),
    ),
    bench=(_case(64, (4, 64, 64)), _case(256, (4, 64, 64)), _case(256, (4, 64, 64), channels_last=True)),
    tolerance=_tolerance,
    aot=(
        *(
            _aot(taken, dtype=dtype, **variant)
            for taken, dtype, variant in product((False, True), (torch.bfloat16, torch.float32), _VARIANTS)
        ),
        _aot(taken=False, rescale=0.7, size=4 * 96 * 96),
        _aot(taken=False, rescale=0.7, keep_mean=True, size=4 * 96 * 96),
    ),
)
