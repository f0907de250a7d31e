"""GEGLU: one half of a vector times the GELU of the other (Shazeer, arXiv 2002.05202), as in diffusers' feed-forward.

    x + bias = [h, g]   (or x = [h, g])      x [..., 2D]; bias [2D]; h, g, y [..., D]
    y = h * gelu(g)     gelu(g) = g * Phi(g), Phi(g) = (1 + erf(g / sqrt 2)) / 2: exact, not the tanh approximation

and with the density phi(g) = exp(-g^2 / 2) / sqrt(2 pi), from the gradient dy:

    dh = dy * gelu(g)   dg = dy * h * (Phi(g) + g phi(g))   dx = [dh, dg]   dbias = sum over rows of dx

bfloat16, float16 or float32 in and out; all between is float32 and rounded once. Plain PyTorch writes gelu(g) and saves
it; here the backward pass computes it again from x. Bytes an element of y, in half precision: forward 6, backward 10.
The bias is that of the linear layer before: dx is a transformer's largest activation, and to sum it apart would read it
once more, 4 bytes. Here every program sums a fixed run of rows (2 KiB), and a second kernel adds the programs' sums in
order: the same inputs give the same bits. On the CPU without a bias the bits are those of diffusers' module.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels import program_sums
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import DTYPES, on_its_device

# A tile of 1024 elements is 8 a thread in each tensor, or one 16-byte load in half precision. 256 columns divide every
# D of SD 1.x and 2.x (1280, 2560, 5120), so no lane idles there.
_TILE = 1024
# With 8 a thread the backward pass takes 127 registers where it sums, and leaves a multiprocessor 16 warps; 4 take 61.
_BACKWARD_TILE = 512
_COLUMNS = 256
_WARPS = 4
# The backward pass's programs where they sum: several for every multiprocessor of the largest GPUs, with rows enough
# that the sums are at most a twentieth of what they move. Not taken from the device: all devices add in one order.
_MAX_PROGRAMS = 4096
_MIN_ROWS = 32


def reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the definition, in the precision of `x`."""
    hidden, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return hidden * gate * (1 + torch.erf(gate * math.sqrt(0.5))) / 2


@triton.jit
def _columns(width, COLUMNS: tl.constexpr):
    """Returns the program's place among the rows, and its columns: programs go through memory in order."""
    blocks = (width + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    return program // blocks, program % blocks * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _load_bias(bias_ptr, column, width, COLUMNS: tl.constexpr):
    """Loads the bias of the two halves, 0 where bias_ptr is None."""
    hidden = tl.zeros([COLUMNS], tl.float32)
    gate = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        hidden = tl.load(bias_ptr + column, column < width, other=0.0).to(tl.float32)
        gate = tl.load(bias_ptr + width + column, column < width, other=0.0).to(tl.float32)
    return hidden, gate


@triton.jit
def _load_halves(x_ptr, at, mask, width, bias):
    hidden = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) + bias[0][None, :]
    gate = tl.load(x_ptr + at + width, mask, other=0.0).to(tl.float32) + bias[1][None, :]
    return hidden, gate


@triton.jit
def _forward_kernel(x_ptr, bias_ptr, y_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program, column = _columns(width, COLUMNS)
    start = program * ROWS
    mask = (start + tl.arange(0, ROWS) < rows)[:, None] & (column < width)[None, :]
    # int64: at batch 256 a 4096 x 2560 input has more than 2^31 elements.
    before = start.to(tl.int64) * width
    row = tl.arange(0, ROWS)[:, None] * width
    bias = _load_bias(bias_ptr, column, width, COLUMNS)
    hidden, gate = _load_halves(x_ptr + 2 * before, 2 * row + column[None, :], mask, width, bias)
    y = hidden * (gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)))
    tl.store(y_ptr + before + row + column[None, :], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, parts_ptr, rows, width, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p * run to (p + 1) * run, ROWS at a time; its sums are row p of parts [programs, 2D]."""
    program, column = _columns(width, COLUMNS)
    row = tl.arange(0, ROWS)[:, None] * width
    bias = _load_bias(bias_ptr, column, width, COLUMNS)
    # A sum for every row of the tile: adding up within the tile once, at the end, keeps the loop free of exchanges.
    sum_hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * run, rows)
    for start in range(program * run, end, ROWS):
        mask = (start + tl.arange(0, ROWS) < end)[:, None] & (column < width)[None, :]
        before = tl.cast(start, tl.int64) * width
        at = 2 * row + column[None, :]
        hidden, gate = _load_halves(x_ptr + 2 * before, at, mask, width, bias)
        # 0 in rows that do not exist, and with it what is added to their sums.
        dy = tl.load(dy_ptr + before + row + column[None, :], mask, other=0.0).to(tl.float32)
        cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        d_hidden = dy * (gate * cdf)
        d_gate = dy * hidden * (cdf + gate * pdf)
        tl.store(dx_ptr + 2 * before + at, d_hidden.to(dx_ptr.dtype.element_ty), mask)
        tl.store(dx_ptr + 2 * before + at + width, d_gate.to(dx_ptr.dtype.element_ty), mask)
        if SUMS:
            sum_hidden += d_hidden
            sum_gate += d_gate
    if SUMS:
        parts_ptr += tl.cast(program, tl.int64) * 2 * width
        tl.store(parts_ptr + column, tl.sum(sum_hidden, axis=0), column < width)
        tl.store(parts_ptr + width + column, tl.sum(sum_gate, axis=0), column < width)


def _blocks(rows: int, width: int, tile: int) -> tuple[int, dict[str, int]]:
    """Returns how many programs lie side by side in a row of y [rows, width], and what a kernel is compiled for."""
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    tile_rows = min(triton.next_power_of_2(rows), tile // columns)
    return triton.cdiv(width, columns), {"ROWS": tile_rows, "COLUMNS": columns, "num_warps": _WARPS}


def _run(rows: int, across: int, tile_rows: int, sums: bool) -> int:
    """Returns the rows of a program of the backward pass, of `across` side by side: whole tiles, one without sums."""
    run = max(_MIN_ROWS, triton.cdiv(rows, max(1, _MAX_PROGRAMS // across))) if sums else tile_rows
    return triton.cdiv(run, tile_rows) * tile_rows


@on_its_device
def _launch_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if y.numel():
        width = y.shape[-1]
        rows = y.numel() // width
        across, blocks = _blocks(rows, width, _TILE)
        _forward_kernel[(triton.cdiv(rows, blocks["ROWS"]) * across,)](x, bias, y, rows, width, **blocks)
    return y


@on_its_device
def _launch_backward(dy: Tensor, x: Tensor, bias: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """Returns dx and dbias, which is [0] without `sums`."""
    dy, x, bias = dy.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    dx = torch.empty_like(x)
    programs = 0
    width = dy.shape[-1]
    if dy.numel():
        rows = dy.numel() // width
        across, blocks = _blocks(rows, width, _BACKWARD_TILE)
        run = _run(rows, across, blocks["ROWS"], sums)
        programs = triton.cdiv(rows, run)
    parts = torch.empty((programs, 2 * width if sums else 0), dtype=torch.float32, device=x.device)
    if programs:
        _backward_kernel[(programs * across,)](dy, x, bias, dx, parts, rows, width, run, **blocks, SUMS=sums)
    return dx, program_sums.sum_programs(parts, x.dtype if bias is None else bias.dtype)


_forward = torch.library.custom_op("fastgrpo::geglu", _launch_forward, mutates_args=(), device_types="cuda")
_backward = torch.library.custom_op("fastgrpo::geglu_backward", _launch_backward, mutates_args=(), device_types="cuda")


def _shifted(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the two halves, with a bias in float32."""
    hidden, gate = (x if bias is None else x.float() + bias.float()).chunk(2, dim=-1)
    return hidden, gate


@_forward.register_kernel("cpu")
def _forward_cpu(x: Tensor, bias: Tensor | None) -> Tensor:
    hidden, gate = _shifted(x, bias)
    return (hidden * F.gelu(gate)).to(x.dtype).contiguous()


@_backward.register_kernel("cpu")
def _backward_cpu(dy: Tensor, x: Tensor, bias: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """Runs the operations of autograd for `hidden * F.gelu(gate)`."""
    hidden, gate = _shifted(x, bias)
    dy = dy.to(gate.dtype)
    dx = torch.cat((dy * F.gelu(gate), torch.ops.aten.gelu_backward(dy * hidden, gate)), dim=-1)
    dbias = x.new_empty(0) if bias is None or not sums else dx.flatten(0, -2).sum(0).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dbias


_forward.register_fake(lambda x, bias: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None or not sums else bias.new_empty(bias.shape)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    sums = ctx.needs_input_grad[1]
    dx, dbias = _backward(dy, *ctx.saved_tensors, sums)
    return dx, dbias if sums else None


_forward.register_autograd(_autograd, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes hidden * gelu(gate) with (hidden, gate) = (x + bias).chunk(2, -1), differentiable once.

    x: [..., 2D] bfloat16, float16 or float32, any strides. bias: [2D] of one such dtype, not necessarily that of x; a
    frozen one gets no gradient. Returns [..., D], contiguous, of x's dtype.
    Raises ValueError for another dtype or an odd last dimension.
    """
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] % 2:
        accepted = "bfloat16, float16 and float32 with an even last dimension"
        raise ValueError(f"geglu: x is {x.dtype} of shape {tuple(x.shape)}; accepted are {accepted}.")
    if bias is not None and (bias.dtype not in DTYPES or bias.shape != x.shape[-1:]):
        accepted = f"bfloat16, float16 and float32 of shape {tuple(x.shape[-1:])}"
        raise ValueError(f"geglu: bias is {bias.dtype} of shape {tuple(bias.shape)}; accepted are {accepted}.")
    return _forward(x, bias)
