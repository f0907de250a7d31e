"""Group normalisation and SiLU of channels-last activations, with a time embedding added first, in one pass over memory.

    v = x + temb[:, :, None, None]                      (or v = x)
    z = (v - mean_g) * rstd_g * weight + bias           rstd_g = 1 / sqrt(var_g + eps), var_g biased
    y = z * sigmoid(z)                                  (or y = z)

over N samples and G groups of D = C / G channels (Wu and He, arXiv 1803.08494); mean_g and var_g are over a sample's
D * H * W values of group g. These are `norm1`, `norm2`, the transformers' `norm` and `conv_norm_out` of a UNet.

    x, y, dy, dx      [N, C, H, W] bfloat16, float16 or float32; channels_last is computed in place, anything else is
                      converted to it and back
    temb, dtemb       [N, C], x's dtype
    weight, bias      [C], x's dtype or float32
    mean, rstd        [N, G] float32, kept for the backward pass

With dz = dy * silu'(z), n = D * H * W, xhat = (v - mean) * rstd and sums over a group:

    dx      = rstd * (weight * dz - sum(weight * dz) / n - xhat * sum(weight * dz * xhat) / n)
    dweight = sum over samples and pixels of dz * xhat        dbias = the same of dz        dtemb = sum over pixels of dx

All three gradients of vectors follow from three sums per sample and channel, of dz, dz * xhat and xhat.

Bytes an element in half precision: forward 4 (x once, y once), backward 6 (x, dy, dx). In channels-last memory a group is
H * W rows of only 2 * D bytes, so a program takes a bundle of neighbouring groups; and since statistics come before the
first output, it needs its slab twice. By shape:

    one tile    a slab of at most 16,384 values (backward 8,192) stays in registers: the bytes above exactly
    one launch  the program reads its slab again, backwards, so that what was read last comes first; slabs are kept small
                enough (192 KiB) that one for every multiprocessor stays in the L2 cache together, unless rows would then
                be narrow
    split       too few slabs to fill the device: rows are dealt out to several programs, which leave partial statistics
                to a second launch; x is small then, and L2 has it

Memory and L2 move sectors of 32 bytes, and a bundle's rows begin and end within one. Rows of 40 bytes, which 192 KiB leave
a 64 x 64 image of 320 or 640 channels, touch 1.6 times the sectors that x has; of 80 bytes, 1.2 times. So rows are at least
64 bytes. 132 slabs of such images are then 41 MiB, of an H100's 50 MB of L2; 62 MiB for 960 channels, and the backward
pass has two inputs: what is read again comes partly from memory there.

Statistics are float32 by Welford's method for every lane, then Chan's formula over lanes: a mean of 1e4 beside a standard
deviation of 1 costs no more than x's own rounding. Sums have a fixed order and there are no atomics: the same input gives
the same bits. On CUDA there is a second implementation, in CUDA C++ (csrc/); `BACKENDS` chooses and says which is used.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels import native
from fastgrpo.kernels.backends import Backends
from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Case, OpSpec

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 16 warps with 16 values a thread.
_TILE = 8192
_SLAB_BYTES = 192 * 1024
_ROW_BYTES = 64  # two sectors; narrower rows are widened, however large the slab becomes
# Two programs for each of an H100's 132 multiprocessors: fewer leave some idle while others finish.
_PROGRAMS = 264


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """The formula in plain operations, in the dtype it is given."""
    value = x if temb is None else x + temb[:, :, None, None]
    grouped = value.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normalised = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    z = normalised.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return z * torch.sigmoid(z) if silu else z


# ---------------------------------------------------------------------------------------------------------------------
# Triton
#
# A program's tile is [ROWS pixels, BLOCK_C channels]; BUNDLE groups of GROUP_C channels fill the first columns.


@triton.jit
def _to_groups(value, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C] -> [BUNDLE], sums over each group's channels."""
    member = tl.arange(0, BLOCK_C)[:, None] // GROUP_C == tl.arange(0, BUNDLE)[None, :]
    return tl.sum(tl.where(member, value[:, None], 0.0), axis=0)


@triton.jit
def _to_channels(value, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BUNDLE] -> [BLOCK_C], every channel its group's value; 0 beyond the bundle."""
    member = tl.arange(0, BLOCK_C)[:, None] // GROUP_C == tl.arange(0, BUNDLE)[None, :]
    return tl.sum(tl.where(member, value[None, :], 0.0), axis=1)


@triton.jit
def _columns(bundle, channels, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The `columns` of the functions below: channel numbers and which of them are the bundle's, [BLOCK_C]; channels a pixel."""
    lane = tl.arange(0, BLOCK_C)
    return bundle * BUNDLE * GROUP_C + lane, lane < BUNDLE * GROUP_C, channels


@triton.jit
def _load_rows(pointer, row, last, columns):
    """float32 [ROWS, BLOCK_C], 0 outside of rows below `last` and of the bundle. pointer: the sample's first channel."""
    column, in_bundle, channels = columns
    mask = (row < last)[:, None] & in_bundle[None, :]
    return tl.load(pointer + row[:, None] * channels + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, value, row, last, columns):
    column, in_bundle, channels = columns
    mask = (row < last)[:, None] & in_bundle[None, :]
    tl.store(pointer + row[:, None] * channels + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_channels(pointer, columns):
    column, in_bundle, _ = columns
    return tl.load(pointer + column, mask=in_bundle, other=0.0).to(tl.float32)


@triton.jit
def _load_shift(temb, sample, columns, BLOCK_C: tl.constexpr):
    """What is added to a sample's pixels, 0 where temb is None."""
    shift = tl.zeros([BLOCK_C], tl.float32)
    if temb is not None:
        shift = _load_channels(temb + sample * columns[2], columns)
    return shift


@triton.jit
def _merge(count, mean, m2, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Chan's formula. count [R], mean and m2 [R, BLOCK_C], of R separate sets of rows -> mean and m2 [BUNDLE] of all."""
    total = tl.sum(count, axis=0) * GROUP_C
    whole = _to_groups(tl.sum(mean * count[:, None], axis=0), GROUP_C, BUNDLE, BLOCK_C) / total
    deviation = mean - _to_channels(whole, GROUP_C, BUNDLE, BLOCK_C)[None, :]
    # The sum of large numbers is off by a few of their last bits; what is left around it is small and sums exactly.
    correction = _to_groups(tl.sum(deviation * count[:, None], axis=0), GROUP_C, BUNDLE, BLOCK_C) / total
    deviation -= _to_channels(correction, GROUP_C, BUNDLE, BLOCK_C)[None, :]
    spread = _to_groups(tl.sum(m2 + deviation * deviation * count[:, None], axis=0), GROUP_C, BUNDLE, BLOCK_C)
    return whole + correction, spread


@triton.jit
def _statistics(
    x, shift, first, last, columns,
    GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """mean and m2 [BUNDLE] of rows first <= row < last of x + shift."""
    mean = tl.zeros([ROWS, BLOCK_C], tl.float32)
    m2 = tl.zeros([ROWS, BLOCK_C], tl.float32)
    blocks = 0.0
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        value = _load_rows(x, row, last, columns) + shift[None, :]
        blocks += 1.0
        delta = tl.where((row < last)[:, None], value - mean, 0.0)  # only the last block has rows that do not exist
        mean += delta * (1.0 / blocks)
        m2 += delta * (value - mean)
    count = ((last - first - tl.arange(0, ROWS) + ROWS - 1) // ROWS).to(tl.float32)
    return _merge(count, mean, m2, GROUP_C, BUNDLE, BLOCK_C)


# `norm` below is (mean, rstd, weight, bias), [BLOCK_C] each: what takes v to z.


@triton.jit
def _activate(value, norm, SILU: tl.constexpr):
    mean, rstd, weight, bias = norm
    z = (value - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _write_outputs(y, x, shift, norm, first, last, columns, SILU: tl.constexpr, ROWS: tl.constexpr):
    """Backwards: the rows that the statistics read last are the likeliest to be in a cache."""
    blocks = (last - first + ROWS - 1) // ROWS
    for block in range(0, blocks):
        row = first + (blocks - 1 - block) * ROWS + tl.arange(0, ROWS)
        value = _load_rows(x, row, last, columns) + shift[None, :]
        _store_rows(y, _activate(value, norm, SILU), row, last, columns)


@triton.jit
def _forward_kernel(
    y, mean_out, rstd_out, x, temb, weight, bias, pixels, channels, groups, eps,
    SILU: tl.constexpr, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, samples)."""
    bundle = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    columns = _columns(bundle, channels, GROUP_C, BUNDLE, BLOCK_C)
    x += sample * pixels * channels
    y += sample * pixels * channels
    weight = _load_channels(weight, columns)
    bias = _load_channels(bias, columns)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    if ONE_TILE:
        row = tl.arange(0, ROWS)
        present = (row < pixels).to(tl.float32)
        value = _load_rows(x, row, pixels, columns) + shift[None, :]
        mean, m2 = _merge(present, value, tl.zeros([ROWS, BLOCK_C], tl.float32), GROUP_C, BUNDLE, BLOCK_C)
    else:
        mean, m2 = _statistics(x, shift, 0, pixels, columns, GROUP_C, BUNDLE, BLOCK_C, ROWS)
    rstd = 1.0 / tl.sqrt(m2 / (pixels * GROUP_C) + eps)
    group = sample * groups + bundle * BUNDLE + tl.arange(0, BUNDLE)
    tl.store(mean_out + group, mean)
    tl.store(rstd_out + group, rstd)
    norm = _to_channels(mean, GROUP_C, BUNDLE, BLOCK_C), _to_channels(rstd, GROUP_C, BUNDLE, BLOCK_C), weight, bias
    if ONE_TILE:
        _store_rows(y, _activate(value, norm, SILU), row, pixels, columns)
    else:
        _write_outputs(y, x, shift, norm, 0, pixels, columns, SILU, ROWS)


@triton.jit
def _forward_partial_kernel(
    mean_out, m2_out, x, temb, pixels, split_rows, channels, groups,
    GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, splits, samples). mean_out, m2_out: [samples, splits, groups]."""
    bundle, split = tl.program_id(0), tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    columns = _columns(bundle, channels, GROUP_C, BUNDLE, BLOCK_C)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    first = split * split_rows
    last = tl.minimum(first + split_rows, pixels)
    mean, m2 = _statistics(x + sample * pixels * channels, shift, first, last, columns, GROUP_C, BUNDLE, BLOCK_C, ROWS)
    group = (sample * tl.num_programs(1) + split) * groups + bundle * BUNDLE + tl.arange(0, BUNDLE)
    tl.store(mean_out + group, mean)
    tl.store(m2_out + group, m2)


@triton.jit
def _forward_finish_kernel(
    y, mean_out, rstd_out, partial_mean, partial_m2, x, temb, weight, bias, pixels, split_rows, channels, groups, eps,
    SILU: tl.constexpr, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, splits, samples). Every program merges the same partial statistics in the same order."""
    bundle, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sample = tl.program_id(2).to(tl.int64)
    columns = _columns(bundle, channels, GROUP_C, BUNDLE, BLOCK_C)
    group = bundle * BUNDLE + tl.arange(0, BUNDLE)
    part = tl.arange(0, BLOCK_S)
    count = tl.maximum(tl.minimum(pixels - part * split_rows, split_rows), 0).to(tl.float32) * GROUP_C
    offset = (sample * splits + part)[:, None] * groups + group[None, :]
    mask = (part < splits)[:, None]
    # As if each part's groups were one channel each.
    mean, m2 = _merge(
        count,
        tl.load(partial_mean + offset, mask=mask, other=0.0),
        tl.load(partial_m2 + offset, mask=mask, other=0.0),
        1,
        BUNDLE,
        BUNDLE,
    )
    rstd = 1.0 / tl.sqrt(m2 / (pixels * GROUP_C) + eps)
    if split == 0:
        tl.store(mean_out + sample * groups + group, mean)
        tl.store(rstd_out + sample * groups + group, rstd)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    norm = (
        _to_channels(mean, GROUP_C, BUNDLE, BLOCK_C),
        _to_channels(rstd, GROUP_C, BUNDLE, BLOCK_C),
        _load_channels(weight, columns),
        _load_channels(bias, columns),
    )
    y += sample * pixels * channels
    x += sample * pixels * channels
    first = split * split_rows
    _write_outputs(y, x, shift, norm, first, tl.minimum(first + split_rows, pixels), columns, SILU, ROWS)


@triton.jit
def _load_norm(mean, rstd, weight, bias, sample, groups, columns, GROUP_C: tl.constexpr):
    column, in_bundle, channels = columns
    groups_of_columns = sample * groups + column // GROUP_C, in_bundle, channels
    return (
        _load_channels(mean, groups_of_columns),
        _load_channels(rstd, groups_of_columns),
        _load_channels(weight, columns),
        _load_channels(bias, columns),
    )


@triton.jit
def _gradient_of_z(value, dy, norm, SILU: tl.constexpr):
    """xhat and dz, [ROWS, BLOCK_C]."""
    mean, rstd, weight, bias = norm
    xhat = (value - mean[None, :]) * rstd[None, :]
    dz = dy
    if SILU:
        z = xhat * weight[None, :] + bias[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return xhat, dz


@triton.jit
def _sums(x, dy, shift, norm, first, last, columns, SILU: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """[BLOCK_C] each, over rows first <= row < last: dz, dz * xhat, xhat."""
    sum_dz = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_dz_xhat = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_xhat = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        value = _load_rows(x, row, last, columns) + shift[None, :]
        xhat, dz = _gradient_of_z(value, _load_rows(dy, row, last, columns), norm, SILU)
        sum_dz += dz  # dy is 0 in rows that do not exist, and with it dz
        sum_dz_xhat += dz * xhat
        sum_xhat += tl.where((row < last)[:, None], xhat, 0.0)
    return tl.sum(sum_dz, axis=0), tl.sum(sum_dz_xhat, axis=0), tl.sum(sum_xhat, axis=0)


@triton.jit
def _group_means(sums, weight, pixels, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C] each: a group's means of weight * dz and weight * dz * xhat, at its channels."""
    dz, dz_xhat, _ = sums
    mean_dz = _to_groups(dz * weight, GROUP_C, BUNDLE, BLOCK_C) / (pixels * GROUP_C)
    mean_dz_xhat = _to_groups(dz_xhat * weight, GROUP_C, BUNDLE, BLOCK_C) / (pixels * GROUP_C)
    return (
        _to_channels(mean_dz, GROUP_C, BUNDLE, BLOCK_C),
        _to_channels(mean_dz_xhat, GROUP_C, BUNDLE, BLOCK_C),
    )


@triton.jit
def _store_vectors(dtemb, dweight, dbias, sample, sums, means, norm, pixels, columns):
    """What one sample adds to the gradients of vectors. dtemb: None without temb."""
    column, in_bundle, channels = columns
    dz, dz_xhat, xhat = sums
    tl.store(dweight + sample * channels + column, dz_xhat, mask=in_bundle)
    tl.store(dbias + sample * channels + column, dz, mask=in_bundle)
    if dtemb is not None:
        mean_dz, mean_dz_xhat = means
        _, rstd, weight, _ = norm
        total = rstd * (weight * dz - pixels * mean_dz - mean_dz_xhat * xhat)
        tl.store(dtemb + sample * channels + column, total.to(dtemb.dtype.element_ty), mask=in_bundle)


@triton.jit
def _gradient_of_v(xhat, dz, means, norm):
    mean_dz, mean_dz_xhat = means
    _, rstd, weight, _ = norm
    return rstd[None, :] * (weight[None, :] * dz - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])


@triton.jit
def _write_gradients(dx, x, dy, shift, norm, means, first, last, columns, SILU: tl.constexpr, ROWS: tl.constexpr):
    """Backwards, as in _write_outputs."""
    blocks = (last - first + ROWS - 1) // ROWS
    for block in range(0, blocks):
        row = first + (blocks - 1 - block) * ROWS + tl.arange(0, ROWS)
        value = _load_rows(x, row, last, columns) + shift[None, :]
        xhat, dz = _gradient_of_z(value, _load_rows(dy, row, last, columns), norm, SILU)
        _store_rows(dx, _gradient_of_v(xhat, dz, means, norm), row, last, columns)


@triton.jit
def _backward_kernel(
    dx, dtemb, dweight, dbias, dy, x, temb, weight, bias, mean, rstd, pixels, channels, groups,
    SILU: tl.constexpr, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, samples). dweight, dbias: [samples, channels] float32, each sample's share."""
    sample = tl.program_id(1).to(tl.int64)
    columns = _columns(tl.program_id(0), channels, GROUP_C, BUNDLE, BLOCK_C)
    dx += sample * pixels * channels
    x += sample * pixels * channels
    dy += sample * pixels * channels
    norm = _load_norm(mean, rstd, weight, bias, sample, groups, columns, GROUP_C)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    if ONE_TILE:
        row = tl.arange(0, ROWS)
        value = _load_rows(x, row, pixels, columns) + shift[None, :]
        xhat, dz = _gradient_of_z(value, _load_rows(dy, row, pixels, columns), norm, SILU)
        sum_xhat = tl.sum(tl.where((row < pixels)[:, None], xhat, 0.0), axis=0)
        sums = tl.sum(dz, axis=0), tl.sum(dz * xhat, axis=0), sum_xhat
    else:
        sums = _sums(x, dy, shift, norm, 0, pixels, columns, SILU, BLOCK_C, ROWS)
    means = _group_means(sums, norm[2], pixels, GROUP_C, BUNDLE, BLOCK_C)
    _store_vectors(dtemb, dweight, dbias, sample, sums, means, norm, pixels, columns)
    if ONE_TILE:
        _store_rows(dx, _gradient_of_v(xhat, dz, means, norm), row, pixels, columns)
    else:
        _write_gradients(dx, x, dy, shift, norm, means, 0, pixels, columns, SILU, ROWS)


@triton.jit
def _backward_partial_kernel(
    sums_out, dy, x, temb, weight, bias, mean, rstd, pixels, split_rows, channels, groups,
    SILU: tl.constexpr, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, splits, samples). sums_out: [samples, splits, 3, channels] of dz, dz * xhat and xhat."""
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    columns = _columns(tl.program_id(0), channels, GROUP_C, BUNDLE, BLOCK_C)
    x += sample * pixels * channels
    dy += sample * pixels * channels
    norm = _load_norm(mean, rstd, weight, bias, sample, groups, columns, GROUP_C)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    first = split * split_rows
    last = tl.minimum(first + split_rows, pixels)
    sum_dz, sum_dz_xhat, sum_xhat = _sums(x, dy, shift, norm, first, last, columns, SILU, BLOCK_C, ROWS)
    column, in_bundle, _ = columns
    sums_out += (sample * tl.num_programs(1) + split) * 3 * channels
    tl.store(sums_out + column, sum_dz, mask=in_bundle)
    tl.store(sums_out + channels + column, sum_dz_xhat, mask=in_bundle)
    tl.store(sums_out + 2 * channels + column, sum_xhat, mask=in_bundle)


@triton.jit
def _backward_finish_kernel(
    dx, dtemb, dweight, dbias, partial_sums, dy, x, temb, weight, bias, mean, rstd, pixels, split_rows, channels, groups,
    SILU: tl.constexpr, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, splits, samples). Every program adds the same partial sums in the same order."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    sample = tl.program_id(2).to(tl.int64)
    columns = _columns(tl.program_id(0), channels, GROUP_C, BUNDLE, BLOCK_C)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dz_xhat = tl.zeros([BLOCK_C], tl.float32)
    sum_xhat = tl.zeros([BLOCK_C], tl.float32)
    for part in range(0, splits):
        share = partial_sums + (sample * splits + part) * 3 * channels
        sum_dz += _load_channels(share, columns)
        sum_dz_xhat += _load_channels(share + channels, columns)
        sum_xhat += _load_channels(share + 2 * channels, columns)
    sums = sum_dz, sum_dz_xhat, sum_xhat
    norm = _load_norm(mean, rstd, weight, bias, sample, groups, columns, GROUP_C)
    means = _group_means(sums, norm[2], pixels, GROUP_C, BUNDLE, BLOCK_C)
    if split == 0:
        _store_vectors(dtemb, dweight, dbias, sample, sums, means, norm, pixels, columns)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    dx += sample * pixels * channels
    x += sample * pixels * channels
    dy += sample * pixels * channels
    first = split * split_rows
    last = tl.minimum(first + split_rows, pixels)
    _write_gradients(dx, x, dy, shift, norm, means, first, last, columns, SILU, ROWS)


@triton.jit
def _reduce_kernel(
    dweight, dbias, dweight_parts, dbias_parts, samples, channels, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):
    """dweight and dbias [channels] from [samples, channels] float32. Grid: (channel blocks,)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = column < channels
    columns = column, in_range, channels
    sum_dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, samples, ROWS):
        row = start + tl.arange(0, ROWS)
        sum_dweight += _load_rows(dweight_parts, row, samples, columns)
        sum_dbias += _load_rows(dbias_parts, row, samples, columns)
    tl.store(dweight + column, tl.sum(sum_dweight, axis=0).to(dweight.dtype.element_ty), mask=in_range)
    tl.store(dbias + column, tl.sum(sum_dbias, axis=0).to(dbias.dtype.element_ty), mask=in_range)


@dataclass(frozen=True)
class _Plan:
    """How a shape is cut up. bundle: groups a program. rows: pixels a tile. splits: programs a slab, split_rows pixels each."""

    bundle: int
    block_c: int
    rows: int
    splits: int
    split_rows: int
    warps: int

    def one_tile(self, pixels: int) -> bool:
        return self.splits == 1 and pixels <= self.rows


def _plan(
    samples: int,
    pixels: int,
    channels: int,
    groups: int,
    itemsize: int,
    backward: bool = False,
    programs: int = _PROGRAMS,
) -> _Plan:
    """programs: how many are wanted at least."""
    group_c = channels // groups
    # Twice as many groups to a program as long as they divide up and stay within 128 columns: always where rows would be
    # narrow, and otherwise while slabs stay small and leave programs enough.
    bundle = 1
    while (
        groups % (2 * bundle) == 0
        and 2 * bundle * group_c <= 128
        and (
            bundle * group_c * itemsize < _ROW_BYTES
            or (
                2 * bundle * group_c * pixels * itemsize <= _SLAB_BYTES and samples * groups // (2 * bundle) >= programs
            )
        )
    ):
        bundle *= 2
    block_c = triton.next_power_of_2(bundle * group_c)
    # What a thread holds: 16 values and the sums that go with them, or 32 where no sums are kept beside them.
    one_tile = not backward and triton.next_power_of_2(pixels) * block_c <= 2 * _TILE
    tile = 2 * _TILE if one_tile else _TILE
    rows = max(1, min(triton.next_power_of_2(pixels), tile // block_c))
    # Rounded: a device that is two thirds full or more is not worth reading x from memory once more.
    slabs = samples * groups // bundle
    wanted = max(1, round(programs / slabs))
    splits = min(wanted, triton.cdiv(pixels, rows), 64)
    split_rows = triton.cdiv(triton.cdiv(pixels, splits), rows) * rows
    warps = max(1, min(16, rows * block_c // (1024 if one_tile else 512)))
    return _Plan(bundle, block_c, rows, triton.cdiv(pixels, split_rows), split_rows, warps)


def _constants(plan: _Plan, group_channels: int) -> dict[str, int]:
    """What all kernels but the last are compiled for."""
    return {
        "GROUP_C": group_channels,
        "BUNDLE": plan.bundle,
        "BLOCK_C": plan.block_c,
        "ROWS": plan.rows,
        "num_warps": plan.warps,
    }


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None,
    programs: int = _PROGRAMS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean, rstd; x is channels_last, everything is contiguous in it."""
    samples, channels, height, width = x.shape
    pixels = height * width
    plan = _plan(samples, pixels, channels, groups, x.element_size(), programs=programs)
    constants = _constants(plan, channels // groups)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty((samples, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    bundles = groups // plan.bundle
    if plan.splits == 1:
        _forward_kernel[(bundles, samples)](
            y, mean, rstd, x, temb, weight, bias, pixels, channels, groups, eps,
            SILU=silu, ONE_TILE=plan.one_tile(pixels), **constants,
        )  # fmt: skip
        return y, mean, rstd
    partial_mean, partial_m2 = (
        torch.empty((samples, plan.splits, groups), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    grid = (bundles, plan.splits, samples)
    _forward_partial_kernel[grid](
        partial_mean, partial_m2, x, temb, pixels, plan.split_rows, channels, groups, **constants
    )
    _forward_finish_kernel[grid](
        y, mean, rstd, partial_mean, partial_m2, x, temb, weight, bias, pixels, plan.split_rows, channels, groups, eps,
        SILU=silu, BLOCK_S=triton.next_power_of_2(plan.splits), **constants,
    )  # fmt: skip
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None, programs: int = _PROGRAMS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, dtemb (empty without temb); dy and x are channels_last, everything is contiguous in it."""
    samples, channels, height, width = x.shape
    pixels = height * width
    plan = _plan(samples, pixels, channels, groups, x.element_size(), backward=True, programs=programs)
    constants = _constants(plan, channels // groups)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    dtemb = None if temb is None else torch.empty_like(temb)
    shares = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device)
    inputs = (dy, x, temb, weight, bias, mean, rstd, pixels)
    bundles = groups // plan.bundle
    if plan.splits == 1:
        _backward_kernel[(bundles, samples)](
            dx, dtemb, shares[0], shares[1], *inputs, channels, groups,
            SILU=silu, ONE_TILE=plan.one_tile(pixels), **constants,
        )  # fmt: skip
    else:
        sums = torch.empty((samples, plan.splits, 3, channels), dtype=torch.float32, device=x.device)
        grid = (bundles, plan.splits, samples)
        rest = (plan.split_rows, channels, groups)
        _backward_partial_kernel[grid](sums, *inputs, *rest, SILU=silu, **constants)
        _backward_finish_kernel[grid](
            dx, dtemb, shares[0], shares[1], sums, *inputs, *rest, SILU=silu, **constants
        )  # fmt: skip
    _reduce_kernel[(triton.cdiv(channels, 32),)](
        dweight, dbias, shares[0], shares[1], samples, channels, BLOCK_C=32, ROWS=64
    )
    return dx, dweight, dbias, x.new_empty(0) if dtemb is None else dtemb


# ---------------------------------------------------------------------------------------------------------------------
# Which of the two computes on CUDA: these kernels, or csrc/

BACKENDS = Backends("group_norm_silu", "triton", "native", native.available, native.LaunchError)


def _kind(direction: str, x: Tensor, weight: Tensor, groups: int, silu: bool, temb: Tensor | None) -> str:
    """Of a call: what decides how long either takes."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (x, weight)]
    shape = "x".join(map(str, x.shape))
    parts = (
        shape,
        dtypes[0],
        f"weight {dtypes[1]}",
        f"groups {groups}",
        *["silu"] * silu,
        *["temb"] * (temb is not None),
    )
    return f"{direction} {', '.join(parts)}"


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _format(x: Tensor) -> torch.memory_format:
    """The output's: channels_last if x is, contiguous otherwise; x with one channel or one pixel is both."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.custom_op("fastgrpo::group_norm_silu", mutates_args=(), device_types="cuda")
@on_its_device
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd."""
    rows = x.contiguous(memory_format=torch.channels_last)
    temb = None if temb is None else temb.contiguous()
    arguments = (rows, weight.contiguous(), bias.contiguous(), groups, eps, silu, temb)
    calls = {
        "triton": lambda: _launch_forward(*arguments),
        "native": lambda: native.group_norm_silu_forward(*arguments),
    }
    y, mean, rstd = calls[BACKENDS.choose(_kind("forward", x, weight, groups, silu, temb), calls)]()
    return y.contiguous(memory_format=_format(x)), mean, rstd


@_forward_op.register_kernel("cpu")
def _forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32."""
    value = _shifted(x, temb)
    value = value.contiguous(memory_format=_format(value))
    samples, channels, height, width = x.shape
    y, mean, rstd = torch.native_group_norm(
        value, weight.float(), bias.float(), samples, channels, height * width, groups, eps
    )
    y = F.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=_format(x)), mean, rstd


@_forward_op.register_fake
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x, memory_format=_format(x)), statistic, torch.empty_like(statistic)


@torch.library.custom_op("fastgrpo::group_norm_silu_backward", mutates_args=(), device_types="cuda")
@on_its_device
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias and dtemb, the last empty without temb."""
    rows = x.contiguous(memory_format=torch.channels_last)
    dy = dy.contiguous(memory_format=torch.channels_last)
    temb = None if temb is None else temb.contiguous()
    arguments = (dy, rows, weight.contiguous(), bias.contiguous(), mean, rstd, groups, silu, temb)
    calls = {
        "triton": lambda: _launch_backward(*arguments),
        "native": lambda: native.group_norm_silu_backward(*arguments),
    }
    dx, *vectors = calls[BACKENDS.choose(_kind("backward", x, weight, groups, silu, temb), calls)]()
    return dx.contiguous(memory_format=_format(x)), *vectors


@_backward_op.register_kernel("cpu")
def _backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """In float32."""
    value = _shifted(x, temb)
    dz, weight_, bias_ = dy.float(), weight.float(), bias.float()
    samples, channels, height, width = x.shape
    if silu:
        xhat = (value.reshape(samples, groups, -1) - mean[..., None]) * rstd[..., None]
        z = xhat.reshape(x.shape) * weight_[:, None, None] + bias_[:, None, None]
        dz = torch.ops.aten.silu_backward(dz, z)
    # This backward pass reads both in the same memory format, and takes it from x.
    last = _format(value)
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dz.contiguous(memory_format=last), value.contiguous(memory_format=last), mean, rstd, weight_,
        samples, channels, height * width, groups, [True, True, True],
    )  # fmt: skip
    dtemb = x.new_empty(0) if temb is None else dx.sum((2, 3)).to(temb.dtype)
    dx = dx.to(x.dtype).contiguous(memory_format=_format(x))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dtemb


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x, memory_format=_format(x))
    dweight, dbias = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias))
    dtemb = x.new_empty(0) if temb is None else torch.empty_like(temb, memory_format=torch.contiguous_format)
    return dx, dweight, dbias, dtemb


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, groups, _, silu, temb = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, temb)
    ctx.groups, ctx.silu = groups, silu


def _backward(ctx, dy: Tensor, *_):
    x, weight, bias, mean, rstd, temb = ctx.saved_tensors
    dx, dweight, dbias, dtemb = _backward_op(dy, x, weight, bias, mean, rstd, ctx.groups, ctx.silu, temb)
    return dx, dweight, dbias, None, None, None, None if temb is None else dtemb


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _shifted(x: Tensor, temb: Tensor | None) -> Tensor:
    """x + temb in float32."""
    return x.float() if temb is None else x.float() + temb[:, :, None, None].float()


# ---------------------------------------------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """silu(group_norm(x + temb[:, :, None, None])), or without either of the outer two.

    x: [N, C, H, W] bfloat16, float16 or float32, channels_last where speed matters. weight, bias: [C], both x's dtype or
    both float32. groups: divides C. eps: added to the variance, at least 0. temb: [N, C], x's dtype.
    Returns [N, C, H, W], x's dtype and memory format. Differentiable in all four tensors; once, on CUDA.
    On CPU it is PyTorch's own operations: bit for bit those of a diffusers UNet in float32, and in float32 for the others.
    Raises ValueError for anything else.
    """
    _check(x, weight, bias, groups, eps, temb)
    if x.device.type == "cpu":
        # Not through the operator: PyTorch's autograd keeps z instead of computing it again.
        value = _shifted(x, temb)
        z = F.group_norm(value, groups, weight.float(), bias.float(), eps)
        return (F.silu(z) if silu else z).to(x.dtype)
    return _forward_op(x, weight, bias, groups, eps, silu, temb)[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, temb: Tensor | None) -> None:
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"group_norm_silu: x has shape {list(x.shape)}; [N, C, H, W] with no empty side is accepted")
    if x.dtype not in _DTYPES:
        raise ValueError(f"group_norm_silu: x is {x.dtype}; bfloat16, float16 and float32 are accepted")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm_silu: groups is {groups}; a divisor of x's {channels} channels is accepted")
    if not eps >= 0:
        raise ValueError(f"group_norm_silu: eps is {eps}; 0 or more is accepted")
    for name, vector in (("weight", weight), ("bias", bias)):
        fits = vector.shape == (channels,) and vector.dtype in (x.dtype, torch.float32) and vector.dtype == weight.dtype
        if not fits or vector.device != x.device:
            raise ValueError(
                f"group_norm_silu: {name} is {vector.dtype} {list(vector.shape)} on {vector.device}; [{channels}] in "
                f"{x.dtype} or float32, the same for weight and bias, on {x.device} is accepted"
            )
    like_temb = (samples, channels), x.dtype, x.device
    if temb is not None and (tuple(temb.shape), temb.dtype, temb.device) != like_temb:
        raise ValueError(
            f"group_norm_silu: temb is {temb.dtype} {list(temb.shape)} on {temb.device}; {x.dtype} [{samples}, {channels}] "
            f"on {x.device} is accepted"
        )


# ---------------------------------------------------------------------------------------------------------------------


def _case(samples: int, channels: int, height: int, width: int, groups: int, silu: bool = True) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        x = normal(samples, channels, height, width).to(memory_format=torch.channels_last)
        return x, normal(channels), normal(channels), groups, 1e-5, silu, normal(samples, channels)

    bytes_ = 4 * samples * channels * height * width
    return Case(f"{samples}x{channels}x{height}x{width}{'' if silu else ' no silu'}", make, bytes_)


def _eager(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """What diffusers does."""
    z = F.group_norm(x if temb is None else x + temb[:, :, None, None], groups, weight, bias, eps)
    return F.silu(z) if silu else z


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """One unit in the last place for the store; before it float32 sums of a few thousand terms around 1.

    Each of those terms carries a few roundings of 6e-8, and a gradient of a vector adds up to about a thousand of them:
    1000 * 6e-8 = 6e-5 if none cancel.
    """
    return max(torch.finfo(dtype).eps, 1e-5), 1e-4


def _aot(name: str, kernel: object, samples: int, channels: int, side: int, **constants: object) -> AotKernel:
    """A kernel as it is launched for bfloat16 [samples, channels, side, side] in 32 groups, with a time embedding."""
    plan = _plan(samples, side * side, channels, 32, 2, backward="backward" in name)
    constants |= _constants(plan, channels // 32)
    warps = constants.pop("num_warps")
    types = dict.fromkeys(("y", "x", "temb", "weight", "bias", "dx", "dy", "dtemb"), "*bf16") | {"eps": "fp32"}
    integers = ("pixels", "split_rows", "channels", "groups")
    types |= dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    # What is left are statistics and sums.
    signature = {parameter: types.get(parameter, "*fp32") for parameter in kernel.arg_names}
    return AotKernel(f"{name} {samples}x{channels}x{side}x{side}", kernel, signature, constants, warps)


def _aot_kernels() -> tuple[AotKernel, ...]:
    kernels = []
    for samples, channels, side in ((64, 320, 64), (64, 960, 64), (64, 1280, 16), (64, 1280, 8)):
        shape = (samples, channels, side)
        for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
            plan = _plan(samples, side * side, channels, 32, 2, backward=name == "backward")
            kernels.append(_aot(name, kernel, *shape, SILU=True, ONE_TILE=plan.one_tile(side * side)))
    shape = (1, 320, 64)
    splits = triton.next_power_of_2(_plan(1, 64 * 64, 320, 32, 2).splits)
    kernels += [
        _aot("forward partial", _forward_partial_kernel, *shape),
        _aot("forward finish", _forward_finish_kernel, *shape, SILU=True, BLOCK_S=splits),
        _aot("backward partial", _backward_partial_kernel, *shape, SILU=True),
        _aot("backward finish", _backward_finish_kernel, *shape, SILU=True),
    ]
    signature = {"dweight": "*bf16", "dbias": "*bf16", "dweight_parts": "*fp32", "dbias_parts": "*fp32"}
    signature |= {"samples": "i32", "channels": "i32", "BLOCK_C": "constexpr", "ROWS": "constexpr"}
    kernels.append(AotKernel("reduce", _reduce_kernel, signature, {"BLOCK_C": 32, "ROWS": 64}))
    return tuple(kernels)


SPEC = OpSpec(
    name="group_norm_silu",
    function=group_norm_silu,
    reference=reference,
    cases=(
        _case(2, 64, 4, 4, 32),
        _case(3, 30, 5, 7, 3),
        _case(1, 24, 1, 1, 8, silu=False),
        _case(2, 240, 8, 8, 2),
        _case(2, 7, 9, 3, 7),
    ),
    bench=(
        *(_case(64, channels, 64, 64, 32) for channels in (320, 640, 960)),
        *(_case(64, channels, 32, 32, 32) for channels in (640, 1280, 1920)),
        *(_case(64, channels, 16, 16, 32) for channels in (1280, 2560)),
        *(_case(64, channels, 8, 8, 32) for channels in (1280, 2560)),
        _case(64, 320, 64, 64, 32, silu=False),
    ),
    dtypes=_DTYPES,
    tolerance=_tolerance,
    differentiable=(0, 1, 2, 6),
    rivals={"eager": _eager},
    aot=_aot_kernels(),
)


if name := os.environ.get("FASTGRPO_GROUP_NORM"):
    BACKENDS.set(name)
