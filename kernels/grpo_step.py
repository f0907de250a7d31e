"""The update's side: from the UNet's output to the loss, its gradient and the statistics, in one launch.

For N (sample, step) pairs, with the mean and the log-prob of `step_math`:

    A         = (r - mean of its group) / std, clamped                       (Shao et al., arXiv 2402.03300, section 4.1.2)
    log ratio = log_prob - old_log_prob
    RatioNorm   mean((mean - old_mean) * (y - old_mean) / sigma) instead     (Wang et al., arXiv 2510.22319)
    loss      = max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))   (Schulman et al., arXiv 1707.06347, eq. 7)
    kl        = mean((mean - base_mean)^2) / (2 sigma^2)
    total     = sum(weight * (loss + kl_weight * kl))

The gradient of `total` with respect to the output is written at once, in the output's dtype and layout. Every loss depends on
the rest through one number, so with r = (y - mean) / sigma and n = C * H * W elements

    d loss / d mean = -A * ratio * r / (n * sigma) where the clip does not decide        (z for r / sigma with RatioNorm)
    d kl / d mean   = (mean - base_mean) / (n * sigma^2)

and d mean / d output is coef_output times guidance's g and 1 - g. Means, log-probs and gradients are float64 inside; the
log-ratio, ratio and loss of a pair are float32, like the log-probs it is given.

Bytes for an element of a latent, output in half precision: 2 x 2 of the output, 4 of x, 4 of y, 2 x 2 of the gradient,
with a KL term 2 x 2 of the base model's output, with RatioNorm 4 of the old mean.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.kernels.clipped_loss import clip, surrogate
from fastgrpo.kernels.ddim_step import case_name, case_step
from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.group_advantages import advantages_of, check_rewards, count_flat, group_advantage
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.step_math import (
    BLOCK,
    POINTERS,
    as_guidance,
    as_launched,
    as_scalar,
    check_like,
    check_pairs,
    check_step,
    coefficients,
    gaussian_log_prob,
    guide,
    is_channels_last,
    latent_offset,
    launch_options,
    load_guided,
    load_mean,
    load_rescale,
    log_prob_from,
    rescale_factor,
    step_mean,
    tiling,
    working,
)

STATISTICS = (
    "total",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clipped_high",
    "clipped_low",
    "kl_mean",
    "flat_groups",
)
"""What the vector of statistics holds. Clipped pairs and flat groups are counts; the last is 0 when advantages are given."""

_PAIRS_BLOCK = 1024


def _tiling(size: int, kl: bool, ratio_norm: bool, rescale: float) -> tuple[int, int, bool]:
    """(block, num_warps, keep). keep: a program's registers hold the residuals of its sample until the loss is known.

    Larger samples would not fit, nor would what a KL term, RatioNorm or rescaling add: those load all again. RatioNorm also
    takes half as much at a time; where the policy stands still all it sums is 0, so its order need not be `ddim_step`'s.
    """
    block, num_warps = tiling(size, rescale)
    keep = size <= 4 * BLOCK and not (kl or ratio_norm or rescale)
    return min(block, BLOCK // (4 if rescale else 2)) if ratio_norm else block, num_warps, keep


class Inputs(NamedTuple):
    """The tensors that `grpo_step` is given, and says more of; first in the operator's arguments, in this order."""

    output: Tensor
    latents: Tensor
    taken: Tensor
    tables: Tensor
    step: Tensor
    guidance: float | Tensor | None
    old_log_prob: Tensor | None = None
    old_mean: Tensor | None = None
    rewards: Tensor | None = None
    group: Tensor | None = None
    slot: Tensor | None = None
    advantage: Tensor | None = None
    weight: float | Tensor = 1.0
    base_output: Tensor | None = None


class Settings(NamedTuple):
    """How `grpo_step` makes a loss of them; the operator's other arguments, in this order.

    clip_low, clip_high: the ratio's range is 1 - clip_low to 1 + clip_high.
    mode, std_floor, clamp: as of `group_advantages`, for rewards.
    kl_weight: of the KL divergence from the base model, with base_output.
    ratio_norm: take RatioNorm's log-ratio, from old_mean; old_log_prob is then not used.
    rescale: as of `ddim_step`.
    """

    clip_low: float = 1e-4
    clip_high: float = 1e-4
    mode: str = "group"
    std_floor: float = 1e-6
    clamp: float = 2.5
    kl_weight: float = 0.0
    ratio_norm: bool = False
    rescale: float = 0.0


class GrpoStep(NamedTuple):
    """What N pairs came to.

    loss, ratio, kl: [N] float32; loss is the policy's alone, kl is 0 without a base model. clipped: [N] int8, 1 where the
    upper bound decides, -1 where the lower. gradient: of total, like output. statistics: [8] float32, see STATISTICS.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    gradient: Tensor
    statistics: Tensor


# In PyTorch.


def reference(inputs: Inputs, settings: Settings) -> GrpoStep:
    """As `grpo_step`, in PyTorch; all float64 when the output is."""
    output, latents, taken, tables, step, guidance, old_log_prob, old_mean, *_ = inputs
    clip_low, clip_high, *advantage_settings, kl_weight, ratio_norm, rescale = settings
    precision = working(output).dtype
    advantage, flat_groups = inputs.advantage, 0
    if advantage is None:
        table, flat = advantages_of(inputs.rewards, *advantage_settings)
        advantage, flat_groups = table.to(precision)[inputs.group, inputs.slot], flat.sum()
    weight = as_scalar(inputs.weight, output.device).to(precision).expand(len(latents))
    mean = step_mean(output, latents, tables, step, guidance, rescale)
    sigma = tables[2, step].double().expand(len(latents))
    random = sigma > 0
    scale = torch.where(random, sigma, 1.0).reshape(-1, 1, 1, 1)

    if ratio_norm:
        rounded = mean.to(precision).double()
        old = rounded if old_mean is None else old_mean.double()
        direction = (taken.double() - old) / scale
        log_ratio = ((rounded - old) * direction).mean(dim=(1, 2, 3))
        log_ratio = torch.where(random, log_ratio, 0.0).to(precision)
    else:
        direction = (taken.double() - mean) / scale
        log_prob = gaussian_log_prob(taken, mean, sigma).to(precision)
        log_ratio = log_prob - (log_prob if old_log_prob is None else old_log_prob)
    loss, ratio, clipped, slope = surrogate(log_ratio, advantage, clip_low, clip_high)
    # The order and precision of what follows is autograd's for the lines above, to the last bit.
    # Where the clip decides it is 0 also for a ratio that is infinite.
    learns = random & (slope != 0)
    along = torch.where(learns, (weight * slope * ratio).double(), 0.0) / latents[0].numel()
    to_mean = along.reshape(-1, 1, 1, 1) * direction
    to_mean = to_mean.to(precision).double() if ratio_norm else to_mean / scale

    kl = torch.zeros_like(loss)
    if inputs.base_output is not None:
        drift = (mean - step_mean(inputs.base_output, latents, tables, step, guidance, rescale)) / scale
        kl = torch.where(random, 0.5 * drift.square().mean(dim=(1, 2, 3)), 0.0).to(precision)
        along = torch.where(random, (weight * kl_weight).double(), 0.0) / latents[0].numel()
        to_mean = to_mean + along.reshape(-1, 1, 1, 1) * drift / scale
    gradient = _to_output(to_mean * tables[1, step].double().reshape(-1, 1, 1, 1), output, guidance, rescale)
    total = (weight * (loss + kl_weight * kl)).double().sum()
    values = (
        total,
        ratio.double().mean(),
        ratio.min(),
        ratio.max(),
        (clipped > 0).sum(),
        (clipped < 0).sum(),
        kl.mean(),
    )
    statistics = torch.stack([torch.as_tensor(v, device=output.device).to(precision) for v in (*values, flat_groups)])
    return GrpoStep(loss, ratio, clipped, kl, gradient, statistics)


def _to_output(to_scaled: Tensor, output: Tensor, guidance: float | Tensor | None, rescale: float) -> Tensor:
    """Carry a gradient back from the rescaled output, float64, to the UNet's."""
    precision = working(output).dtype
    guided, conditional = guide(output, guidance)
    to_conditional = 0.0
    if rescale:
        o, c = guided.double(), conditional.double()
        to_guided = rescale_factor(guided, conditional, rescale) * to_scaled
        if guided[0].numel() > 1:
            dims = (1, 2, 3)
            std_o, std_c = o.std(dim=dims, keepdim=True), c.std(dim=dims, keepdim=True)
            # d / d factor, of which std(c) / std(o) is a share of `rescale`; a std's gradient is the centred value / std.
            share = rescale * (to_scaled * o).sum(dim=dims, keepdim=True) / (o[0].numel() - 1)
            by_o = torch.where(std_o > 0, share * std_c / std_o**3, 0.0)
            by_c = torch.where((std_o > 0) & (std_c > 0), share / (std_o * std_c), 0.0)
            to_guided = to_guided - by_o * (o - o.mean(dim=dims, keepdim=True))
            to_conditional = (by_c * (c - c.mean(dim=dims, keepdim=True))).to(precision)
        to_guided = to_guided.to(precision)
    else:
        to_guided = to_scaled.to(precision)
    if guidance is None:
        return to_guided.to(output.dtype)
    moved = to_guided * guidance
    return torch.cat([to_guided - moved, moved + to_conditional]).to(output.dtype)


# On the device.


@triton.jit
def load_terms(
    given,
    start,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RESCALE: tl.constexpr,
    GUIDED: tl.constexpr,
    OLD: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of BLOCK elements: what the log-ratio sums, its direction, the drift from the base model, the guided output.

    given: the pointers, and the numbers that hold for all of the sample.
    """
    output, latents, taken, old_mean, base_output, sample, samples = given[:7]
    guidance, factor, base_factor, coef_sample, coef_output, scale = given[7:]
    e = start + tl.arange(0, BLOCK)
    at = latent_offset(e, SIZE, CHANNELS, CHANNELS_LAST)
    mean, guided = load_mean(
        output, latents, guidance, factor, coef_sample, coef_output, sample, samples, e, at, SIZE, RESCALE, GUIDED
    )
    y = tl.load(taken + sample * SIZE + at, mask=e < SIZE, other=0.0).to(tl.float64)
    if OLD == "mean" or OLD == "own_mean":
        rounded = mean.to(tl.float32).to(tl.float64)
        old = rounded
        if OLD == "mean":
            old = tl.load(old_mean + sample * SIZE + at, mask=e < SIZE, other=0.0).to(tl.float64)
        direction = tl.where(e < SIZE, (y - old) / scale, 0.0)
        term = (rounded - old) * direction
    else:
        direction = tl.where(e < SIZE, (y - mean) / scale, 0.0)
        term = direction * direction
    drift = direction
    if KL:
        base, _ = load_mean(
            base_output, latents, guidance, base_factor, coef_sample, coef_output, sample, samples, e, at, SIZE, RESCALE, GUIDED
        )  # fmt: skip
        drift = tl.where(e < SIZE, (mean - base) / scale, 0.0)
    return term, direction, drift, guided


@triton.jit
def store_gradient(
    gradient,
    output,
    guidance,
    along,
    direction,
    along_drift,
    drift,
    coef_output,
    factor,
    by_o,
    mean_o,
    by_c,
    mean_c,
    sample,
    samples,
    start,
    SIZE: tl.constexpr,
    RESCALE: tl.constexpr,
    GUIDED: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = start + tl.arange(0, BLOCK)
    to_mean = along * direction.to(tl.float64)
    if KL:
        to_mean += along_drift * drift.to(tl.float64)
    to_guided = to_mean * coef_output
    if RESCALE > 0:
        o, c = load_guided(output, guidance, sample, samples, e, SIZE, GUIDED)
        to_guided = factor * to_guided - by_o * (o.to(tl.float64) - mean_o)
        to_conditional = (by_c * (c.to(tl.float64) - mean_c)).to(tl.float32)
    to_guided = to_guided.to(tl.float32)
    element: tl.constexpr = gradient.dtype.element_ty
    if GUIDED:
        moved = to_guided * guidance
        tl.store(gradient + sample * SIZE + e, (to_guided - moved).to(element), mask=e < SIZE)
        if RESCALE > 0:
            moved += to_conditional
        tl.store(gradient + (samples + sample) * SIZE + e, moved.to(element), mask=e < SIZE)
    else:
        tl.store(gradient + sample * SIZE + e, to_guided.to(element), mask=e < SIZE)


@triton.jit
def write_statistics(
    statistics, loss, ratio, clipped, kl, weight, pairs, weight_stride, kl_weight, flat, BLOCK_N: tl.constexpr
):
    """Reduce over the pairs, always in the same order. Reads past the cache of its own processor."""
    total = tl.zeros([BLOCK_N], tl.float64)
    ratio_sum = tl.zeros([BLOCK_N], tl.float64)
    kl_sum = tl.zeros([BLOCK_N], tl.float64)
    low = tl.full([BLOCK_N], float("inf"), tl.float32)
    high = tl.full([BLOCK_N], float("-inf"), tl.float32)
    over = tl.zeros([BLOCK_N], tl.int32)
    under = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, pairs, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        inside = i < pairs
        one_loss = tl.load(loss + i, mask=inside, other=0.0, cache_modifier=".cg")
        one_kl = tl.load(kl + i, mask=inside, other=0.0, cache_modifier=".cg")
        one_ratio = tl.load(ratio + i, mask=inside, other=0.0, cache_modifier=".cg")
        one_clipped = tl.load(clipped + i, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
        one_weight = tl.load(weight + i * weight_stride, mask=inside, other=0.0)
        total += (one_weight * (one_loss + kl_weight * one_kl)).to(tl.float64)
        ratio_sum += one_ratio.to(tl.float64)
        kl_sum += one_kl.to(tl.float64)
        low = tl.minimum(low, tl.where(inside, one_ratio, float("inf")))
        high = tl.maximum(high, tl.where(inside, one_ratio, float("-inf")))
        over += (one_clipped > 0).to(tl.int32)
        under += (one_clipped < 0).to(tl.int32)
    tl.store(statistics, tl.sum(total).to(tl.float32))
    tl.store(statistics + 1, (tl.sum(ratio_sum) / pairs).to(tl.float32))
    tl.store(statistics + 2, tl.min(low))
    tl.store(statistics + 3, tl.max(high))
    tl.store(statistics + 4, tl.sum(over).to(tl.float32))
    tl.store(statistics + 5, tl.sum(under).to(tl.float32))
    tl.store(statistics + 6, (tl.sum(kl_sum) / pairs).to(tl.float32))
    tl.store(statistics + 7, flat.to(tl.float32))


@triton.jit
def grpo_step_kernel(
    output,
    latents,
    taken,
    old_log_prob,
    old_mean,
    base_output,
    tables,
    step,
    guidance,
    rewards,
    group,
    slot,
    advantage,
    weight,
    loss,
    ratio,
    clipped,
    kl,
    gradient,
    statistics,
    counter,
    pairs,
    steps,
    groups,
    step_stride,
    weight_stride,
    low,
    high,
    std_floor,
    clamp,
    kl_weight,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RESCALE: tl.constexpr,
    GUIDED: tl.constexpr,
    OLD: tl.constexpr,
    KL: tl.constexpr,
    MODE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a pair; the last to finish reduces the statistics.

    OLD: "log_prob", "own_log_prob" (the ratio is 1, only its gradient matters), "mean" or "own_mean" (RatioNorm).
    MODE: one of MODES, or "given". KEEP: hold the residuals until the loss is known rather than compute them again.
    """
    pair = tl.program_id(0).to(tl.int64)
    coef_sample, coef_output, sigma = coefficients(tables, tl.load(step + pair * step_stride), steps)
    scale = tl.where(sigma > 0, sigma, 1.0)
    g = 1.0
    if GUIDED:
        g = tl.load(guidance)
    factor = 1.0
    base_factor = 1.0
    if RESCALE > 0:
        factor, mean_o, std_o, mean_c, std_c = load_rescale(output, g, pair, pairs, SIZE, RESCALE, GUIDED, BLOCK)
        if KL:
            base_factor, _, _, _, _ = load_rescale(base_output, g, pair, pairs, SIZE, RESCALE, GUIDED, BLOCK)
    given = (output, latents, taken, old_mean, base_output, pair, pairs)
    given = given + (g, factor, base_factor, coef_sample, coef_output, scale)  # noqa: RUF005 (no unpacking in Triton)

    terms = tl.zeros([BLOCK], tl.float64)
    drifts = tl.zeros([BLOCK], tl.float64)
    # What the factor's derivative needs: the direction's and the drift's products with the guided output.
    along_o = tl.zeros([BLOCK], tl.float64)
    drift_o = tl.zeros([BLOCK], tl.float64)
    kept = ()
    if KEEP:
        for start in tl.static_range(0, SIZE, BLOCK):
            term, direction, _drift, _o = load_terms(
                given, start, SIZE, CHANNELS, CHANNELS_LAST, RESCALE, GUIDED, OLD, KL, BLOCK
            )
            terms += term
            kept = kept + (direction.to(tl.float32),)  # noqa: RUF005 (no unpacking in Triton)
    else:
        for start in range(0, SIZE, BLOCK):
            term, direction, drift, o = load_terms(
                given, start, SIZE, CHANNELS, CHANNELS_LAST, RESCALE, GUIDED, OLD, KL, BLOCK
            )
            terms += term
            if KL:
                drifts += drift * drift
            if RESCALE > 0:
                along_o += direction * o.to(tl.float64)
                drift_o += drift * o.to(tl.float64)

    # From here to the gradient, numbers: one of each for the pair.
    if OLD == "mean" or OLD == "own_mean":
        log_ratio = tl.where(sigma > 0, tl.sum(terms) / SIZE, 0.0).to(tl.float32)
    else:
        log_prob = tl.where(sigma > 0, log_prob_from(tl.sum(terms), scale, SIZE), 0.0).to(tl.float32)
        old = log_prob
        if OLD == "log_prob":
            old = tl.load(old_log_prob + pair)
        log_ratio = log_prob - old
    if MODE == "given":
        a = tl.load(advantage + pair).to(tl.float32)
    else:
        a, _ = group_advantage(
            rewards, tl.load(group + pair), tl.load(slot + pair), groups, std_floor, clamp, MODE, GROUP_SIZE, BLOCK_G
        )
        a = a.to(tl.float32)
    pair_loss, pair_ratio, pair_clipped, slope = clip(log_ratio, a, low, high)
    w = tl.load(weight + pair * weight_stride)
    along = (w * slope * pair_ratio).to(tl.float64) / SIZE
    if OLD == "log_prob" or OLD == "own_log_prob":
        along = along / scale
    along = tl.where((sigma > 0) & (slope != 0), along, 0.0)
    pair_kl = 0.0
    along_drift = 0.0
    if KL:
        pair_kl = tl.where(sigma > 0, 0.5 * (tl.sum(drifts) / SIZE), 0.0).to(tl.float32)
        along_drift = tl.where(sigma > 0, (w * kl_weight).to(tl.float64) / SIZE / scale, 0.0)
    mean_o_ = 0.0
    mean_c_ = 0.0
    by_o = 0.0
    by_c = 0.0
    if RESCALE > 0:
        mean_o_ = mean_o
        mean_c_ = mean_c
        share = along * tl.sum(along_o)
        if KL:
            share += along_drift * tl.sum(drift_o)
        share = share * coef_output * RESCALE / max(SIZE - 1, 1)
        safe_o = tl.where(std_o > 0, std_o, 1.0)
        by_o = tl.where(std_o > 0, share * std_c / (safe_o * safe_o * safe_o), 0.0)
        by_c = tl.where((std_o > 0) & (std_c > 0), share / (safe_o * tl.where(std_c > 0, std_c, 1.0)), 0.0)

    if KEEP:
        for chunk in tl.static_range(0, (SIZE + BLOCK - 1) // BLOCK):
            store_gradient(
                gradient, output, g, along, kept[chunk], along_drift, kept[chunk], coef_output, factor, by_o, mean_o_, by_c, mean_c_,
                pair, pairs, chunk * BLOCK, SIZE, RESCALE, GUIDED, KL, BLOCK,
            )  # fmt: skip
    else:
        for start in range(0, SIZE, BLOCK):
            _term, direction, drift, _o = load_terms(
                given, start, SIZE, CHANNELS, CHANNELS_LAST, RESCALE, GUIDED, OLD, KL, BLOCK
            )
            store_gradient(
                gradient, output, g, along, direction, along_drift, drift, coef_output, factor, by_o, mean_o_, by_c, mean_c_,
                pair, pairs, start, SIZE, RESCALE, GUIDED, KL, BLOCK,
            )  # fmt: skip

    tl.store(loss + pair, pair_loss)
    tl.store(ratio + pair, pair_ratio)
    tl.store(clipped + pair, pair_clipped.to(tl.int8))
    tl.store(kl + pair, pair_kl)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == pairs - 1:
        flat = tl.full([], 0, tl.int32)
        if MODE != "given":
            flat = count_flat(rewards, groups, std_floor, MODE, GROUP_SIZE, BLOCK_G)
        write_statistics(statistics, loss, ratio, clipped, kl, weight, pairs, weight_stride, kl_weight, flat, BLOCK_N)
        tl.store(counter, 0)


_COUNTERS: dict[tuple[int | None, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """[1] int32, 0: what programs that are done count. The kernel leaves it at 0, so one serves a whole stream.

    A graph gets its own, cleared at every replay: it may be replayed on a stream where others run.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    if key not in _COUNTERS:
        _COUNTERS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _COUNTERS[key]


def _laid_out_as(gradient: Tensor, output: Tensor) -> Tensor:
    """A copy only where it lies otherwise than what `empty_like` makes."""
    like = torch.empty_like(output, device="meta")
    return gradient if gradient.stride() == like.stride() else torch.empty_like(output).copy_(gradient)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@on_its_device
def _launch_grpo_step(
    output: Tensor,
    latents: Tensor,
    taken: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor | None,
    old_log_prob: Tensor | None,
    old_mean: Tensor | None,
    rewards: Tensor | None,
    group: Tensor | None,
    slot: Tensor | None,
    advantage: Tensor | None,
    weight: Tensor,
    base_output: Tensor | None,
    clip_low: float,
    clip_high: float,
    mode: str,
    std_floor: float,
    clamp: float,
    kl_weight: float,
    ratio_norm: bool,
    rescale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    asked, channels_last = output, is_channels_last(output)
    output, latents, taken = as_launched(output, channels_last), as_launched(latents), as_launched(taken)
    pairs, size = latents.shape[0], latents[0].numel()
    groups, group_size = (1, 2) if rewards is None else rewards.shape
    loss, ratio, kl = (latents.new_empty(pairs) for _ in range(3))
    clipped = torch.empty(pairs, dtype=torch.int8, device=latents.device)
    gradient = torch.empty_like(output)
    statistics = latents.new_empty(len(STATISTICS))
    block, num_warps, keep = _tiling(size, base_output is not None, ratio_norm, rescale)
    old = old_mean if ratio_norm else old_log_prob
    kind = "mean" if ratio_norm else "log_prob"
    grpo_step_kernel[(pairs,)](
        output,
        latents,
        taken,
        None if ratio_norm else _dense(old),
        as_launched(old) if ratio_norm and old is not None else None,
        None if base_output is None else as_launched(base_output, channels_last),
        tables,
        step.contiguous(),
        guidance,
        _dense(rewards),
        _dense(group),
        _dense(slot),
        _dense(advantage),
        weight.contiguous(),
        loss,
        ratio,
        clipped,
        kl,
        gradient,
        statistics,
        _counter(latents.device),
        pairs,
        tables.shape[1],
        groups,
        int(step.numel() > 1),
        int(weight.numel() > 1),
        1 - clip_low,
        1 + clip_high,
        std_floor,
        clamp,
        kl_weight,
        SIZE=size,
        CHANNELS=latents.shape[1],
        CHANNELS_LAST=channels_last,
        RESCALE=rescale,
        GUIDED=guidance is not None,
        OLD=kind if old is not None else f"own_{kind}",
        KL=base_output is not None,
        MODE="given" if rewards is None else mode,
        GROUP_SIZE=group_size,
        BLOCK_G=triton.next_power_of_2(group_size),
        KEEP=keep,
        BLOCK=block,
        BLOCK_N=_PAIRS_BLOCK,
        num_warps=num_warps,
        **launch_options(output.dtype, rescale, num_warps),
    )
    return loss, ratio, clipped, kl, _laid_out_as(gradient, asked), statistics


_grpo_step = torch.library.custom_op("fastgrpo::grpo_step", _launch_grpo_step, mutates_args=(), device_types="cuda")


@_grpo_step.register_kernel("cpu")
def _grpo_step_cpu(*arguments):
    inputs, settings = Inputs(*arguments[: len(Inputs._fields)]), Settings(*arguments[len(Inputs._fields) :])
    outcome = reference(inputs, settings)
    return outcome._replace(gradient=_laid_out_as(outcome.gradient, inputs.output))


@_grpo_step.register_fake
def _grpo_step_fake(output, latents, *_):
    loss, ratio, kl = (latents.new_empty(latents.shape[0]) for _ in range(3))
    clipped = latents.new_empty(latents.shape[0], dtype=torch.int8)
    return loss, ratio, clipped, kl, torch.empty_like(output), latents.new_empty(len(STATISTICS))


def _keep_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[:5])
    ctx.save_for_backward(output[4])


def _scale_gradient(ctx, *by_outputs):
    (gradient,) = ctx.saved_tensors
    return (gradient * by_outputs[-1][0], *[None] * (len(Inputs._fields) + len(Settings._fields) - 1))


_grpo_step.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def grpo_step(
    output: Tensor,
    latents: Tensor,
    taken: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: float | Tensor | None,
    old_log_prob: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    group: Tensor | None = None,
    slot: Tensor | None = None,
    advantage: Tensor | None = None,
    weight: float | Tensor = 1.0,
    base_output: Tensor | None = None,
    old_mean: Tensor | None = None,
    **settings: float | str | bool,
) -> GrpoStep:
    """What N (sample, step) pairs come to: losses, ratios, the gradient of their weighted sum, statistics.

    output, latents, tables, step, guidance: as of `ddim_step`, for N samples. taken: [N, C, H, W] float32, the next latents
        as stored.
    old_log_prob: [N] float32, as `ddim_step` returned it; None is the policy's own, detached: every ratio is 1, and its
        gradient is the policy gradient's.
    rewards: [P, G] float32, finite, G at least 2, with group and slot, [N] int64, of every pair; or advantage, [N] float32.
    weight: of each pair in the total: a number, [1] or [N] float32. For float16 outputs it should hold the loss scale.
    base_output: like output, what the base model said; adds kl_weight times the KL divergence to each loss.
    old_mean: [N, C, H, W] float32, as `ddim_step` returned it, for RatioNorm; None is the policy's own.
    settings: the fields of `Settings`, by name.
    All tensors are on one device. Steps of sigma 0 have log-ratio, KL and gradient 0. Raises ValueError for arguments that
    do not belong together. Only `statistics[0]`, the total, is differentiable, with respect to output.
    """
    chosen = Settings(**settings)
    inputs = Inputs(
        output, latents, taken, tables, step, as_guidance(guidance, output.device), old_log_prob, old_mean,
        rewards, group, slot, advantage, as_scalar(weight, output.device), base_output,
    )  # fmt: skip
    _check(inputs, chosen)
    return GrpoStep(*_grpo_step(*inputs, *chosen))


def _check(inputs: Inputs, settings: Settings) -> None:
    """Raise ValueError, in one sentence, for arguments that do not belong together. Reads no values from the device."""
    output, latents, taken, tables, step, guidance, old_log_prob, old_mean, *_ = inputs
    rewards, weight, base_output = inputs.rewards, inputs.weight, inputs.base_output
    check_step(output, latents, tables, step, guidance, settings.rescale)
    check_like("taken", taken, latents)
    check_like("old_mean", old_mean, latents)
    check_pairs(
        len(latents), old_log_prob=old_log_prob, advantage=inputs.advantage, group=inputs.group, slot=inputs.slot
    )
    if weight.dtype != torch.float32 or weight.shape not in ((1,), (len(latents),)):
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; a number, or float32 [1] or [N], is accepted")
    given = [tensor is not None for tensor in (rewards, inputs.group, inputs.slot)]
    if any(given) == (inputs.advantage is not None) or any(given) != all(given):
        raise ValueError("one of the two is accepted: advantage alone, or all of rewards, group and slot")
    if rewards is not None:
        check_rewards(rewards, settings.mode)
    if base_output is not None and (base_output.shape != output.shape or base_output.dtype != output.dtype):
        raise ValueError(
            f"base_output is {list(base_output.shape)} {base_output.dtype}; "
            f"{list(output.shape)} {output.dtype}, as output, is accepted"
        )
    if old_mean is not None and not settings.ratio_norm:
        raise ValueError("old_mean is given without ratio_norm, which alone uses it")


def grpo_step_loss(output: Tensor, *args, **kwargs) -> tuple[Tensor, GrpoStep]:
    """`grpo_step` as a differentiable loss: the total, a float32 scalar whose backward scales the gradient, and the rest."""
    outcome = grpo_step(output, *args, **kwargs)
    return outcome.statistics[0], outcome


# The operation as tests and benchmarks see it: positional arguments, and of the results those that vary continuously.


def _spec_function(*arguments: Any) -> tuple[Tensor, ...]:
    *step, rewards, group, slot, clip_range = arguments
    outcome = grpo_step(*step, rewards=rewards, group=group, slot=slot, clip_low=clip_range, clip_high=clip_range)
    return outcome.loss, outcome.ratio, outcome.gradient


def _spec_reference(*arguments: Any) -> tuple[Tensor, ...]:
    *step, rewards, group, slot, clip_range = arguments
    inputs = Inputs(*step, rewards=rewards, group=group, slot=slot)
    outcome = reference(inputs, Settings(clip_low=clip_range, clip_high=clip_range))
    return outcome.loss, outcome.ratio, outcome.gradient


def _case(groups: int, group_size: int, shape: tuple[int, int, int], channels_last: bool = False) -> Case:
    pairs = groups * group_size

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        output, latents, tables, step, guidance, noise = case_step(
            pairs, shape, channels_last, device, dtype, generator
        )
        mean = step_mean(output, latents, tables, step, guidance, 0.0)
        sigma = tables[2, step].double()
        taken = (mean + sigma.reshape(-1, 1, 1, 1) * noise).float()
        # Ratios within 5% of 1, none of them near the bounds of 20%, where rounding decides.
        old = gaussian_log_prob(taken, mean, sigma).float() + 0.05 * torch.rand(pairs, generator=generator).to(device)
        rewards = torch.randn(groups, group_size, generator=generator).to(device)
        index = torch.arange(pairs, device=device)
        return (
            output, latents, taken, tables, step, guidance, old, rewards, index // group_size, index % group_size, 0.2,
        )  # fmt: skip

    return Case(case_name(pairs, shape, channels_last), make, pairs * math.prod(shape) * (4 + 4 + 4 + 4))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # The guided output, of up to 50, is rounded three times to float32: 9e-6, times coef_output 0.04 over sigma 0.04 it moves
    # a residual by 1e-5, and the log-prob by that times the mean |residual| of about 1. The gradient is rounded to the
    # output's dtype at the end: half a unit in its last place, a whole one where the device truncates. float16's
    # gradients, of up to 1e-3, may be subnormal: 2^-24 of absolute error.
    return max(2e-5, torch.finfo(dtype).eps), 3e-5 if dtype != torch.float16 else 3e-5 + 2**-24


def _aot(
    name: str,
    old: str = "log_prob",
    kl: bool = False,
    mode: str = "given",
    channels_last: bool = False,
    rescale: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 4 * 64 * 64,
) -> AotKernel:
    """old, mode: OLD and MODE of the kernel."""
    pointers = {
        "output": POINTERS[dtype],
        "latents": "*fp32",
        "taken": "*fp32",
        "old_log_prob": "*fp32" if old == "log_prob" else None,
        "old_mean": "*fp32" if old == "mean" else None,
        "base_output": POINTERS[dtype] if kl else None,
        "tables": "*fp32",
        "step": "*i64",
        "guidance": "*fp32",
        "rewards": None if mode == "given" else "*fp32",
        "group": None if mode == "given" else "*i64",
        "slot": None if mode == "given" else "*i64",
        "advantage": "*fp32" if mode == "given" else None,
        "weight": "*fp32",
        "loss": "*fp32",
        "ratio": "*fp32",
        "clipped": "*i8",
        "kl": "*fp32",
        "gradient": POINTERS[dtype],
        "statistics": "*fp32",
        "counter": "*i32",
    }
    block, num_warps, keep = _tiling(size, kl, old == "mean", rescale)
    constants = {
        "SIZE": size,
        "CHANNELS": 4,
        "CHANNELS_LAST": channels_last,
        "RESCALE": rescale,
        "GUIDED": True,
        "OLD": old,
        "KL": kl,
        "MODE": mode,
        "GROUP_SIZE": 16,
        "BLOCK_G": 16,
        "KEEP": keep,
        "BLOCK": block,
        "BLOCK_N": _PAIRS_BLOCK,
    }
    signature = {name: kind or "constexpr" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("pairs", "steps", "groups", "step_stride", "weight_stride"), "i32")
    signature |= dict.fromkeys(("low", "high", "std_floor", "clamp", "kl_weight"), "fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    absent = {name: None for name, kind in pointers.items() if kind is None}
    options = launch_options(dtype, rescale, num_warps)
    return AotKernel(f"grpo_step{name}", grpo_step_kernel, signature, absent | constants, num_warps, options)


_VARIANTS: dict[str, dict[str, Any]] = {
    "": {"mode": "group"},
    "_given": {},
    "_global": {"mode": "global"},
    "_channels_last": {"mode": "group", "channels_last": True},
    "_kl": {"mode": "group", "kl": True},
    "_rescale": {"rescale": 0.7},
    "_rescale_kl": {"rescale": 0.7, "kl": True},
    "_rescale_kl_channels_last": {"rescale": 0.7, "kl": True, "channels_last": True, "size": 4 * 96 * 96},
    "_4x96x96": {"mode": "group", "size": 4 * 96 * 96},
    "_rescale_4x96x96": {"rescale": 0.7, "size": 4 * 96 * 96},
    "_ratio_norm": {"old": "mean"},
    "_ratio_norm_kl": {"old": "mean", "mode": "group", "kl": True},
    "_ratio_norm_rescale_kl": {"old": "mean", "kl": True, "rescale": 0.7},
    "_ratio_norm_rescale_kl_channels_last": {"old": "mean", "kl": True, "rescale": 0.7, "channels_last": True},
}

SPEC = OpSpec(
    name="grpo_step",
    function=_spec_function,
    reference=_spec_reference,
    cases=(
        _case(2, 3, (4, 5, 7)),
        _case(1, 2, (4, 8, 8), channels_last=True),
        _case(1, 2, (1, 1, 1)),
        _case(1, 2, (3, 83, 67)),
    ),
    bench=(_case(4, 16, (4, 64, 64)), _case(16, 16, (4, 64, 64)), _case(16, 16, (4, 64, 64), channels_last=True)),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    tolerance=_tolerance,
    aot=tuple(
        _aot(name + ("_float32" if dtype == torch.float32 else ""), dtype=dtype, **variant)
        for dtype in (torch.bfloat16, torch.float32)
        for name, variant in _VARIANTS.items()
    ),
)
