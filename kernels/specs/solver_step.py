"""SPEC of `solver_step`."""

import math
from dataclasses import replace
from typing import Any

import torch

from fastgrpo.kernels.solver_step import reference, solver_step
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.specs import ddim_step
from fastgrpo.kernels.specs.ddim_step import case_name, case_step


def _case(samples: int, shape: tuple[int, int, int], channels_last: bool = False, keep_mean: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        given = case_step(samples, shape, channels_last, device, dtype, generator)
        history = torch.randn(samples, *shape, generator=generator).to(device)
        # As of a step of second order in the middle of SD 1.x's 20, and one with noise; to two digits.
        solver = torch.tensor([[-0.08, 0.0], [1.7, 1.05], [-1.4, -0.32]], device=device)
        return *given, history, solver, 0.0, keep_mean

    return Case(case_name(samples, shape, channels_last), make, samples * math.prod(shape) * (4 + 4 + 4 + 4 + 4 + 4))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # As of `ddim_step`; x0 takes the guided output's error, 9e-6, 1.4 times, and is rounded once, by 2^-24 of up to 80.
    return 1e-6, 3e-5


def _aot(of: AotKernel) -> AotKernel:
    constants: dict[str, Any] = {n: v for n, v in of.constants.items() if n not in ("history", "solver", "data")}
    return replace(of, name=of.name.replace("ddim_step_given", "solver_step"), constants=constants)


SPEC = OpSpec(
    name="solver_step",
    function=solver_step,
    reference=reference,
    cases=(
        _case(3, (4, 5, 7)),
        _case(2, (4, 8, 8), channels_last=True, keep_mean=True),
        _case(1, (1, 1, 1)),
        _case(2, (3, 83, 67)),
    ),
    bench=(_case(64, (4, 64, 64)), _case(256, (4, 64, 64)), _case(256, (4, 64, 64), channels_last=True)),
    tolerance=_tolerance,
    aot=tuple(_aot(of) for of in ddim_step.SPEC.aot if not of.constants["TAKEN"]),
)
