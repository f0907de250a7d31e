"""One denoising step of the rollout: guidance, the DDIM mean, noise, the next latent, and its log-probability.

    mean = coef_sample[step] * x + coef_output[step] * o          (o guided and rescaled as in `step_math`)
    y    = mean + sigma[step] * noise, rounded to float32
    log_prob = log N(y; mean, sigma^2), averaged over C, H, W, of the y that is stored

Both prediction types are linear in the UNet's output, so the tables say all that a step needs of the schedule.
The step and the guidance are read on the device: one CUDA graph serves every step.
Bytes for an element of a latent, output in half precision: 2 x 2 of the output, 4 of x, 4 of noise, 4 of y.
"""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import on_its_device
from fastgrpo.kernels.step_math import (
    as_guidance,
    as_launched,
    check_like,
    check_step,
    gaussian_log_prob,
    is_channels_last,
    latent_offset,
    load_mean,
    load_rescale,
    load_solver,
    load_step,
    log_prob_from,
    step_mean,
    tiling,
    working_dtype,
)


def reference(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: float | Tensor | None, noise: Tensor,
    rescale: float = 0.0, keep_mean: bool = False, taken: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes `ddim_step` in PyTorch; in float64 when `output` is. taken: `noise` is the next latent itself."""
    mean = step_mean(output, latents, tables, step, guidance, rescale)
    sigma = tables[2, step].double()
    precision = working_dtype(output)
    following = noise if taken else (mean + sigma.reshape(-1, 1, 1, 1) * noise.double()).to(precision)
    results = (following, gaussian_log_prob(following, mean, sigma).to(precision))
    return (*results, mean.to(precision)) if keep_mean else results


@triton.jit
def ddim_step_kernel(
    output, latents, noise, tables, step, guidance, following, log_prob, means, history, solver, data,
    samples, steps, step_stride,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESCALE: tl.constexpr,
    GUIDED: tl.constexpr, TAKEN: tl.constexpr, KEEP_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sample. TAKEN: `noise` is the next latent itself. history, solver, data: as of `solver_step`."""
    sample = tl.program_id(0).to(tl.int64)
    coef_sample, coef_output, sigma, scale, g = load_step(tables, step, guidance, sample, step_stride, steps, GUIDED)
    factor = 1.0
    if RESCALE > 0:
        factor, _, _, _, _ = load_rescale(output, g, sample, samples, SIZE, RESCALE, GUIDED, BLOCK)
    if history is not None:
        coef_history, data_sample, data_output = load_solver(solver, step, sample, step_stride, steps)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, SIZE, BLOCK):
        e = start + tl.arange(0, BLOCK)
        inside = e < SIZE
        at = latent_offset(e, SIZE, CHANNELS, CHANNELS_LAST)
        mean, guided = load_mean(
            output, latents, g, factor, coef_sample, coef_output, sample, samples, e, at, SIZE, RESCALE, GUIDED
        )
        if history is not None:
            x = tl.load(latents + sample * SIZE + at, mask=inside, other=0.0).to(tl.float64)
            before = tl.load(history + sample * SIZE + at, mask=inside, other=0.0).to(tl.float64)
            mean = mean + coef_history * before
            scaled = guided.to(tl.float64)
            if RESCALE > 0:
                scaled = factor * scaled
            tl.store(data + sample * SIZE + at, (data_sample * x + data_output * scaled).to(tl.float32), mask=inside)
        y = tl.load(noise + sample * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        if not TAKEN:
            y = (mean + sigma * y.to(tl.float64)).to(tl.float32)
            tl.store(following + sample * SIZE + at, y, mask=inside)
        if KEEP_MEAN:
            tl.store(means + sample * SIZE + at, mean.to(tl.float32), mask=inside)
        # Of the value as stored: rounded first, then compared with the mean.
        residual = tl.where(inside, (y.to(tl.float64) - mean) / scale, 0.0)
        squares += residual * residual
    value = log_prob_from(tl.sum(squares), scale, SIZE)
    tl.store(log_prob + sample, tl.where(sigma > 0, value, 0.0).to(tl.float32))


@on_its_device
def _launch_ddim_step(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor | None, noise: Tensor,
    rescale: float, keep_mean: bool, taken: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the next latents ([0] where they are `taken`), their log-prob, and the mean ([0] without `keep_mean`)."""
    channels_last = is_channels_last(output)
    output, latents = as_launched(output, channels_last), as_launched(latents)
    samples, size = latents.shape[0], latents[0].numel()
    following = latents.new_empty(0) if taken else torch.empty_like(latents)
    means = torch.empty_like(latents) if keep_mean else latents.new_empty(0)
    log_prob = latents.new_empty(samples)
    block, num_warps, options = tiling(size, output.dtype, rescale)
    ddim_step_kernel[(samples,)](
        output, latents, as_launched(noise), tables, step.contiguous(), guidance, following, log_prob, means,
        None, None, None, samples, tables.shape[1], int(step.numel() > 1),
        SIZE=size, CHANNELS=latents.shape[1], CHANNELS_LAST=channels_last, RESCALE=rescale,
        GUIDED=guidance is not None, TAKEN=taken, KEEP_MEAN=keep_mean, BLOCK=block,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return following, log_prob, means


_ddim_step = torch.library.custom_op("fastgrpo::ddim_step", _launch_ddim_step, mutates_args=(), device_types="cuda")


@_ddim_step.register_kernel("cpu")
def _ddim_step_cpu(output: Tensor, latents: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, keep_mean, taken = arguments
    following, log_prob, *means = reference(output, latents, *arguments)
    following = latents.new_empty(0) if taken else following.contiguous()
    return following, log_prob, means[0].contiguous() if keep_mean else latents.new_empty(0)


@_ddim_step.register_fake
def _ddim_step_fake(output: Tensor, latents: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, keep_mean, taken = arguments
    following = latents.new_empty(0 if taken else latents.shape)
    return following, latents.new_empty(latents.shape[0]), latents.new_empty(latents.shape if keep_mean else 0)


def ddim_step(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: float | Tensor | None,
    noise: Tensor,
    rescale: float = 0.0,
    keep_mean: bool = False,
) -> tuple[Tensor, ...]:
    """Takes one denoising step of B samples.

    output: what the UNet said, float32, bfloat16 or float16, contiguous or channels_last (others are copied):
        [2B, C, H, W], without and with the prompt, or [B, C, H, W] when guidance is None or the number 1.
    latents: [B, C, H, W] float32. tables: [3, T] float32: coef_sample, coef_output, sigma.
    step: [1] or [B] int64, position in the tables, which is not checked. guidance: a number, or [1] float32.
    noise: [B, C, H, W] float32. rescale: phi of arXiv 2305.08891, 0 to 1. All tensors are on one device.
    Returns the next latents [B, C, H, W] float32, the log-prob [B] float32 of exactly those (0 where sigma is 0), and
    with keep_mean the mean [B, C, H, W] float32. Not differentiable.
    Raises ValueError for arguments that do not fit together.
    """
    guidance = as_guidance(guidance, output.device)
    check_step(output, latents, tables, step, guidance, rescale)
    check_like("noise", noise, latents)
    results = _ddim_step(output, latents, tables, step, guidance, noise, rescale, keep_mean, taken=False)
    return results if keep_mean else results[:2]


def log_prob(
    output: Tensor,
    latents: Tensor,
    taken: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: float | Tensor | None,
    rescale: float = 0.0,
    keep_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the log-prob of the step from `latents` to `taken`, [B] float32, and with keep_mean also its mean.

    taken: [B, C, H, W] float32, as the mean; the others, and the log-prob's bits: as of `ddim_step`. No gradients.
    """
    guidance = as_guidance(guidance, output.device)
    check_step(output, latents, tables, step, guidance, rescale)
    check_like("taken", taken, latents)
    _, found, mean = _ddim_step(output, latents, tables, step, guidance, taken, rescale, keep_mean, taken=True)
    return (found, mean) if keep_mean else found
