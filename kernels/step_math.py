"""The arithmetic of one denoising step, shared by `ddim_step` and `grpo_step`: once in PyTorch, once as device functions.

With the UNet's two halves u (empty prompt) and c (prompt), guidance g, the schedule's coefficients at the step, x the
latent that was denoised and y the one that was reached:

    o        = u + g * (c - u)                                   float32 (Ho and Salimans, arXiv 2207.12598)
    o'       = phi * o * std(c) / std(o) + (1 - phi) * o         float64, std over a sample (Lin et al., arXiv 2305.08891)
    mean     = coef_sample * x + coef_output * o'                float64
    log_prob = -(y - mean)^2 / (2 sigma^2) - log(sigma) - log(2 pi) / 2, averaged over C, H, W; 0 where sigma is 0

Late steps divide the error of the mean by a sigma as small as 1e-3, hence float64: what it costs hides behind memory.
`ddim_step` and `grpo_step` must agree on a log-prob to the last bit, or ratios leave 1 while the policy stands still.
So they share these functions, `tiling` gives both the same block and warps, and with them the same order of summation,
and both are launched with EXACT: no product and sum may be contracted into an FMA, which rounds once less and which the
compiler would decide for each kernel anew.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton

EXACT = {"enable_fp_fusion": False}
"""How the kernels are launched. Without contraction they round where PyTorch's separate operations do."""

BLOCK = 4096
"""Elements a program works on at a time: 8 a thread, which are one 16 byte load of a half-precision output."""

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
"""Triton's names for an output in memory."""

_LOG_2PI_HALF = tl.constexpr(0.5 * math.log(2 * math.pi))


# What both kernels are launched with.


def tiling(size: int, rescale: float = 0.0) -> tuple[int, int]:
    """(block, num_warps) for samples of `size` elements, one program each. Rescaling keeps more at hand: half a block."""
    block = min(triton.next_power_of_2(size), BLOCK // 2 if rescale else BLOCK)
    return block, max(1, block // 256)


def launch_options(dtype: torch.dtype, rescale: float, num_warps: int) -> dict[str, Any]:
    """What a step's kernel is compiled with. dtype: the output's. rescale: as of `ddim_step`.

    float32 outputs and rescaling get all the registers that so many threads can have: left to itself, the compiler spills
    some to make room for one more program on each processor.
    """
    if rescale or dtype == torch.float32:
        return EXACT | {"maxnreg": min(255, 65536 // (32 * num_warps))}
    return EXACT


def as_launched(tensor: Tensor, channels_last: bool = False) -> Tensor:
    """Dense in the given order and on a 16 byte boundary, which decides how loads, and so sums, are laid out."""
    tensor = tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def is_channels_last(output: Tensor) -> bool:
    return not output.is_contiguous() and output.is_contiguous(memory_format=torch.channels_last)


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """[1] float32 on the device. A tensor is left alone, so that a captured graph reads what it holds at replay."""
    return value if isinstance(value, Tensor) else torch.full((1,), value, dtype=torch.float32, device=device)


def as_guidance(guidance: float | Tensor | None, device: torch.device) -> Tensor | None:
    """None when the UNet was called without the empty prompt: guidance None or the number 1."""
    return (
        None
        if guidance is None or (not isinstance(guidance, Tensor) and guidance == 1)
        else as_scalar(guidance, device)
    )


def check_step(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor | None, rescale: float
) -> None:
    """Raise ValueError, in one sentence, for arguments that do not belong together. Reads no values from the device."""
    halves = 1 if guidance is None else 2
    if latents.dim() != 4 or output.shape != (halves * latents.shape[0], *latents.shape[1:]):
        accepted = "[N, C, H, W]" if guidance is None else "[2N, C, H, W], without and with the prompt,"
        raise ValueError(
            f"output is {list(output.shape)} and latents {list(latents.shape)}; {accepted} and [N, C, H, W] are accepted"
        )
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
        raise ValueError(
            f"step is {list(step.shape)} {step.dtype}; int64 [1] or one for each of {latents.shape[0]} samples is accepted"
        )
    if guidance is not None and (guidance.dtype != torch.float32 or guidance.numel() != 1):
        raise ValueError(f"guidance is {list(guidance.shape)} {guidance.dtype}; a number or float32 [1] is accepted")
    if not 0 <= rescale <= 1 or (rescale and guidance is None):
        raise ValueError(f"rescale is {rescale}; 0 to 1 is accepted, and only 0 without guidance")


def check_like(name: str, tensor: Tensor | None, latents: Tensor) -> None:
    if tensor is not None and (tensor.shape != latents.shape or tensor.dtype != torch.float32):
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype}; float32 {list(latents.shape)}, as latents, is accepted"
        )


def check_pairs(pairs: int, **tensors: Tensor | None) -> None:
    """Raise ValueError for what is not one number for each of the pairs: int64 for "group" and "slot", else float32."""
    for name, tensor in tensors.items():
        dtype = torch.int64 if name in ("group", "slot") else torch.float32
        if tensor is not None and (tensor.shape != (pairs,) or tensor.dtype != dtype):
            raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; [{pairs}] {dtype} is accepted")


# In PyTorch.


def working(output: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for tests."""
    return output if output.dtype == torch.float64 else output.float()


def guide(output: Tensor, guidance: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """The guided output and its conditional half, both [N, C, H, W] in `working` precision."""
    output = working(output)
    if guidance is None:
        return output, output
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional), conditional


def rescale_factor(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """[N, 1, 1, 1] float64: o' / o. 1 where all of a sample is one value, or it is a single element."""
    if guided[0].numel() < 2:
        return guided.new_ones(guided.shape[0], 1, 1, 1, dtype=torch.float64)
    std = guided.double().std(dim=(1, 2, 3), keepdim=True)
    ratio = conditional.double().std(dim=(1, 2, 3), keepdim=True) / torch.where(std > 0, std, 1.0)
    return torch.where(std > 0, rescale * ratio + (1 - rescale), 1.0)


def step_mean(
    output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: float | Tensor | None, rescale: float
) -> Tensor:
    """The mean of the next latent, [N, C, H, W] float64."""
    coef_sample, coef_output = tables[:2, step].double().reshape(2, -1, 1, 1, 1)
    guided, conditional = guide(output, guidance)
    scaled = guided.double()
    if rescale:
        scaled = rescale_factor(guided, conditional, rescale) * scaled
    return coef_sample * latents.double() + coef_output * scaled


def gaussian_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log-density of `sample` under N(mean, sigma^2), averaged over C, H, W: [N] float64; 0 where sigma is 0."""
    sigma = sigma.double()
    random = sigma > 0
    scale = torch.where(random, sigma, 1.0)
    residual = (sample.double() - mean.double()) / scale.reshape(-1, 1, 1, 1)
    log_prob = -0.5 * residual.square().mean(dim=(1, 2, 3)) - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(random, log_prob, 0.0)


def philox(key: Tensor, counter: tuple[Tensor | int, ...], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC 2011): four random 32 bit numbers for every counter.

    key: int64 scalar, its low and high half. counter: four, each below 2^32, that broadcast. Returns four int64 tensors.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=key.device) for c in counter))
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(rounds):
        # Products wrap around in int64; their upper and lower 32 bits are right nevertheless.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def draw_noise(state: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers, [B, C, H, W] float32, a function of `state` = (seed, offset, ...) and of the place alone.

    Element i of sample b is number i % 4 of the four that Philox and Box-Muller make from counter
    (i // 4, b, low half of offset, high half).
    """
    size = shape[1:].numel()
    block = torch.arange(-(-size // 4), device=state.device)
    sample = torch.arange(shape[0], device=state.device)[:, None]
    bits = philox(state[0], (block, sample, state[1] & 0xFFFFFFFF, state[1] >> 32 & 0xFFFFFFFF))
    # Centres of 2^23 equal parts of (0, 1), exact in float32, so the logarithm is never infinite.
    u = [((b >> 9).float() + 0.5) * 2**-23 for b in bits]
    radius = [(-2 * x.log()).sqrt() for x in (u[0], u[2])]
    angle = [x * (2 * math.pi) for x in (u[1], u[3])]
    normal = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)]
    return torch.stack(normal, dim=2).flatten(1)[:, :size].reshape(shape)


# On the device. `e` counts a sample's elements in the order of the UNet's output in memory.


@triton.jit
def latent_offset(e, SIZE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where element e of a channels_last output lies in contiguous latents: neighbours share a sector of 32 bytes."""
    if CHANNELS_LAST:
        return (e % CHANNELS) * (SIZE // CHANNELS) + e // CHANNELS
    else:
        return e


@triton.jit
def coefficients(tables, step, steps):
    """coef_sample, coef_output and sigma, float64."""
    coef_sample = tl.load(tables + step).to(tl.float64)
    coef_output = tl.load(tables + steps + step).to(tl.float64)
    return coef_sample, coef_output, tl.load(tables + 2 * steps + step).to(tl.float64)


@triton.jit
def load_guided(output, guidance, sample, samples, e, SIZE: tl.constexpr, GUIDED: tl.constexpr):
    """The guided output and its conditional half, float32; 0 beyond the sample's end."""
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
    output,
    guidance,
    sample,
    samples,
    SIZE: tl.constexpr,
    RESCALE: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o' / o, and what its derivative needs: mean and std of the guided output, mean and std of the conditional half."""
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
    output,
    latents,
    guidance,
    factor,
    coef_sample,
    coef_output,
    sample,
    samples,
    e,
    at,
    SIZE: tl.constexpr,
    RESCALE: tl.constexpr,
    GUIDED: tl.constexpr,
):
    """The mean, float64, and the guided output, float32. at: where the elements lie in a latent."""
    guided, _ = load_guided(output, guidance, sample, samples, e, SIZE, GUIDED)
    scaled = guided.to(tl.float64)
    if RESCALE > 0:
        scaled = factor * scaled
    x = tl.load(latents + sample * SIZE + at, mask=e < SIZE, other=0.0).to(tl.float64)
    return coef_sample * x + coef_output * scaled, guided


@triton.jit
def log_prob_from(total, scale, SIZE: tl.constexpr):
    """float64, from the sum of the squared residuals; for a sigma above 0, which `scale` is."""
    return -0.5 * (total / SIZE) - tl.log(scale) - _LOG_2PI_HALF


@triton.jit
def draw_normal(seed, offset, sample, i):
    """`draw_noise` at elements i of a sample. Four neighbours repeat the same rounds, whatever layout they lie in."""
    block = i // 4
    zero = block * 0
    low = zero + offset.to(tl.int32)
    high = zero + (offset >> 32).to(tl.int32)
    b0, b1, b2, b3 = tl.philox(seed, block, zero + sample.to(tl.int32), low, high)
    first = i % 4 < 2
    u = ((tl.where(first, b0, b2) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    v = ((tl.where(first, b1, b3) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    # cos and sin of 2 pi v: v is taken to within an eighth of a quarter turn, where Taylor's series are short.
    quarter = (4.0 * v + 0.5).to(tl.int32)
    x = (v - quarter.to(tl.float32) * 0.25) * 6.283185307179586
    y = x * x
    sin = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    turned = quarter + i % 2 * 3  # sin is cos a quarter turn earlier
    unsigned = tl.where(turned % 2 == 0, cos, sin)
    sign = tl.where((turned % 4 == 1) | (turned % 4 == 2), -1.0, 1.0)
    return sign * unsigned * tl.sqrt(-2.0 * tl.log(u))
