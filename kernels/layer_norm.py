"""Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450).

    mean = sum(x) / C       rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)       z = (x - mean) rstd       y = z weight + bias

x, y [..., C]; weight, bias [C]. With a = dy weight, the gradients are

    dx = rstd (a - mean(a) - z mean(a z))        dweight = sum over rows of dy z        dbias = sum over rows of dy

x and y are bfloat16, float16 or float32, weight and bias one of them too; all between is float32. A row stays in
registers, so the variance is taken about the mean that was just computed and does not cancel. mean and rstd are saved.
dweight and dbias: every program sums a fixed run of rows, and a second kernel adds the programs' sums in order, so that
the same inputs give the same bits. Bytes an element, in half precision: forward 4, backward 6.
On the CPU the operators are PyTorch's layer_norm; in float32 they give what nn.LayerNorm gives, to the last bit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 4096  # the widest row whose backward pass fits into the registers of one program

# Elements a thread holds of each tensor of a tile. The backward pass holds five tensors (x, dy, weight and the two sums).
_PER_THREAD = 8
# The backward pass's programs: enough to fill the largest GPUs several times over, and never so many that their sums
# of rows are a large part of what is written. Not taken from the device, so that every device adds in the same order.
_MAX_PROGRAMS = 512
_MIN_ROWS = 8
# The last sum's tile: columns are independent, and 64 of the programs' sums are added at a time.
_SUM_PROGRAMS = 64
_SUM_COLUMNS = 32
_SUM_WARPS = 4


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition, in the precision of the tensors."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight + bias


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    start = tl.program_id(0) * ROWS
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    x_ptr += start.to(tl.int64) * width
    y_ptr += start.to(tl.int64) * width
    at = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)

    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]

    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, row < rows)
    tl.store(rstd_ptr + row, rstd, row < rows)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p * run to (p + 1) * run, ROWS at a time; its sums go to row p of dweight and dbias."""
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
        tl.store(dx_ptr + before + at, dx.to(dx_ptr.dtype.element_ty), mask)
        if AFFINE:
            dweight += dy * z
            dbias += dy
    if AFFINE:
        tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), inside)
        tl.store(dbias_ptr + program * width + column, tl.sum(dbias, axis=0), inside)


@triton.jit
def _sum_kernel(
    sums_ptr, dweight_ptr, dbias_ptr, programs, width, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """sums: [2, programs, width] float32, of dweight and of dbias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    dweight = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
    dbias = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
    for start in range(0, programs, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        mask = (program < programs)[:, None] & inside[None, :]
        at = program[:, None] * width + column[None, :]
        dweight += tl.load(sums_ptr + at, mask, other=0.0)
        dbias += tl.load(sums_ptr + programs * width + at, mask, other=0.0)
    tl.store(dweight_ptr + column, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), inside)
    tl.store(dbias_ptr + column, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), inside)


def _blocks(rows: int, width: int) -> dict[str, int]:
    """The constexprs ROWS and COLUMNS, and the number of warps: four, and more where a row alone needs them."""
    columns = triton.next_power_of_2(width)
    warps = max(4, columns // (32 * _PER_THREAD))
    tile_rows = max(1, 32 * warps * _PER_THREAD // columns)
    return {"ROWS": min(tile_rows, triton.next_power_of_2(rows)), "COLUMNS": columns, "num_warps": warps}


@on_its_device
def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        blocks = _blocks(rows, width)
        grid = (triton.cdiv(rows, blocks["ROWS"]),)
        _forward_kernel[grid](x, weight, bias, y, mean, rstd, rows, width, eps, **blocks)
    return y, mean, rstd


@on_its_device
def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dx = torch.empty_like(x)
    run = max(_MIN_ROWS, triton.cdiv(rows, _MAX_PROGRAMS))
    programs = triton.cdiv(rows, run)
    sums = torch.empty((2, programs, width) if affine else (2, 0), dtype=torch.float32, device=x.device)
    if programs:
        _backward_kernel[(programs,)](
            dy, x, weight, mean, rstd, dx, sums[0], sums[1], rows, width, run,
            **_blocks(min(rows, run), width), AFFINE=affine,
        )  # fmt: skip
    dweight, dbias = (torch.empty(width if affine else 0, dtype=weight.dtype, device=x.device) for _ in range(2))
    if affine:
        _sum_kernel[(triton.cdiv(width, _SUM_COLUMNS),)](
            sums, dweight, dbias, programs, width, PROGRAMS=_SUM_PROGRAMS, COLUMNS=_SUM_COLUMNS, num_warps=_SUM_WARPS
        )
    return dx, dweight, dbias


_forward = torch.library.custom_op("fastgrpo::layer_norm", _launch_forward, mutates_args=(), device_types="cuda")
_backward = torch.library.custom_op(
    "fastgrpo::layer_norm_backward", _launch_backward, mutates_args=(), device_types="cuda"
)


# PyTorch's own half-precision path keeps rounded statistics and sums, hence the conversions.
@_forward.register_kernel("cpu")
def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


@_backward.register_kernel("cpu")
def _backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # The bias has no part in the gradients: the last weight only stands for its shape.
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.float(), x.float(), weight.shape, mean[..., None], rstd[..., None], weight.float(), weight.float(),
        [True, affine, affine],
    )  # fmt: skip
    if not affine:
        return dx.to(x.dtype), weight.new_empty(0), weight.new_empty(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (weight.new_empty(weight.shape if affine else 0) for _ in range(2))
    return x.new_empty(x.shape), dweight, dbias


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx, dy: Tensor, d_mean: Tensor, d_rstd: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    affine = any(ctx.needs_input_grad[1:3])
    dx, dweight, dbias = _backward(dy, *ctx.saved_tensors, affine)
    return dx, dweight if affine else None, dbias if affine else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, differentiable once.

    x: [..., C] bfloat16, float16 or float32, any strides. weight, bias: [C] of one such dtype, not necessarily that of x.
    eps: added to the variance. Returns [..., C], contiguous, of the dtype of `x`.
    Frozen weights get no gradients, and the work for these is not done.
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
    return _forward(x, weight, bias, eps)[0]


def _eager(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) for outputs and gradients of the cases, whose inputs are standard normal, weight about 1.

    rtol: the result is rounded once, by truncation in Triton's interpreter, which is less than an ulp.
    atol, for float32: z and dx are sums and products of numbers below 6 with about ten roundings of half an ulp on the
    way, and a mean of C adds log2(C) / 2 more: 6 * 16 * 2^-24 is 6e-6. dweight and dbias are sums of at most 24 terms
    below 36, whose partial sums stay below 128: 24 * 128 * 2^-24 is 2e-4 if every rounding went one way, and
    about 1 / sqrt(24) of that, 4e-5, for roundings that go either way.
    """
    return torch.finfo(dtype).eps, 4e-5


def _case(*shape: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        x = torch.randn(shape, generator=generator)
        weight = 1 + 0.2 * torch.randn(shape[-1], generator=generator)
        bias = 0.2 * torch.randn(shape[-1], generator=generator)
        return *(tensor.to(device, dtype) for tensor in (x, weight, bias)), 1e-5

    return Case("x".join(map(str, shape)), make, bytes=4 * math.prod(shape))


def _aot(dtype: str, width: int) -> tuple[AotKernel, AotKernel]:
    blocks = _blocks(_MAX_PROGRAMS, width)
    warps = blocks.pop("num_warps")
    constants = dict.fromkeys(blocks, "constexpr")
    half, single = f"*{dtype}", "*fp32"
    forward = {
        "x_ptr": half,
        "weight_ptr": half,
        "bias_ptr": half,
        "y_ptr": half,
        "mean_ptr": single,
        "rstd_ptr": single,
    }
    forward |= {"rows": "i32", "width": "i32", "eps": "fp32"}
    backward = {
        "dy_ptr": half,
        "x_ptr": half,
        "weight_ptr": half,
        "mean_ptr": single,
        "rstd_ptr": single,
        "dx_ptr": half,
    }
    backward |= {"dweight_ptr": single, "dbias_ptr": single, "rows": "i32", "width": "i32", "run": "i32"}
    return (
        AotKernel(f"forward_{dtype}_{width}", _forward_kernel, forward | constants, blocks, warps),
        AotKernel(
            f"backward_{dtype}_{width}",
            _backward_kernel,
            backward | constants | {"AFFINE": "constexpr"},
            blocks | {"AFFINE": True},
            warps,
        ),
    )


SPEC = OpSpec(
    name="layer_norm",
    function=layer_norm,
    reference=reference,
    cases=(_case(1, 1), _case(3, 5), _case(24, 33), *(_case(2, 3, width) for width in (32, 64, 320, 640, 768, 1280))),
    bench=tuple(
        _case(batch, tokens, width)
        for batch in (16, 128)
        for tokens, width in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))  # SD 1.x at 512 x 512
    ),
    dtypes=DTYPES,
    tolerance=_tolerance,
    differentiable=(0, 1, 2),
    rivals={"eager": _eager},
    aot=(
        *(kernel for dtype in ("bf16", "fp16", "fp32") for width in (320, 640, 1280) for kernel in _aot(dtype, width)),
        *_aot("bf16", MAX_WIDTH),
        AotKernel(
            "sum",
            _sum_kernel,
            {"sums_ptr": "*fp32", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "programs": "i32", "width": "i32"}
            | {"PROGRAMS": "constexpr", "COLUMNS": "constexpr"},
            {"PROGRAMS": _SUM_PROGRAMS, "COLUMNS": _SUM_COLUMNS},
            _SUM_WARPS,
        ),
    ),
)
