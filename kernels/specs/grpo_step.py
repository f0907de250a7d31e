"""SPEC of `grpo_step`."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.grpo_step import GrpoStepArguments, grpo_step, grpo_step_kernel, grpo_tiling, reference
from fastgrpo.kernels.spec import POINTERS, AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.specs.ddim_step import case_name, case_step
from fastgrpo.kernels.step_math import gaussian_log_prob, step_mean


def _function(*arguments: Any) -> tuple[Tensor, ...]:
    """Returns those of the results that vary continuously."""
    *step, rewards, group, reward, clip_range = arguments
    results = grpo_step(*step, rewards=rewards, group=group, reward=reward, clip_low=clip_range, clip_high=clip_range)
    return results.loss, results.ratio, results.gradient


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    *given, clip_range = arguments
    given += [None, torch.ones(1, device=given[0].device), None, None]  # advantage, weight, base_output, old_mean
    given += ["group", 1e-6, 2.5, clip_range, clip_range, torch.zeros(1, device=given[0].device), False, 0.0]
    results = reference(GrpoStepArguments(*given))
    return results.loss, results.ratio, results.gradient


def _case(groups: int, group_size: int, shape: tuple[int, int, int], channels_last: bool = False) -> Case:
    pairs = groups * group_size

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        arguments = case_step(pairs, shape, channels_last, device, dtype, generator)
        output, latents, tables, step, guidance, noise = arguments
        mean = step_mean(output, latents, tables, step, guidance, 0.0)
        sigma = tables[2, step].double()
        taken = (mean + sigma.reshape(-1, 1, 1, 1) * noise).float()
        # Ratios within 5% of 1, none of them near the bounds of 20%, where rounding decides.
        old = gaussian_log_prob(taken, mean, sigma).float() + 0.05 * torch.rand(pairs, generator=generator).to(device)
        rewards = torch.randn(groups, group_size, generator=generator).to(device)
        group = torch.arange(groups, device=device).repeat_interleave(group_size)
        return output, latents, taken, tables, step, guidance, old, rewards, group, rewards.flatten(), 0.2

    return Case(case_name(pairs, shape, channels_last), make, pairs * math.prod(shape) * (4 + 4 + 4 + 4))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # The guided output, of up to 50, is rounded three times to float32: 9e-6, times coef_output 0.04 over sigma 0.04 it
    # moves a residual by 1e-5, and the log-prob by that times the mean |residual| of about 1. The gradient is rounded
    # to the output's dtype at the end: half a unit in its last place, a whole one where the device truncates. float16's
    # gradients, of up to 1e-3, may be subnormal: 2^-24 of absolute error.
    return max(2e-5, torch.finfo(dtype).eps), 3e-5 if dtype != torch.float16 else 3e-5 + 2**-24


def _aot(
    name: str, dtype: torch.dtype, old: str = "log_prob", kl: bool = False, mode: str = "group",
    channels_last: bool = False, rescale: float = 0.0, size: int = 4 * 64 * 64, guided: bool = True,
) -> AotKernel:  # fmt: skip
    """old, mode: OLD and MODE of the kernel."""
    block, keep, num_warps, options = grpo_tiling(size, dtype, guided, kl, old.endswith("mean"), rescale)
    constants: dict[str, Any] = {"SIZE": size, "CHANNELS": 4, "CHANNELS_LAST": channels_last, "RESCALE": rescale}
    constants |= {"GUIDED": guided, "OLD": old, "KL": kl, "MODE": mode, "GROUP_SIZE": 16, "BLOCK_G": 16}
    constants |= {"KEEP": keep, "BLOCK": block}
    present = {"old_log_prob": old == "log_prob", "old_mean": old == "mean", "base_output": kl, "guidance": guided}
    present |= {"advantage": mode == "given"} | dict.fromkeys(("rewards", "group", "reward"), mode != "given")
    constants |= dict.fromkeys(parameter for parameter, given in present.items() if not given)
    types = dict.fromkeys(("output", "base_output", "gradient"), POINTERS[dtype]) | {"clipped": "*i8"}
    types |= dict.fromkeys(("step", "group"), "*i64")
    types |= dict.fromkeys(("pairs", "steps", "groups", "step_stride", "weight_stride", "kl_stride"), "i32")
    types |= dict.fromkeys(("low", "high", "std_floor", "clamp"), "fp32")
    name = f"grpo_step{name}{'_float32' if dtype == torch.float32 else ''}"
    return AotKernel(name, grpo_step_kernel, types, constants, num_warps, options)


_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "_given": {"mode": "given"},
    "_global": {"mode": "global"},
    "_own": {"old": "own_log_prob"},
    "_unguided": {"guided": False},
    "_channels_last": {"channels_last": True},
    "_kl": {"kl": True},
    "_rescale": {"rescale": 0.7},
    "_rescale_kl": {"rescale": 0.7, "kl": True},
    "_rescale_kl_channels_last": {"rescale": 0.7, "kl": True, "channels_last": True, "size": 4 * 96 * 96},
    "_4x96x96": {"size": 4 * 96 * 96},
    "_rescale_4x96x96": {"rescale": 0.7, "size": 4 * 96 * 96},
    "_ratio_norm": {"old": "mean"},
    "_ratio_norm_own": {"old": "own_mean"},
    "_ratio_norm_kl": {"old": "mean", "kl": True},
    "_ratio_norm_rescale_kl": {"old": "mean", "kl": True, "rescale": 0.7},
    "_ratio_norm_rescale_kl_channels_last": {"old": "mean", "kl": True, "rescale": 0.7, "channels_last": True},
}

SPEC = OpSpec(
    name="grpo_step",
    function=_function,
    reference=_reference,
    cases=(
        _case(2, 3, (4, 5, 7)),
        _case(1, 2, (4, 8, 8), channels_last=True),
        _case(1, 2, (1, 1, 1)),
        _case(1, 2, (3, 83, 67)),
    ),
    bench=(_case(4, 16, (4, 64, 64)), _case(16, 16, (4, 64, 64)), _case(16, 16, (4, 64, 64), channels_last=True)),
    tolerance=_tolerance,
    aot=tuple(
        _aot(name, dtype, **variant) for dtype in (torch.bfloat16, torch.float32) for name, variant in _VARIANTS.items()
    ),
)
