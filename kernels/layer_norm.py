"""Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450), of a sum where there is a residual.

    s = x + residual        (or s = x)
    mean = sum(s) / C     rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)     z = (s - mean) rstd     y = z weight + bias

x, residual, s, y [..., C]; weight, bias [C]. With a = dy weight and ds the gradient of s as an output:

    dx = dresidual = rstd (a - mean(a) - z mean(a z)) + ds
    dweight = sum over rows of dy z                          dbias = sum over rows of dy

x, residual, s and y are bfloat16, float16 or float32, weight and bias one of them too; all between is float32. y is of
s as it is stored, rounded. A row stays in registers: the variance is taken about its mean and does not cancel. s, mean
and rstd are kept for the backward pass. For dweight and dbias every program sums a fixed run of rows, and a second
kernel adds the programs' sums in order: the same inputs give the same bits. Bytes an element in half precision: forward
4, backward 6; with a residual 8 and 8, where an addition of its own would make 10 and 12. The backward pass also adds
the gradient of x where x is used beside its norm. On the CPU in float32 the bits are those of nn.LayerNorm.
"""

import torch
from torch import Tensor

from fastgrpo.kernels import program_sums
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import DTYPES, on_its_device

MAX_WIDTH = 4096  # the widest row whose backward pass fits into the registers of one program

# Elements a thread holds of each tensor of a tile; the backward pass holds six: s, dy, ds, weight and the two sums.
_PER_THREAD = 8
# The backward pass's programs: enough to fill the largest GPUs several times over, few enough that their sums are a
# small part of what is written. Not taken from the device, so that every device adds in the same order.
_MAX_PROGRAMS = 512
_MIN_ROWS = 8


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, keep: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes the definition, in the precision of the tensors."""
    total = x if residual is None else x + residual
    centred = total - total.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight + bias
    return (total, y) if keep or residual is not None else y


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, rows, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """residual_ptr and sum_ptr are None together."""
    start = tl.program_id(0) * ROWS
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    before = start.to(tl.int64) * width
    at = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    x = tl.load(x_ptr + before + at, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total = x + tl.load(residual_ptr + before + at, mask, other=0.0).to(tl.float32)
        total = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + before + at, total, mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)

    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]

    tl.store(y_ptr + before + at, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, row < rows)
    tl.store(rstd_ptr + row, rstd, row < rows)


@triton.jit
def _backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, parts_ptr, rows, width, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p * run to (p + 1) * run, ROWS at a time; its sums are row p of parts [programs, 2, width].

    x is what was normalised. dsum_ptr: None without a residual.
    """
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    at = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    # A sum for every row of the tile: adding up within the tile once, at the end, keeps the loop free of exchanges.
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * run, rows)
    for start in range(program * run, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        before = tl.cast(start, tl.int64) * width
        x = tl.load(x_ptr + before + at, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + before + at, mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, row < end, other=0.0)
        rstd = tl.load(rstd_ptr + row, row < end, other=0.0)
        z = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        a = dy * weight[None, :]
        mean_a = tl.sum(a, axis=1) / width
        mean_az = tl.sum(a * z, axis=1) / width
        dx = rstd[:, None] * (a - mean_a[:, None] - z * mean_az[:, None])
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + before + at, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + before + at, dx.to(dx_ptr.dtype.element_ty), mask)
        if AFFINE:
            dweight += dy * z
            dbias += dy
    if AFFINE:
        parts_ptr += program * 2 * width
        tl.store(parts_ptr + column, tl.sum(dweight, axis=0), inside)
        tl.store(parts_ptr + width + column, tl.sum(dbias, axis=0), inside)


def _blocks(rows: int, width: int) -> dict[str, int]:
    """Returns what a kernel is compiled for: the tile, and four warps or more where a row alone needs them."""
    columns = triton.next_power_of_2(width)
    warps = max(4, columns // (32 * _PER_THREAD))
    tile_rows = max(1, 32 * warps * _PER_THREAD // columns)
    return {"ROWS": min(tile_rows, triton.next_power_of_2(rows)), "COLUMNS": columns, "num_warps": warps}


@on_its_device
def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, the sum (empty without a residual), mean and rstd."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    total = None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        blocks = _blocks(rows, width)
        grid = (triton.cdiv(rows, blocks["ROWS"]),)
        _forward_kernel[grid](x, residual, weight, bias, total, y, mean, rstd, rows, width, eps, **blocks)
    return y, x.new_empty(0) if total is None else total, mean, rstd


@on_its_device
def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns dx, and dweight and dbias [2, C], or [2, 0] if they are not wanted. x: what was normalised."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dx = torch.empty_like(x)
    run = max(_MIN_ROWS, triton.cdiv(rows, _MAX_PROGRAMS))
    programs = triton.cdiv(rows, run)
    parts = torch.empty((programs, 2, width if affine else 0), dtype=torch.float32, device=x.device)
    if programs:
        _backward_kernel[(programs,)](
            dy, dsum, x, weight, mean, rstd, dx, parts, rows, width, run,
            **_blocks(min(rows, run), width), AFFINE=affine,
        )  # fmt: skip
    return dx, program_sums.sum_programs(parts, weight.dtype)


_forward = torch.library.custom_op("fastgrpo::layer_norm", _launch_forward, mutates_args=(), device_types="cuda")
_backward = torch.library.custom_op(
    "fastgrpo::layer_norm_backward", _launch_backward, mutates_args=(), device_types="cuda"
)


# PyTorch's own half-precision path keeps rounded statistics and sums, hence the conversions.
@_forward.register_kernel("cpu")
def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    total = x if residual is None else (x + residual).contiguous()
    y, mean, rstd = torch.native_layer_norm(total.float(), weight.shape, weight.float(), bias.float(), eps)
    y, mean, rstd = y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)
    return y, x.new_empty(0) if residual is None else total, mean, rstd


@_backward.register_kernel("cpu")
def _backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The bias has no part in the gradients: the last weight only stands for its shape.
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.float(), x.float(), weight.shape, mean[..., None], rstd[..., None], weight.float(), weight.float(),
        [True, affine, affine],
    )  # fmt: skip
    dx = (dx if dsum is None else dx + dsum.float()).to(x.dtype).contiguous()
    return dx, torch.stack((dweight, dbias)).to(weight.dtype) if affine else weight.new_empty((2, 0))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty((2, weight.shape[0] if affine else 0))


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _, residual = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.residual = residual is not None
    ctx.mark_non_differentiable(*([] if ctx.residual else [total]), mean, rstd)


def _gradients(ctx, dy: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns dx, dweight and dbias."""
    affine = any(ctx.needs_input_grad[1:3])
    dx, vectors = _backward(dy, *ctx.saved_tensors, affine, dsum)
    return dx, *(vectors.unbind() if affine else (None, None))


def _autograd(ctx, dy: Tensor, dsum: Tensor, *_) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, dy, dsum if ctx.residual else None)
    return *gradients, None, gradients[0] if ctx.residual else None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Keeping(torch.autograd.Function):
    """Returns x itself, which no operator may, and its norm, so that one backward pass has the gradients of both."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, _, mean, rstd = _forward(x, weight, bias, eps, None)
        ctx.save_for_backward(x, weight, mean, rstd)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, dsum: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, dsum), None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, keep: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, differentiable once.

    x: [..., C] bfloat16, float16 or float32, any strides. weight, bias: [C] of one such dtype, not necessarily that of
    x; frozen ones get no gradients, and the work for these is not done. eps: added to the variance. residual: of x's
    shape and dtype. keep: return x beside its norm; the backward pass then adds the gradients of both.
    Returns [..., C], contiguous, of x's dtype; with a residual two of them, x + residual and its norm.
    Raises ValueError for other dtypes and shapes, and for C above 4096.
    """
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or bias.dtype != weight.dtype:
        raise ValueError(
            f"layer_norm: x is {x.dtype}, weight {weight.dtype}, bias {bias.dtype}; accepted are bfloat16, float16 and "
            "float32, the same for weight and bias."
        )
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH or not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            f"layer_norm: x is {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; accepted are "
            f"[..., C], [C] and [C] with C from 1 to {MAX_WIDTH}."
        )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        given = f"residual is {residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"layer_norm: {given}; x's {x.dtype} {tuple(x.shape)} is accepted.")
    if keep and residual is None:
        return _Keeping.apply(x, weight, bias, eps)
    y, total, _, _ = _forward(x, weight, bias, eps, residual)
    return y if residual is None else (total, y)
