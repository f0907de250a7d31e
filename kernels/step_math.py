"""The arithmetic of a denoising step, which `ddim_step` and `grpo_step` share: in PyTorch, and as device functions.

With the UNet's two halves u (empty prompt) and c (prompt), guidance g, the schedule's coefficients at the step, x the
latent that was denoised and y the one that was reached:

    o        = u + g * (c - u)                                   float32 (Ho and Salimans, arXiv 2207.12598)
    o'       = phi * o * std(c) / std(o) + (1 - phi) * o         float64, stds of a sample (Lin et al., 2305.08891)
    mean     = coef_sample * x + coef_output * o'                float64
    log_prob = -(y - mean)^2 / (2 sigma^2) - log(sigma) - log(2 pi) / 2, averaged over C, H, W; 0 where sigma is 0

Late steps divide the error of the mean by a sigma as small as 1e-3, hence float64: its cost hides behind memory.
`ddim_step` and `grpo_step` must agree on a log-prob to the last bit, or ratios leave 1 while the policy stands still.
So they share these functions; `tiling` gives both the same block and warps, and so the same order of summation; and
both are launched with EXACT, or the compiler would choose for each kernel which products and sums to fuse into FMAs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton

EXACT = {"enable_fp_fusion": False}
"""Options of launches. Without contraction kernels round where PyTorch's separate operations do."""

BLOCK = 4096
"""Elements a program works on at a time: 8 a thread, which are one 16 byte load of a half-precision output."""

_LOG_2PI_HALF = tl.constexpr(0.5 * math.log(2 * math.pi))


def tiling(size: int, dtype: torch.dtype, rescale: float) -> tuple[int, int, dict[str, Any]]:
    """Returns the block, the warps and the options of launches for samples of `size` elements, one program each.

    dtype: the output's. float32 outputs and rescaling hold more at a time: they take half a block and all registers,
    of which the compiler would spill some to make room for one more program on each processor.
    """
    wide = rescale > 0 or dtype == torch.float32
    block = min(triton.next_power_of_2(size), BLOCK // 2 if wide else BLOCK)
    return block, max(1, block // 256), EXACT | ({"maxnreg": 255} if wide else {})


def as_launched(tensor: Tensor, channels_last: bool = False) -> Tensor:
    """Returns it dense and on a 16 byte boundary, which decides how loads, and so sums, are laid out."""
    tensor = tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def is_channels_last(output: Tensor) -> bool:
    return not output.is_contiguous() and output.is_contiguous(memory_format=torch.channels_last)


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """Returns [1] float32 on the device. A tensor is left alone: a captured graph reads what it holds at replay."""
    return value if isinstance(value, Tensor) else torch.full((1,), value, dtype=torch.float32, device=device)


def as_guidance(guidance: float | Tensor | None, device: torch.device) -> Tensor | None:
    """Returns None when the UNet was called without the empty prompt: guidance None or the number 1."""
    if guidance is None or (not isinstance(guidance, Tensor) and guidance == 1):
        return None
    return as_scalar(guidance, device)


def check_step(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor | None, rescale: float
) -> None:
    """Raises ValueError, in one sentence, for arguments that do not fit together. Reads no values from the device."""
    halves = 1 if guidance is None else 2
    if latents.dim() != 4 or output.shape != (halves * latents.shape[0], *latents.shape[1:]):
        accepted = "[N, C, H, W]" if guidance is None else "[2N, C, H, W], without and with the prompt,"
        given = f"output is {list(output.shape)} and latents {list(latents.shape)}"
        raise ValueError(f"{given}; {accepted} and [N, C, H, W] are accepted")
    if not output.is_floating_point() or output.dtype == torch.float64:
        raise ValueError(f"output is {output.dtype}; float32, bfloat16 or float16 is accepted")
    if latents.dtype != torch.float32:
        raise ValueError(f"latents are {latents.dtype}; float32 is accepted, since a rounded step has another log-prob")
    if tables.dim() != 2 or tables.shape[0] != 3 or tables.dtype != torch.float32 or not tables.is_contiguous():
        raise ValueError(
            f"tables are {list(tables.shape)} {tables.dtype}; "
            "a contiguous [3, T] float32 tensor of coef_sample, coef_output and sigma is accepted"
        )
    if step.dtype != torch.int64 or step.shape not in ((1,), (latents.shape[0],)):
        accepted = f"int64 [1] or one for each of {latents.shape[0]} samples"
        raise ValueError(f"step is {list(step.shape)} {step.dtype}; {accepted} is accepted")
    if guidance is not None and (guidance.dtype != torch.float32 or guidance.numel() != 1):
        raise ValueError(f"guidance is {list(guidance.shape)} {guidance.dtype}; a number or float32 [1] is accepted")
    if not 0 <= rescale <= 1 or (rescale and guidance is None):
        raise ValueError(f"rescale is {rescale}; 0 to 1 is accepted, and only 0 without guidance")


def check_solver(solver: Tensor, tables: Tensor) -> None:
    """Raises ValueError unless the solver's tables are as many steps' as the others."""
    if solver.shape != tables.shape or solver.dtype != torch.float32 or not solver.is_contiguous():
        raise ValueError(
            f"solver is {list(solver.shape)} {solver.dtype}; a contiguous {list(tables.shape)} float32 tensor of "
            "coef_history, data_sample and data_output is accepted"
        )


def check_like(name: str, tensor: Tensor | None, latents: Tensor) -> None:
    if tensor is not None and (tensor.shape != latents.shape or tensor.dtype != torch.float32):
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype}; float32 {list(latents.shape)}, as latents, is accepted"
        )


def check_pairs(pairs: int, **tensors: Tensor | None) -> None:
    """Raises ValueError for what is not [pairs]: of int64 for "group", of float32 for others."""
    for name, tensor in tensors.items():
        dtype = torch.int64 if name == "group" else torch.float32
        if tensor is not None and (tensor.shape != (pairs,) or tensor.dtype != dtype):
            raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; [{pairs}] {dtype} is accepted")


def working_dtype(output: Tensor) -> torch.dtype:
    """Returns what the guided output is computed in: float32, or float64 for outputs in float64, as tests have them."""
    return torch.float64 if output.dtype == torch.float64 else torch.float32


def guide(output: Tensor, guidance: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the guided output and its conditional half, both [N, C, H, W] of `working_dtype`."""
    output = output.to(working_dtype(output))
    if guidance is None:
        return output, output
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional), conditional


def rescale_factor(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """Returns o' / o, [N, 1, 1, 1] float64: 1 where all of a sample is one value, or it is a single element."""
    if guided[0].numel() < 2:
        return guided.new_ones(guided.shape[0], 1, 1, 1, dtype=torch.float64)
    std = guided.double().std(dim=(1, 2, 3), keepdim=True)
    ratio = conditional.double().std(dim=(1, 2, 3), keepdim=True) / torch.where(std > 0, std, 1.0)
    return torch.where(std > 0, rescale * ratio + (1 - rescale), 1.0)


def step_mean(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: float | Tensor | None, rescale: float
) -> Tensor:
    """Returns the mean of the next latent, [N, C, H, W] float64."""
    coef_sample, coef_output = tables[:2, step].double().reshape(2, -1, 1, 1, 1)
    guided, conditional = guide(output, guidance)
    scaled = guided.double()
    if rescale:
        scaled = rescale_factor(guided, conditional, rescale) * scaled
    return coef_sample * latents.double() + coef_output * scaled


def solver_mean(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: float | Tensor | None, rescale: float,
    history: Tensor, solver: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the mean of a step that looks back, and the x0 that it predicts itself; [N, C, H, W] float64 both."""
    coef_history, data_sample, data_output = solver[:, step].double().reshape(3, -1, 1, 1, 1)
    mean = step_mean(output, latents, tables, step, guidance, rescale) + coef_history * history.double()
    guided, conditional = guide(output, guidance)
    scaled = guided.double()
    if rescale:
        scaled = rescale_factor(guided, conditional, rescale) * scaled
    return mean, data_sample * latents.double() + data_output * scaled


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Returns `sample`'s log-density under N(mean, sigma^2), averaged over C, H, W: [N] float64; 0 where sigma is 0."""
    sigma = sigma.double()
    random = sigma > 0
    scale = torch.where(random, sigma, 1.0)
    residual = (sample.double() - mean.double()) / scale.reshape(-1, 1, 1, 1)
    log_prob = -0.5 * residual.square().mean(dim=(1, 2, 3)) - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(random, log_prob, 0.0)


# On the device. `e` counts a sample's elements in the order of the UNet's output in memory.


@triton.jit
def latent_offset(e, SIZE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Says where element e of a channels_last output lies in contiguous latents: neighbours share 32 bytes."""
    if CHANNELS_LAST:
        return (e % CHANNELS) * (SIZE // CHANNELS) + e // CHANNELS
    else:
        return e


@triton.jit
def load_step(tables, step, guidance, row, step_stride, steps, GUIDED: tl.constexpr):
    """Loads a row's coef_sample, coef_output and sigma, float64; sigma again, but 1 where it is 0; and the guidance."""
    at = tl.load(step + row * step_stride)
    coef_sample = tl.load(tables + at).to(tl.float64)
    coef_output = tl.load(tables + steps + at).to(tl.float64)
    sigma = tl.load(tables + 2 * steps + at).to(tl.float64)
    scale = tl.where(sigma > 0, sigma, 1.0)
    if GUIDED:
        return coef_sample, coef_output, sigma, scale, tl.load(guidance)
    else:
        return coef_sample, coef_output, sigma, scale, 1.0


@triton.jit
def load_solver(solver, step, row, step_stride, steps):
    """Loads a row's coef_history, data_sample and data_output, float64."""
    at = tl.load(step + row * step_stride)
    coef_history = tl.load(solver + at).to(tl.float64)
    data_sample = tl.load(solver + steps + at).to(tl.float64)
    return coef_history, data_sample, tl.load(solver + 2 * steps + at).to(tl.float64)


@triton.jit
def load_guided(output, guidance, sample, samples, e, SIZE: tl.constexpr, GUIDED: tl.constexpr):
    """Loads the guided output and its conditional half, float32; 0 beyond the sample's end."""
    inside = e < SIZE
    if GUIDED:
        uncond = tl.load(output + sample * SIZE + e, mask=inside, other=0.0).to(tl.float32)
        cond = tl.load(output + (samples + sample) * SIZE + e, mask=inside, other=0.0).to(tl.float32)
        return uncond + guidance * (cond - uncond), cond
    else:
        guided = tl.load(output + sample * SIZE + e, mask=inside, other=0.0).to(tl.float32)
        return guided, guided


@triton.jit
def load_rescale(
    output, guidance, sample, samples,
    SIZE: tl.constexpr, RESCALE: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns o' / o, and for its derivative mean and std of the guided output and those of the conditional half."""
    sum_o = tl.zeros([BLOCK], tl.float64)
    sum_c = tl.zeros([BLOCK], tl.float64)
    for start in range(0, SIZE, BLOCK):
        o, c = load_guided(output, guidance, sample, samples, start + tl.arange(0, BLOCK), SIZE, GUIDED)
        sum_o += o.to(tl.float64)
        sum_c += c.to(tl.float64)
    mean_o = tl.sum(sum_o) / SIZE
    mean_c = tl.sum(sum_c) / SIZE
    square_o = tl.zeros([BLOCK], tl.float64)
    square_c = tl.zeros([BLOCK], tl.float64)
    for start in range(0, SIZE, BLOCK):
        e = start + tl.arange(0, BLOCK)
        o, c = load_guided(output, guidance, sample, samples, e, SIZE, GUIDED)
        gap_o = tl.where(e < SIZE, o.to(tl.float64) - mean_o, 0.0)
        gap_c = tl.where(e < SIZE, c.to(tl.float64) - mean_c, 0.0)
        square_o += gap_o * gap_o
        square_c += gap_c * gap_c
    std_o = tl.sqrt(tl.sum(square_o) / max(SIZE - 1, 1))
    std_c = tl.sqrt(tl.sum(square_c) / max(SIZE - 1, 1))
    factor = RESCALE * (std_c / tl.where(std_o > 0, std_o, 1.0)) + (1 - RESCALE)
    return tl.where(std_o > 0, factor, 1.0), mean_o, std_o, mean_c, std_c


@triton.jit
def load_mean(
    output, latents, guidance, factor, coef_sample, coef_output, sample, samples, e, at,
    SIZE: tl.constexpr, RESCALE: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """Returns the mean, float64, and the guided output, float32. at: where the elements lie in a latent."""
    guided, _ = load_guided(output, guidance, sample, samples, e, SIZE, GUIDED)
    scaled = guided.to(tl.float64)
    if RESCALE > 0:
        scaled = factor * scaled
    x = tl.load(latents + sample * SIZE + at, mask=e < SIZE, other=0.0).to(tl.float64)
    return coef_sample * x + coef_output * scaled, guided


@triton.jit
def log_prob_from(total, scale, SIZE: tl.constexpr):
    """Returns the log-prob, float64, from the sum of squared residuals; for a sigma above 0, which `scale` is."""
    return -0.5 * (total / SIZE) - tl.log(scale) - _LOG_2PI_HALF
