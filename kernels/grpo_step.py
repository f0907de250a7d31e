"""The update's side: from the UNet's output to the loss and its gradient, in one launch.

For N (sample, step) pairs, with the mean and the log-prob of `step_math`:

    A         = (r - mean of its group) / std, clamped                    (Shao et al., arXiv 2402.03300, sec. 4.1.2)
    log ratio = log_prob - old_log_prob
    RatioNorm   mean((mean - old_mean) * (y - old_mean) / sigma) instead  (Wang et al., arXiv 2510.22319)
    loss      = max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high))      (Schulman et al., arXiv 1707.06347, eq. 7)
    kl        = mean((mean - base_mean)^2) / (2 sigma^2)
    total     = sum(weight * (loss + kl_weight * kl))

The gradient of `total` with respect to the output is written at once, in the output's dtype and layout. Every loss
depends on the rest through one number, so with r = (y - mean) / sigma and n = C * H * W elements

    d loss / d mean = -A * ratio * r / (n * sigma) where the clip does not decide       (z for r / sigma with RatioNorm)
    d kl / d mean   = (mean - base_mean) / (n * sigma^2)

and d mean / d output is coef_output times guidance's g and 1 - g. Means, log-probs, advantages and gradients are
float64 inside; the advantage, log-ratio, ratio and loss of a pair are float32, like the log-probs it is given.
Bytes for an element of a latent, output in half precision: 2 x 2 of the output, 4 of x, 4 of y, 2 x 2 of the gradient,
with a KL term 2 x 2 of the base model's output, with RatioNorm 4 of the old mean.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.kernels.group_advantages import advantages_of, check_rewards, group_advantage
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import on_its_device
from fastgrpo.kernels.step_math import (
    BLOCK,
    as_guidance,
    as_launched,
    as_scalar,
    check_like,
    check_pairs,
    check_step,
    gaussian_log_prob,
    guide,
    is_channels_last,
    latent_offset,
    load_guided,
    load_mean,
    load_rescale,
    load_step,
    log_prob_from,
    rescale_factor,
    step_mean,
    tiling,
    working_dtype,
)


class GrpoStepArguments(NamedTuple):
    """The operator's arguments, in its order; `grpo_step` describes them."""

    output: Tensor
    latents: Tensor
    taken: Tensor
    tables: Tensor
    step: Tensor
    guidance: Tensor | None
    old_log_prob: Tensor | None
    rewards: Tensor | None
    group: Tensor | None
    reward: Tensor | None
    advantage: Tensor | None
    weight: Tensor
    base_output: Tensor | None
    old_mean: Tensor | None
    mode: str
    std_floor: float
    clamp: float
    clip_low: float
    clip_high: float
    kl_weight: Tensor
    ratio_norm: bool
    rescale: float


class GrpoStep(NamedTuple):
    """The results for N pairs.

    loss, ratio, kl: [N] float32; loss is the policy's alone, kl is 0 without a base model. clipped: [N] int8, 1 where
    the upper bound decides, -1 where the lower. gradient: of total, like output.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    gradient: Tensor


def clipped_loss(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the clipped loss, the ratio, clipped int8, and d loss / d ratio: [N] each."""
    low, high = 1 - clip_low, 1 + clip_high
    ratio = torch.exp(log_ratio)
    free = torch.where(advantage == 0, -advantage, -advantage * ratio)  # 0 also where the ratio is infinite
    bounded = -advantage * ratio.clamp(low, high)
    decides = bounded > free
    clipped = decides.to(torch.int8) * torch.where(ratio > 1, 1, -1).to(torch.int8)
    # Where both are equal they share the gradient: half of it is lost if the ratio is out of bounds all the same.
    shared = torch.where(free == bounded, 0.5, 0.0)
    inside = (ratio >= low) & (ratio <= high)
    slope = -advantage * torch.where(decides, 0.0, 1 - shared + torch.where(inside, shared, 0.0))
    return torch.maximum(free, bounded), ratio, clipped, slope


def reference(a: GrpoStepArguments) -> GrpoStep:
    """Computes `grpo_step` in PyTorch; in float64 when the output is."""
    latents, tables, step, guidance, rescale = a.latents, a.tables, a.step, a.guidance, a.rescale
    precision = working_dtype(a.output)
    weight = a.weight.to(precision).expand(len(latents))
    mean = step_mean(a.output, latents, tables, step, guidance, rescale)
    sigma = tables[2, step].double().expand(len(latents))
    random = sigma > 0
    scale = torch.where(random, sigma, 1.0).reshape(-1, 1, 1, 1)

    if a.ratio_norm:
        rounded = mean.to(precision).double()
        old = rounded if a.old_mean is None else a.old_mean.double()
        direction = (a.taken.double() - old) / scale
        log_ratio = ((rounded - old) * direction).mean(dim=(1, 2, 3))
        log_ratio = torch.where(random, log_ratio, 0.0).to(precision)
    else:
        direction = (a.taken.double() - mean) / scale
        log_prob = gaussian_log_prob(a.taken, mean, sigma).to(precision)
        log_ratio = log_prob - (log_prob if a.old_log_prob is None else a.old_log_prob)
    loss, ratio, clipped, slope = clipped_loss(log_ratio, _advantage(a, precision), a.clip_low, a.clip_high)
    # The order and precision of what follows is autograd's for the lines above, to the last bit.
    # Where the clip decides it is 0 also for a ratio that is infinite.
    learns = random & (slope != 0)
    along = torch.where(learns, (weight * slope * ratio).double(), 0.0) / latents[0].numel()
    to_mean = along.reshape(-1, 1, 1, 1) * direction
    to_mean = to_mean.to(precision).double() if a.ratio_norm else to_mean / scale

    kl = torch.zeros_like(loss)
    if a.base_output is not None:
        drift = (mean - step_mean(a.base_output, latents, tables, step, guidance, rescale)) / scale
        kl = torch.where(random, 0.5 * drift.square().mean(dim=(1, 2, 3)), 0.0).to(precision)
        along = torch.where(random, (weight * a.kl_weight.to(precision)).double(), 0.0) / latents[0].numel()
        to_mean = to_mean + along.reshape(-1, 1, 1, 1) * drift / scale
    gradient = _to_output(to_mean * tables[1, step].double().reshape(-1, 1, 1, 1), a.output, guidance, rescale)
    return GrpoStep(loss, ratio, clipped, kl, gradient)


def _advantage(a: GrpoStepArguments, precision: torch.dtype) -> Tensor:
    """Returns the pairs' advantages [N], given or from the rewards of all groups."""
    if a.advantage is not None:
        return a.advantage
    assert a.rewards is not None
    assert a.group is not None
    assert a.reward is not None
    return advantages_of(a.rewards, a.mode, a.std_floor, a.clamp, (a.group, a.reward))[0].to(precision)


def _to_output(to_scaled: Tensor, output: Tensor, guidance: Tensor | None, rescale: float) -> Tensor:
    """Carries a gradient back from the rescaled output, float64, to the UNet's."""
    precision = working_dtype(output)
    guided, conditional = guide(output, guidance)
    to_guided = to_scaled
    to_conditional: float | Tensor = 0.0
    if rescale:
        o, c = guided.double(), conditional.double()
        to_guided = rescale_factor(guided, conditional, rescale) * to_scaled
        if guided[0].numel() > 1:
            dims = (1, 2, 3)
            std_o, std_c = o.std(dim=dims, keepdim=True), c.std(dim=dims, keepdim=True)
            # d / d factor, of which std(c) / std(o) is a share of `rescale`; a std's gradient is centred value / std.
            share = rescale * (to_scaled * o).sum(dim=dims, keepdim=True) / (o[0].numel() - 1)
            by_o = torch.where(std_o > 0, share * std_c / std_o**3, 0.0)
            by_c = torch.where((std_o > 0) & (std_c > 0), share / (std_o * std_c), 0.0)
            to_guided = to_guided - by_o * (o - o.mean(dim=dims, keepdim=True))
            to_conditional = (by_c * (c - c.mean(dim=dims, keepdim=True))).to(precision)
    to_guided = to_guided.to(precision)
    if guidance is None:
        return to_guided.to(output.dtype)
    moved = to_guided * guidance
    return torch.cat([to_guided - moved, moved + to_conditional]).to(output.dtype)


@triton.jit
def clip_pair(log_ratio, advantage, low, high):
    """Computes `clipped_loss` of one pair: loss, ratio, which bound decides, and d loss / d ratio; float32."""
    # In float64, since exp's float32 version is an approximation.
    ratio = tl.exp(log_ratio.to(tl.float64)).to(tl.float32)
    within = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    free = tl.where(advantage == 0, -advantage, -advantage * ratio)
    bounded = -advantage * within
    decides = bounded > free
    clipped = tl.where(decides, tl.where(ratio > 1, 1, -1), 0)
    share = tl.where(free == bounded, 0.5, 0.0)
    share = 1 - share + tl.where((ratio >= low) & (ratio <= high), share, 0.0)
    return tl.where(decides, bounded, free), ratio, clipped, tl.where(decides, 0.0, -advantage * share)


@triton.jit
def load_terms(
    given, start,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESCALE: tl.constexpr,
    GUIDED: tl.constexpr, OLD: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loads BLOCK elements: what the log-ratio sums, its direction, the drift from the base model, the guided output.

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
            base_output, latents, guidance, base_factor, coef_sample, coef_output, sample, samples, e, at,
            SIZE, RESCALE, GUIDED,
        )  # fmt: skip
        drift = tl.where(e < SIZE, (mean - base) / scale, 0.0)
    return term, direction, drift, guided


@triton.jit
def store_gradient(
    gradient, output, guidance, pair, pairs, coef_output, along, direction, along_drift, drift, rescaling, start,
    SIZE: tl.constexpr, RESCALE: tl.constexpr, GUIDED: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK elements of the gradient, in the order of the output in memory.

    rescaling: o' / o; the shares of the guided output and of its conditional half in its gradient, and their means.
    """
    factor, by_o, mean_o, by_c, mean_c = rescaling
    e = start + tl.arange(0, BLOCK)
    to_mean = along * direction.to(tl.float64)
    if KL:
        to_mean += along_drift * drift.to(tl.float64)
    to_guided = to_mean * coef_output
    if RESCALE > 0:
        o, c = load_guided(output, guidance, pair, pairs, e, SIZE, GUIDED)
        to_guided = factor * to_guided - by_o * (o.to(tl.float64) - mean_o)
        to_conditional = (by_c * (c.to(tl.float64) - mean_c)).to(tl.float32)
    to_guided = to_guided.to(tl.float32)
    element: tl.constexpr = gradient.dtype.element_ty
    if GUIDED:
        moved = to_guided * guidance
        tl.store(gradient + pair * SIZE + e, (to_guided - moved).to(element), mask=e < SIZE)
        if RESCALE > 0:
            moved += to_conditional
        tl.store(gradient + (pairs + pair) * SIZE + e, moved.to(element), mask=e < SIZE)
    else:
        tl.store(gradient + pair * SIZE + e, to_guided.to(element), mask=e < SIZE)


@triton.jit
def grpo_step_kernel(
    output, latents, taken, old_log_prob, old_mean, base_output, tables, step, guidance,
    rewards, group, reward, advantage, weight, loss, ratio, clipped, kl, gradient,
    pairs, steps, groups, step_stride, weight_stride, kl_stride, low, high, std_floor, clamp, kl_weight,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESCALE: tl.constexpr,
    GUIDED: tl.constexpr, OLD: tl.constexpr, KL: tl.constexpr, MODE: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a pair.

    OLD: "log_prob", "own_log_prob" (the ratio is 1, only its gradient matters), "mean" or "own_mean" (RatioNorm).
    MODE: one of MODES, or "given". KEEP: hold the residuals until the loss is known rather than compute them again.
    """
    pair = tl.program_id(0).to(tl.int64)
    coef_sample, coef_output, sigma, scale, g = load_step(tables, step, guidance, pair, step_stride, steps, GUIDED)
    factor = 1.0
    base_factor = 1.0
    if RESCALE > 0:
        factor, mean_o, std_o, mean_c, std_c = load_rescale(output, g, pair, pairs, SIZE, RESCALE, GUIDED, BLOCK)
        if KL:
            base_factor, _, _, _, _ = load_rescale(base_output, g, pair, pairs, SIZE, RESCALE, GUIDED, BLOCK)
    given = (
        output, latents, taken, old_mean, base_output, pair, pairs,
        g, factor, base_factor, coef_sample, coef_output, scale,
    )  # fmt: skip

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
            # Triton unrolls the loop and takes the longer tuple for another variable; it knows no unpacking.
            kept = kept + (direction.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
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
            rewards, tl.load(group + pair), tl.load(reward + pair), groups, std_floor, clamp, MODE, GROUP_SIZE, BLOCK_G
        )
        a = a.to(tl.float32)
    pair_loss, pair_ratio, pair_clipped, slope = clip_pair(log_ratio, a, low, high)
    w = tl.load(weight + pair * weight_stride)
    along = (w * slope * pair_ratio).to(tl.float64) / SIZE
    if OLD == "log_prob" or OLD == "own_log_prob":
        along = along / scale
    along = tl.where((sigma > 0) & (slope != 0), along, 0.0)
    pair_kl = 0.0
    along_drift = 0.0
    if KL:
        pair_kl = tl.where(sigma > 0, 0.5 * (tl.sum(drifts) / SIZE), 0.0).to(tl.float32)
        along_drift = tl.where(
            sigma > 0, (w * tl.load(kl_weight + pair * kl_stride)).to(tl.float64) / SIZE / scale, 0.0
        )
    tl.store(loss + pair, pair_loss)
    tl.store(ratio + pair, pair_ratio)
    tl.store(clipped + pair, pair_clipped.to(tl.int8))
    tl.store(kl + pair, pair_kl)
    rescaling = (1.0, 0.0, 0.0, 0.0, 0.0)
    if RESCALE > 0:
        share = along * tl.sum(along_o)
        if KL:
            share += along_drift * tl.sum(drift_o)
        share = share * coef_output * RESCALE / max(SIZE - 1, 1)
        safe_o = tl.where(std_o > 0, std_o, 1.0)
        by_o = tl.where(std_o > 0, share * std_c / (safe_o * safe_o * safe_o), 0.0)
        by_c = tl.where((std_o > 0) & (std_c > 0), share / (safe_o * tl.where(std_c > 0, std_c, 1.0)), 0.0)
        rescaling = (factor, by_o, mean_o, by_c, mean_c)

    if KEEP:
        for chunk in tl.static_range(0, (SIZE + BLOCK - 1) // BLOCK):
            store_gradient(
                gradient, output, g, pair, pairs, coef_output, along, kept[chunk], along_drift, kept[chunk], rescaling,
                chunk * BLOCK, SIZE, RESCALE, GUIDED, KL, BLOCK,
            )  # fmt: skip
    else:
        for start in range(0, SIZE, BLOCK):
            _term, direction, drift, _o = load_terms(
                given, start, SIZE, CHANNELS, CHANNELS_LAST, RESCALE, GUIDED, OLD, KL, BLOCK
            )
            store_gradient(
                gradient, output, g, pair, pairs, coef_output, along, direction, along_drift, drift, rescaling,
                start, SIZE, RESCALE, GUIDED, KL, BLOCK,
            )  # fmt: skip


def grpo_tiling(
    size: int, dtype: torch.dtype, guided: bool, kl: bool, ratio_norm: bool, rescale: float
) -> tuple[int, bool, int, dict[str, Any]]:
    """Returns what `tiling` does, and after the block `keep`: hold a sample's residuals until the loss is known.

    Larger samples would not fit, nor what a KL term, RatioNorm or rescaling add, nor a float32 output without guidance,
    which the compiler would load at once: they are loaded again. RatioNorm also takes half as much at a time: while the
    policy stands still all it sums is 0, so its order need not be `ddim_step`'s.
    """
    block, num_warps, options = tiling(size, dtype, rescale)
    keep = size <= 4 * BLOCK and not (kl or ratio_norm or rescale) and (guided or dtype != torch.float32)
    if ratio_norm:
        block = min(block, BLOCK // (4 if rescale else 2))
    return block, keep, num_warps, options


def _laid_out_as(gradient: Tensor, output: Tensor) -> Tensor:
    """Returns the gradient, copied only where it lies otherwise in memory than what `empty_like(output)` makes."""
    like = torch.empty_like(output, device="meta")
    return gradient if gradient.stride() == like.stride() else torch.empty_like(output).copy_(gradient)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@on_its_device
def _launch_grpo_step(*arguments: Any) -> GrpoStep:
    """arguments: those of `GrpoStepArguments`, in its order."""
    a = GrpoStepArguments(*arguments)
    channels_last = is_channels_last(a.output)
    output, latents, taken = as_launched(a.output, channels_last), as_launched(a.latents), as_launched(a.taken)
    pairs, size = latents.shape[0], latents[0].numel()
    groups, group_size = (1, 2) if a.rewards is None else a.rewards.shape
    loss, ratio, kl = (latents.new_empty(pairs) for _ in range(3))
    clipped = torch.empty(pairs, dtype=torch.int8, device=latents.device)
    gradient = torch.empty_like(output)
    guided, kl_term = a.guidance is not None, a.base_output is not None
    block, keep, num_warps, options = grpo_tiling(size, output.dtype, guided, kl_term, a.ratio_norm, a.rescale)
    old = a.old_mean if a.ratio_norm else a.old_log_prob
    kind = "mean" if a.ratio_norm else "log_prob"
    grpo_step_kernel[(pairs,)](
        output, latents, taken,
        None if a.ratio_norm else _dense(old),
        as_launched(old) if a.ratio_norm and old is not None else None,
        None if a.base_output is None else as_launched(a.base_output, channels_last),
        a.tables, a.step.contiguous(), a.guidance,
        _dense(a.rewards), _dense(a.group), _dense(a.reward), _dense(a.advantage), a.weight.contiguous(),
        loss, ratio, clipped, kl, gradient,
        pairs, a.tables.shape[1], groups,
        int(a.step.numel() > 1), int(a.weight.numel() > 1), int(a.kl_weight.numel() > 1),
        1 - a.clip_low, 1 + a.clip_high, a.std_floor, a.clamp, a.kl_weight.contiguous(),
        SIZE=size, CHANNELS=latents.shape[1], CHANNELS_LAST=channels_last, RESCALE=a.rescale,
        GUIDED=guided, OLD=kind if old is not None else f"own_{kind}", KL=kl_term,
        MODE="given" if a.rewards is None else a.mode,
        GROUP_SIZE=group_size, BLOCK_G=triton.next_power_of_2(group_size), KEEP=keep, BLOCK=block,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return GrpoStep(loss, ratio, clipped, kl, _laid_out_as(gradient, a.output))


_grpo_step = torch.library.custom_op(
    "fastgrpo::grpo_step",
    _launch_grpo_step,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor output, Tensor latents, Tensor taken, Tensor tables, Tensor step, Tensor? guidance, "
    "Tensor? old_log_prob, Tensor? rewards, Tensor? group, Tensor? reward, Tensor? advantage, Tensor weight, "
    "Tensor? base_output, Tensor? old_mean, str mode, float std_floor, float clamp, float clip_low, float clip_high, "
    "Tensor kl_weight, bool ratio_norm, float rescale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_grpo_step.register_kernel("cpu")
def _grpo_step_cpu(*arguments: Any) -> GrpoStep:
    results = reference(GrpoStepArguments(*arguments))
    return results._replace(gradient=_laid_out_as(results.gradient, arguments[0]))


@_grpo_step.register_fake
def _grpo_step_fake(output: Tensor, latents: Tensor, *_: Any) -> tuple[Tensor, ...]:
    loss, ratio, kl = (latents.new_empty(latents.shape[0]) for _ in range(3))
    return loss, ratio, latents.new_empty(latents.shape[0], dtype=torch.int8), kl, torch.empty_like(output)


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
    reward: Tensor | None = None,
    mode: str = "group",
    std_floor: float = 1e-6,
    clamp: float = 2.5,
    advantage: Tensor | None = None,
    weight: float | Tensor = 1.0,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    base_output: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    ratio_norm: bool = False,
    old_mean: Tensor | None = None,
    rescale: float = 0.0,
) -> GrpoStep:
    """Computes losses and ratios of N (sample, step) pairs, and the gradient of the weighted sum of the losses.

    output, latents, tables, step, guidance, rescale: as of `ddim_step`, for N samples.
    taken: [N, C, H, W] float32, the next latents that were chosen.
    old_log_prob: [N] float32, of the policy that chose them. None: of this policy; the ratio is 1 and has a gradient.
    rewards, group, reward: [P, G] float32 of all groups, [N] int64, which is not checked, and [N] float32: pair i led
        to reward[i], which is compared with rewards[group[i]]. mode, std_floor, clamp: as of `group_advantages`. Where
        reward[i] is rewards[p, j] its advantage is group_advantages(rewards, mode, std_floor, clamp)[0][p, j], to the
        last bit.
    advantage: [N] float32, instead of these three.
    weight: of each pair's loss in the sum, a number, [1] or [N] float32.
    clip_low, clip_high: the ratio's range is 1 - clip_low to 1 + clip_high.
    base_output: what the base model said, like output; turns on the KL term, whose weight is kl_weight: a number, or
        [1] or [N] float32 that a captured graph reads anew at every replay.
    ratio_norm: takes RatioNorm's log-ratio, from old_mean [N, C, H, W] float32, the old policy's (None: this policy's),
        and not old_log_prob.
    All tensors are on one device. Steps of sigma 0 have log-ratio, KL and gradient 0. Not differentiable: the gradient
    is among the results. Raises ValueError for arguments that do not fit together.
    """
    arguments = GrpoStepArguments(
        output, latents, taken, tables, step, as_guidance(guidance, output.device), old_log_prob, rewards, group,
        reward, advantage, as_scalar(weight, output.device), base_output, old_mean,
        mode, std_floor, clamp, clip_low, clip_high, as_scalar(kl_weight, output.device), ratio_norm, rescale,
    )  # fmt: skip
    _check(arguments)
    return GrpoStep(*_grpo_step(*arguments))


def _check(a: GrpoStepArguments) -> None:
    """Raises ValueError, in one sentence, for arguments that do not fit together. Reads no values from the device."""
    check_step(a.output, a.latents, a.tables, a.step, a.guidance, a.rescale)
    check_like("taken", a.taken, a.latents)
    check_like("old_mean", a.old_mean, a.latents)
    check_pairs(len(a.latents), old_log_prob=a.old_log_prob, advantage=a.advantage, group=a.group, reward=a.reward)
    weight, base_output = a.weight, a.base_output
    if weight.dtype != torch.float32 or weight.shape not in ((1,), (len(a.latents),)):
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; a number, or float32 [1] or [N], is accepted")
    if a.kl_weight.dtype != torch.float32 or a.kl_weight.shape not in ((1,), (len(a.latents),)):
        what = f"kl_weight is {list(a.kl_weight.shape)} {a.kl_weight.dtype}"
        raise ValueError(f"{what}; a number, or float32 [1] or [N], is accepted")
    given = [tensor is not None for tensor in (a.rewards, a.group, a.reward)]
    if any(given) == (a.advantage is not None) or any(given) != all(given):
        raise ValueError("one of the two is accepted: advantage alone, or all of rewards, group and reward")
    if a.rewards is not None:
        check_rewards(a.rewards, a.mode)
    if base_output is not None and (base_output.shape != a.output.shape or base_output.dtype != a.output.dtype):
        raise ValueError(
            f"base_output is {list(base_output.shape)} {base_output.dtype}; "
            f"{list(a.output.shape)} {a.output.dtype}, as output, is accepted"
        )
    if a.old_mean is not None and not a.ratio_norm:
        raise ValueError("old_mean is given without ratio_norm, which alone uses it")
