"""The Triton kernels of `group_norm_silu`, which has the formulas: channels-last memory, deterministic.

A program takes a slab, a bundle of neighbouring groups of one sample. Since statistics come before the first output, it
needs its slab twice. By shape:

    one tile    a slab of at most 16,384 values (backward 8,192) stays in registers: x and dy are read once
    one launch  the slab is read again, backwards: what was read last comes first. Unless rows would then be narrow, a
                slab is at most 192 KiB, so that one for every multiprocessor fits into the L2 cache
    split       too few slabs to fill the device: rows are dealt out to several programs, which leave partial statistics
                to a second launch; x is small then, and L2 has it

Memory and L2 move sectors of 32 bytes, and a bundle's rows begin and end within one. Rows of 40 bytes, which 192 KiB
leave a 64 x 64 image of 320 or 640 channels, touch 1.6 times the sectors that x has; of 80 bytes, 1.2 times. So rows
are at least 64 bytes. 132 slabs of such images are 41 MiB of an H100's 50 MB of L2. With 960 channels they are 62 MiB,
and the backward pass has two inputs: there part of what is read again comes from memory.

Statistics are float32 by Welford's method for every lane, then Chan's formula over lanes: a mean of 1e4 beside a
standard deviation of 1 costs no more than x's own rounding. Sums have a fixed order and there are no atomics: the same
input gives the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.program_sums import sum_programs

_TILE = 8192  # 16 warps with 16 values a thread
_SLAB_BYTES = 192 * 1024
_ROW_BYTES = 64  # two sectors; narrower rows are widened, however large the slab becomes
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors: fewer leave some idle while others finish


# A program's tile is [ROWS pixels, BLOCK_C channels]; BUNDLE groups of GROUP_C channels fill the first columns.


@triton.jit
def _to_groups(value, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over each group's channels: [BLOCK_C] -> [BUNDLE]."""
    member = tl.arange(0, BLOCK_C)[:, None] // GROUP_C == tl.arange(0, BUNDLE)[None, :]
    return tl.sum(tl.where(member, value[:, None], 0.0), axis=0)


@triton.jit
def _to_channels(value, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gives every channel its group's value, and 0 beyond the bundle: [BUNDLE] -> [BLOCK_C]."""
    member = tl.arange(0, BLOCK_C)[:, None] // GROUP_C == tl.arange(0, BUNDLE)[None, :]
    return tl.sum(tl.where(member, value[None, :], 0.0), axis=1)


@triton.jit
def _columns(bundle, channels, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the functions' `columns`: channels, and which are the bundle's, [BLOCK_C]; channels a pixel."""
    lane = tl.arange(0, BLOCK_C)
    return bundle * BUNDLE * GROUP_C + lane, lane < BUNDLE * GROUP_C, channels


@triton.jit
def _load_rows(pointer, row, last, columns):
    """Loads float32 [ROWS, BLOCK_C], 0 from row `last` on and outside of the bundle. pointer: to the sample."""
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
    """Loads what is added to a sample's pixels, 0 where temb is None."""
    shift = tl.zeros([BLOCK_C], tl.float32)
    if temb is not None:
        shift = _load_channels(temb + sample * columns[2], columns)
    return shift


@triton.jit
def _merge(count, mean, m2, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merges by Chan's formula: count [R], mean and m2 [R, BLOCK_C] of R sets of rows -> mean and m2 [BUNDLE]."""
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
    """Returns mean and m2 [BUNDLE] of rows first <= row < last of x + shift."""
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
    """Goes backwards: the rows that the statistics read last are the likeliest to be in a cache."""
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
    """Returns xhat and dz, [ROWS, BLOCK_C]."""
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
    """Sums dz, dz * xhat and xhat over rows first <= row < last: [BLOCK_C] each."""
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
    """Returns a group's means of weight * dz and weight * dz * xhat, at its channels: [BLOCK_C] each."""
    dz, dz_xhat, _ = sums
    mean_dz = _to_groups(dz * weight, GROUP_C, BUNDLE, BLOCK_C) / (pixels * GROUP_C)
    mean_dz_xhat = _to_groups(dz_xhat * weight, GROUP_C, BUNDLE, BLOCK_C) / (pixels * GROUP_C)
    return (
        _to_channels(mean_dz, GROUP_C, BUNDLE, BLOCK_C),
        _to_channels(mean_dz_xhat, GROUP_C, BUNDLE, BLOCK_C),
    )


@triton.jit
def _store_vectors(dtemb, shares, sample, sums, means, norm, pixels, columns):
    """Writes what one sample adds to the gradients of vectors. dtemb: None without temb. shares: as of the kernels."""
    column, in_bundle, channels = columns
    dz, dz_xhat, xhat = sums
    tl.store(shares + 2 * sample * channels + column, dz_xhat, mask=in_bundle)
    tl.store(shares + (2 * sample + 1) * channels + column, dz, mask=in_bundle)
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
    """Goes backwards, as _write_outputs does."""
    blocks = (last - first + ROWS - 1) // ROWS
    for block in range(0, blocks):
        row = first + (blocks - 1 - block) * ROWS + tl.arange(0, ROWS)
        value = _load_rows(x, row, last, columns) + shift[None, :]
        xhat, dz = _gradient_of_z(value, _load_rows(dy, row, last, columns), norm, SILU)
        _store_rows(dx, _gradient_of_v(xhat, dz, means, norm), row, last, columns)


@triton.jit
def _backward_kernel(
    dx, dtemb, shares, dy, x, temb, weight, bias, mean, rstd, pixels, channels, groups,
    SILU: tl.constexpr, GROUP_C: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (bundles, samples). shares: [samples, 2, channels] float32, each sample's in dweight and in dbias."""
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
    _store_vectors(dtemb, shares, sample, sums, means, norm, pixels, columns)
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
    dx, dtemb, shares, partial_sums, dy, x, temb, weight, bias, mean, rstd, pixels, split_rows, channels, groups,
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
        _store_vectors(dtemb, shares, sample, sums, means, norm, pixels, columns)
    shift = _load_shift(temb, sample, columns, BLOCK_C)
    dx += sample * pixels * channels
    x += sample * pixels * channels
    dy += sample * pixels * channels
    first = split * split_rows
    last = tl.minimum(first + split_rows, pixels)
    _write_gradients(dx, x, dy, shift, norm, means, first, last, columns, SILU, ROWS)


@dataclass(frozen=True)
class Plan:
    """How the work on one shape is dealt out: groups to a program, a tile of [rows, block_c], programs to a slab."""

    bundle: int
    block_c: int
    rows: int
    splits: int
    split_rows: int
    warps: int

    def one_tile(self, pixels: int) -> bool:
        return self.splits == 1 and pixels <= self.rows

    def constants(self, group_channels: int) -> dict[str, int]:
        """What every kernel is compiled for."""
        blocks = {"GROUP_C": group_channels, "BUNDLE": self.bundle, "BLOCK_C": self.block_c, "ROWS": self.rows}
        return blocks | {"num_warps": self.warps}


def plan_launch(
    samples: int, pixels: int, channels: int, groups: int, itemsize: int,
    backward: bool = False, programs: int = _PROGRAMS,
) -> Plan:  # fmt: skip
    """programs: how many are wanted at least."""
    group_c = channels // groups
    # Groups are bundled while they divide up and fit 128 columns, if rows are narrow, or slabs small and many enough.
    bundle = 1
    while groups % (2 * bundle) == 0 and 2 * bundle * group_c <= 128:
        small = 2 * bundle * group_c * pixels * itemsize <= _SLAB_BYTES and samples * groups // (2 * bundle) >= programs
        if bundle * group_c * itemsize >= _ROW_BYTES and not small:
            break
        bundle *= 2
    block_c = triton.next_power_of_2(bundle * group_c)
    # What a thread holds: 16 values and the sums that go with them, or 32 where no sums are kept beside them.
    one_tile = not backward and triton.next_power_of_2(pixels) * block_c <= 2 * _TILE
    tile = 2 * _TILE if one_tile else _TILE
    rows = max(1, min(triton.next_power_of_2(pixels), tile // block_c))
    # Rounded: a device that is two thirds full or more is not worth reading x from memory once more.
    wanted = max(1, round(programs / (samples * groups // bundle)))
    splits = min(wanted, triton.cdiv(pixels, rows), 64)
    split_rows = triton.cdiv(triton.cdiv(pixels, splits), rows) * rows
    warps = max(1, min(16, rows * block_c // (1024 if one_tile else 512)))
    return Plan(bundle, block_c, rows, triton.cdiv(pixels, split_rows), split_rows, warps)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None,
    programs: int = _PROGRAMS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y, mean, rstd. x is dense in channels_last."""
    samples, channels, height, width = x.shape
    pixels = height * width
    plan = plan_launch(samples, pixels, channels, groups, x.element_size(), programs=programs)
    constants = plan.constants(channels // groups)
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


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None, programs: int = _PROGRAMS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx, dweight and dbias in one [2, C], dtemb (empty without temb). dy and x are dense in channels_last."""
    samples, channels, height, width = x.shape
    pixels = height * width
    plan = plan_launch(samples, pixels, channels, groups, x.element_size(), backward=True, programs=programs)
    constants = plan.constants(channels // groups)
    dx, dtemb = torch.empty_like(x), None if temb is None else torch.empty_like(temb)
    shares = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
    inputs = (dy, x, temb, weight, bias, mean, rstd, pixels)
    bundles = groups // plan.bundle
    if plan.splits == 1:
        _backward_kernel[(bundles, samples)](
            dx, dtemb, shares, *inputs, channels, groups,
            SILU=silu, ONE_TILE=plan.one_tile(pixels), **constants,
        )  # fmt: skip
    else:
        sums = torch.empty((samples, plan.splits, 3, channels), dtype=torch.float32, device=x.device)
        grid = (bundles, plan.splits, samples)
        rest = (plan.split_rows, channels, groups)
        _backward_partial_kernel[grid](sums, *inputs, *rest, SILU=silu, **constants)
        _backward_finish_kernel[grid](dx, dtemb, shares, sums, *inputs, *rest, SILU=silu, **constants)
    return dx, sum_programs(shares, weight.dtype), x.new_empty(0) if dtemb is None else dtemb
