"""One denoising step of the rollout: guidance, the DDIM mean, noise, the next latent, and its log-probability.

    mean = coef_sample[step] * x + coef_output[step] * o          (o guided and rescaled as in `step_math`)
    y    = mean + sigma[step] * noise, rounded to float32
    log_prob = log N(y; mean, sigma^2), averaged over C, H, W, of the y that is stored

Both prediction types are linear in the UNet's output, so the tables are all there is to know of the schedule.
The step and the guidance are read on the device: one CUDA graph serves every step. Noise is given, or drawn by Philox
from a state on the device which the kernel itself advances, so that a replayed graph draws fresh numbers.

Bytes for an element of a latent, output in half precision: 2 x 2 of the output, 4 of x, 4 of noise when given, 4 of y.
"""

import math

import torch
from torch import Tensor

from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.step_math import (
    POINTERS,
    as_guidance,
    as_launched,
    check_like,
    check_step,
    coefficients,
    draw_noise,
    draw_normal,
    gaussian_log_prob,
    is_channels_last,
    latent_offset,
    launch_options,
    load_mean,
    load_rescale,
    log_prob_from,
    step_mean,
    tiling,
    working,
)


def noise_state(seed: int, device: torch.device | str) -> Tensor:
    """What noise is drawn from: [3] int64 on the device, (seed, offset, programs that are done with this offset).

    Every call of `ddim_step` draws at `offset` and moves it on by 1. One state must not serve two streams at once.
    """
    return torch.tensor([seed, 0, 0], dtype=torch.int64, device=device)


def reference(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: float | Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rescale: float,
    keep_mean: bool,
) -> tuple[Tensor, ...]:
    """As `ddim_step`, in PyTorch; all float64 when `output` is."""
    if noise is None:
        noise = draw_noise(seed, latents.shape)
        seed[1] += 1
    mean = step_mean(output, latents, tables, step, guidance, rescale)
    sigma = tables[2, step].double()
    precision = working(output).dtype
    following = (mean + sigma.reshape(-1, 1, 1, 1) * noise.double()).to(precision)
    results = (following, gaussian_log_prob(following, mean, sigma).to(precision))
    return (*results, mean.to(precision)) if keep_mean else results


@triton.jit
def ddim_step_kernel(
    output,
    latents,
    noise,
    state,
    tables,
    step,
    guidance,
    following,
    log_prob,
    means,
    samples,
    steps,
    step_stride,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RESCALE: tl.constexpr,
    GUIDED: tl.constexpr,
    NOISE: tl.constexpr,
    KEEP_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sample. NOISE: "given", "drawn", or "taken", where `noise` is the next latent itself."""
    sample = tl.program_id(0).to(tl.int64)
    coef_sample, coef_output, sigma = coefficients(tables, tl.load(step + sample * step_stride), steps)
    scale = tl.where(sigma > 0, sigma, 1.0)
    g = 1.0
    if GUIDED:
        g = tl.load(guidance)
    seed = 0
    offset = 0
    if NOISE == "drawn":
        seed = tl.load(state)
        offset = tl.load(state + 1)
    factor = 1.0
    if RESCALE > 0:
        factor, _, _, _, _ = load_rescale(output, g, sample, samples, SIZE, RESCALE, GUIDED, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, SIZE, BLOCK):
        e = start + tl.arange(0, BLOCK)
        inside = e < SIZE
        at = latent_offset(e, SIZE, CHANNELS, CHANNELS_LAST)
        mean, _guided = load_mean(
            output, latents, g, factor, coef_sample, coef_output, sample, samples, e, at, SIZE, RESCALE, GUIDED
        )
        if NOISE == "taken":
            y = tl.load(noise + sample * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        else:
            if NOISE == "drawn":
                z = draw_normal(seed, offset, sample, at)
            else:
                z = tl.load(noise + sample * SIZE + at, mask=inside, other=0.0).to(tl.float32)
            y = (mean + sigma * z.to(tl.float64)).to(tl.float32)
            tl.store(following + sample * SIZE + at, y, mask=inside)
        if KEEP_MEAN:
            tl.store(means + sample * SIZE + at, mean.to(tl.float32), mask=inside)
        # Of the value as stored: rounded first, then compared with the mean.
        residual = tl.where(inside, (y.to(tl.float64) - mean) / scale, 0.0)
        squares += residual * residual
    value = log_prob_from(tl.sum(squares), scale, SIZE)
    tl.store(log_prob + sample, tl.where(sigma > 0, value, 0.0).to(tl.float32))
    if NOISE == "drawn":
        # The last to have read the offset moves it on.
        done = tl.atomic_add(state + 2, 1, sem="acq_rel")
        if done == samples - 1:
            tl.store(state + 1, offset + 1)
            tl.store(state + 2, 0)


def _launch(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
    state: Tensor | None,
    taken: Tensor | None,
    rescale: float,
    keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for all three ways: noise given, drawn from `state`, or the next latent known."""
    channels_last = is_channels_last(output)
    output, latents = as_launched(output, channels_last), as_launched(latents)
    samples, size = latents.shape[0], latents[0].numel()
    nothing = latents.new_empty(0)
    following = nothing if taken is not None else torch.empty_like(latents)
    means = torch.empty_like(latents) if keep_mean else nothing
    log_prob = latents.new_empty(samples)
    given = taken if taken is not None else noise
    block, num_warps = tiling(size, rescale)
    ddim_step_kernel[(samples,)](
        output,
        latents,
        None if given is None else as_launched(given),
        state,
        tables,
        step.contiguous(),
        guidance,
        following,
        log_prob,
        means,
        samples,
        tables.shape[1],
        int(step.numel() > 1),
        SIZE=size,
        CHANNELS=latents.shape[1],
        CHANNELS_LAST=channels_last,
        RESCALE=rescale,
        GUIDED=guidance is not None,
        NOISE="taken" if taken is not None else "drawn" if noise is None else "given",
        KEEP_MEAN=keep_mean,
        BLOCK=block,
        num_warps=num_warps,
        **launch_options(output.dtype, rescale, num_warps),
    )
    return following, log_prob, means


@on_its_device
def _launch_ddim_step(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
    state: Tensor | None,
    rescale: float,
    keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(output, latents, tables, step, guidance, noise, state, None, rescale, keep_mean)


@on_its_device
def _launch_log_prob(
    output: Tensor,
    latents: Tensor,
    taken: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor | None,
    rescale: float,
    keep_mean: bool,
) -> tuple[Tensor, Tensor]:
    return _launch(output, latents, tables, step, guidance, None, None, taken, rescale, keep_mean)[1:]


_ddim_step = torch.library.custom_op(
    "fastgrpo::ddim_step", _launch_ddim_step, mutates_args=("state",), device_types="cuda"
)
_log_prob = torch.library.custom_op("fastgrpo::log_prob", _launch_log_prob, mutates_args=(), device_types="cuda")


@_ddim_step.register_kernel("cpu")
def _ddim_step_cpu(output, latents, *arguments):
    following, log_prob, *means = reference(output, latents, *arguments)
    return following.contiguous(), log_prob, means[0].contiguous() if means else latents.new_empty(0)


@_ddim_step.register_fake
def _ddim_step_fake(output, latents, *arguments):
    return latents.new_empty(latents.shape), *_log_prob_fake(output, latents, *arguments)


@_log_prob.register_kernel("cpu")
def _log_prob_cpu(output, latents, taken, tables, step, guidance, rescale, keep_mean):
    mean = step_mean(output, latents, tables, step, guidance, rescale)
    log_prob = gaussian_log_prob(taken, mean, tables[2, step]).float()
    return log_prob, mean.float().contiguous() if keep_mean else latents.new_empty(0)


@_log_prob.register_fake
def _log_prob_fake(output, latents, *arguments):
    keep_mean = arguments[-1]
    return latents.new_empty(latents.shape[0]), latents.new_empty(latents.shape if keep_mean else 0)


def ddim_step(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: float | Tensor | None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    rescale: float = 0.0,
    keep_mean: bool = False,
) -> tuple[Tensor, ...]:
    """Take one denoising step of B samples.

    output: what the UNet said, float32, bfloat16 or float16, contiguous or channels_last (others are copied):
        [2B, C, H, W], without and with the prompt, or [B, C, H, W] when guidance is None or the number 1.
    latents: [B, C, H, W] float32. tables: [3, T] float32: coef_sample, coef_output, sigma.
    step: [1] or [B] int64, position in the tables, which is not checked. guidance: a number, or [1] float32.
    noise: [B, C, H, W] float32; without it noise is drawn from `seed`, a `noise_state`, which moves on.
    rescale: phi of arXiv 2305.08891, 0 to 1. All tensors are on one device.
    Returns the next latents [B, C, H, W] float32, the log-prob [B] float32 of exactly those (0 where sigma is 0), and with
    keep_mean the mean [B, C, H, W] float32. Not differentiable. Raises ValueError for arguments that do not belong together.
    """
    guidance = as_guidance(guidance, output.device)
    check_step(output, latents, tables, step, guidance, rescale)
    if (noise is None) == (seed is None):
        raise ValueError("noise and seed are both given or both missing; one of them is accepted")
    check_like("noise", noise, latents)
    if seed is not None and (seed.shape != (3,) or seed.dtype != torch.int64 or not seed.is_contiguous()):
        raise ValueError(f"seed is {list(seed.shape)} {seed.dtype}; what noise_state returns is accepted")
    results = _ddim_step(output, latents, tables, step, guidance, noise, seed, rescale, keep_mean)
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
    """Log-prob [B] float32 of the step from `latents` to `taken`, and with keep_mean its mean [B, C, H, W] float32.

    Arguments as of `ddim_step`, whose log-prob this is bit for bit. taken: [B, C, H, W] float32. Not differentiable.
    """
    guidance = as_guidance(guidance, output.device)
    check_step(output, latents, tables, step, guidance, rescale)
    check_like("taken", taken, latents)
    results = _log_prob(output, latents, taken, tables, step, guidance, rescale, keep_mean)
    return results if keep_mean else results[0]


def case_name(samples: int, shape: tuple[int, int, int], channels_last: bool) -> str:
    return f"{samples}x{'x'.join(map(str, shape))}{'-channels-last' if channels_last else ''}"


def case_step(
    samples: int,
    shape: tuple[int, int, int],
    channels_last: bool,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """The first six arguments of `ddim_step`, drawn for a Case."""
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
        return *case_step(samples, shape, channels_last, device, dtype, generator), None, 0.0, keep_mean

    return Case(case_name(samples, shape, channels_last), make, samples * math.prod(shape) * (4 + 4 + 4 + 4))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # Halves enter exactly. The guided output, of up to |u| + 5 |c - u| < 50, is rounded three times to float32 (3 * 50 *
    # 2^-24 = 9e-6), times coef_output 0.04. y is rounded once, by 2^-24 of up to 8. The log-prob moves by the mean of
    # residual * error / sigma: at most 4e-7 + 5e-7 over sigma 0.04, so 2e-5, and by its own rounding.
    return 1e-6, 3e-5


def _aot(
    noise: str,
    channels_last: bool = False,
    rescale: float = 0.0,
    keep_mean: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 4 * 64 * 64,
) -> AotKernel:
    """Named by what it differs in from SD 1.x's rollout. noise: how it is got, NOISE of the kernel."""
    block, num_warps = tiling(size, rescale)
    constants = {
        "SIZE": size,
        "CHANNELS": 4,
        "CHANNELS_LAST": channels_last,
        "RESCALE": rescale,
        "GUIDED": True,
        "NOISE": noise,
        "KEEP_MEAN": keep_mean,
        "BLOCK": block,
    }
    absent = "noise" if noise == "drawn" else "state"
    signature = {"output": POINTERS[dtype], "latents": "*fp32", "noise": "*fp32", "state": "*i64", "tables": "*fp32"}
    signature |= {"step": "*i64"} | dict.fromkeys(("guidance", "following", "log_prob", "means"), "*fp32")
    signature |= dict.fromkeys(("samples", "steps", "step_stride"), "i32")
    signature |= dict.fromkeys((absent, *constants), "constexpr")
    differs = {"channels_last": channels_last, "rescale": rescale, "mean": keep_mean, "float32": dtype == torch.float32}
    differs[str(size)] = size != 4 * 64 * 64
    return AotKernel(
        name="_".join(["ddim_step", noise, *(name for name, so in differs.items() if so)]),
        kernel=ddim_step_kernel,
        signature=signature,
        constants={absent: None} | constants,
        num_warps=num_warps,
        options=launch_options(dtype, rescale, num_warps),
    )


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
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    tolerance=_tolerance,
    aot=(
        *(
            _aot(noise, channels_last, rescale, dtype=dtype)
            for noise in ("given", "drawn", "taken")
            for channels_last, rescale in ((False, 0.0), (True, 0.0), (False, 0.7))
            for dtype in (torch.bfloat16, torch.float32)
        ),
        _aot("given", rescale=0.7, size=4 * 96 * 96),
        _aot("drawn", rescale=0.7, keep_mean=True, size=4 * 96 * 96),
        _aot("drawn", keep_mean=True, dtype=torch.float32),
        _aot("taken", keep_mean=True),
        _aot("taken", keep_mean=True, dtype=torch.float32),
        _aot("taken", rescale=0.7, keep_mean=True, dtype=torch.float32),
    ),
)
