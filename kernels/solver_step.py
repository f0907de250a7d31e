"""`ddim_step` with a look back: a step of DPM-Solver++(2M), or one of DDIM among such steps.

    x0   = data_sample[step] * x + data_output[step] * o            what this step predicts: the history of the next
    mean = coef_sample[step] * x + coef_output[step] * o + coef_history[step] * history

and all else as in `ddim_step`. Steps of first order have a coef_history of 0, but history must be finite.
It is `ddim_step`'s kernel that also reads history and writes x0, so that one CUDA graph serves every step of a mixed
schedule, and log-probs of the steps with noise have the bits that `grpo_step` finds again.
Bytes for an element of a latent, output in half precision: 2 x 2 of the output, 4 of each of x, noise, y, history, x0.
"""

import torch
from torch import Tensor

from fastgrpo.kernels.ddim_step import ddim_step_kernel
from fastgrpo.kernels.operators import on_its_device
from fastgrpo.kernels.step_math import (
    as_guidance,
    as_launched,
    check_like,
    check_solver,
    check_step,
    gaussian_log_prob,
    is_channels_last,
    solver_mean,
    tiling,
    working_dtype,
)


def reference(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: float | Tensor | None, noise: Tensor,
    history: Tensor, solver: Tensor, rescale: float = 0.0, keep_mean: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes `solver_step` in PyTorch; in float64 when `output` is."""
    mean, data = solver_mean(output, latents, tables, step, guidance, rescale, history, solver)
    sigma = tables[2, step].double()
    precision = working_dtype(output)
    following = (mean + sigma.reshape(-1, 1, 1, 1) * noise.double()).to(precision)
    results = (following, gaussian_log_prob(following, mean, sigma).to(precision))
    return (*results, *([mean.to(precision)] if keep_mean else []), data.to(precision))


@on_its_device
def _launch_solver_step(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor | None, noise: Tensor,
    history: Tensor, solver: Tensor, rescale: float, keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the next latents, their log-prob, the mean ([0] without `keep_mean`) and x0."""
    channels_last = is_channels_last(output)
    output, latents = as_launched(output, channels_last), as_launched(latents)
    samples, size = latents.shape[0], latents[0].numel()
    following, data = torch.empty_like(latents), torch.empty_like(latents)
    means = torch.empty_like(latents) if keep_mean else latents.new_empty(0)
    log_prob = latents.new_empty(samples)
    block, num_warps, options = tiling(size, output.dtype, rescale)
    ddim_step_kernel[(samples,)](
        output, latents, as_launched(noise), tables, step.contiguous(), guidance, following, log_prob, means,
        as_launched(history), solver, data, samples, tables.shape[1], int(step.numel() > 1),
        SIZE=size, CHANNELS=latents.shape[1], CHANNELS_LAST=channels_last, RESCALE=rescale,
        GUIDED=guidance is not None, TAKEN=False, KEEP_MEAN=keep_mean, BLOCK=block,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return following, log_prob, means, data


_solver_step = torch.library.custom_op(
    "fastgrpo::solver_step", _launch_solver_step, mutates_args=(), device_types="cuda"
)


@_solver_step.register_kernel("cpu")
def _solver_step_cpu(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor | None, noise: Tensor,
    history: Tensor, solver: Tensor, rescale: float, keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = output, latents, tables, step, guidance, noise, history, solver, rescale
    following, log_prob, mean, data = reference(*given, keep_mean=True)
    mean = mean.contiguous() if keep_mean else latents.new_empty(0)
    return following.contiguous(), log_prob, mean, data.contiguous()


@_solver_step.register_fake
def _solver_step_fake(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor | None, noise: Tensor,
    history: Tensor, solver: Tensor, rescale: float, keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    following, data = latents.new_empty(latents.shape), latents.new_empty(latents.shape)
    return following, latents.new_empty(latents.shape[0]), latents.new_empty(latents.shape if keep_mean else 0), data


def solver_step(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: float | Tensor | None,
    noise: Tensor,
    history: Tensor,
    solver: Tensor,
    rescale: float = 0.0,
    keep_mean: bool = False,
) -> tuple[Tensor, ...]:
    """Takes one denoising step of B samples that may look back at the step before.

    history: [B, C, H, W] float32, the x0 that the step before has predicted; finite, also where nothing looks at it.
    solver: [3, T] float32: coef_history, data_sample, data_output. The others: as of `ddim_step`.
    Returns what `ddim_step` does, and then this step's x0, [B, C, H, W] float32. Not differentiable.
    Raises ValueError for arguments that do not fit together.
    """
    guidance = as_guidance(guidance, output.device)
    check_step(output, latents, tables, step, guidance, rescale)
    check_like("noise", noise, latents)
    check_like("history", history, latents)
    check_solver(solver, tables)
    following, found, mean, data = _solver_step(
        output, latents, tables, step, guidance, noise, history, solver, rescale, keep_mean
    )
    return (following, found, mean, data) if keep_mean else (following, found, data)
