"""GEGLU: one half of a vector times the GELU of the other (Shazeer, arXiv 2002.05202), as in diffusers' feed-forward.

    x = [h, g]          x [..., 2D]; h, g, y [..., D]
    y = h * gelu(g)     gelu(g) = g * Phi(g), Phi(g) = (1 + erf(g / sqrt 2)) / 2: exact, not the tanh approximation

and with the density phi(g) = exp(-g^2 / 2) / sqrt(2 pi), from the gradient dy:

    dh = dy * gelu(g)   dg = dy * h * (Phi(g) + g phi(g))

bfloat16, float16 or float32 in and out; all between is float32 and rounded once. Plain PyTorch writes gelu(g) and saves
it; here the backward pass computes it again from x. Bytes an element of y, in half precision: forward 6, backward 10.
On the CPU the operators compute what diffusers' module does, in its order, to the last bit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A tile of 1024 elements is 8 a thread in each tensor, or one 16-byte load in half precision. 256 columns divide every D
# of SD 1.x and 2.x (1280, 2560, 5120), so no lane idles there.
_TILE = 1024
_COLUMNS = 256
_WARPS = 4


def reference(x: Tensor) -> Tensor:
    """The definition, in the precision of `x`."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * gate * (1 + torch.erf(gate * math.sqrt(0.5))) / 2


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Row numbers are int64: at batch 256 a 4096 x 2560 input has more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def _forward_kernel(x_ptr, y_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    at = row * (2 * width) + column
    hidden = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + width, mask, other=0.0).to(tl.float32)
    y = hidden * (gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)))
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    at = row * (2 * width) + column
    hidden = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + width, mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + column, mask, other=0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    d_hidden = dy * (gate * cdf)
    d_gate = dy * hidden * (cdf + gate * pdf)
    tl.store(dx_ptr + at, d_hidden.to(dx_ptr.dtype.element_ty), mask)
    tl.store(dx_ptr + at + width, d_gate.to(dx_ptr.dtype.element_ty), mask)


def _blocks(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, and the constexprs with the number of warps, for an output of rows x width."""
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    tile_rows = min(triton.next_power_of_2(rows), _TILE // columns)
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(width, columns))
    return grid, {"ROWS": tile_rows, "COLUMNS": columns, "num_warps": _WARPS}


@on_its_device
def _launch_forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if y.numel():
        width = y.shape[-1]
        grid, blocks = _blocks(y.numel() // width, width)
        _forward_kernel[grid](x, y, y.numel() // width, width, **blocks)
    return y


@on_its_device
def _launch_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if dy.numel():
        width = dy.shape[-1]
        grid, blocks = _blocks(dy.numel() // width, width)
        _backward_kernel[grid](dy, x, dx, dy.numel() // width, width, **blocks)
    return dx


_forward = torch.library.custom_op("fastgrpo::geglu", _launch_forward, mutates_args=(), device_types="cuda")
_backward = torch.library.custom_op("fastgrpo::geglu_backward", _launch_backward, mutates_args=(), device_types="cuda")


@_forward.register_kernel("cpu")
def _forward_cpu(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return (hidden * F.gelu(gate)).contiguous()


@_backward.register_kernel("cpu")
def _backward_cpu(dy: Tensor, x: Tensor) -> Tensor:
    """The operations that autograd runs for `hidden * F.gelu(gate)`."""
    hidden, gate = x.chunk(2, dim=-1)
    return torch.cat((dy * F.gelu(gate), torch.ops.aten.gelu_backward(dy * hidden, gate)), dim=-1).contiguous()


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy: Tensor) -> Tensor:
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def geglu(x: Tensor) -> Tensor:
    """hidden * gelu(gate) with (hidden, gate) = x.chunk(2, -1), differentiable once.

    x: [..., 2D] bfloat16, float16 or float32, any strides. Returns [..., D], contiguous, of the same dtype.
    Raises ValueError for another dtype or an odd last dimension.
    """
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"geglu: x is {x.dtype} of shape {tuple(x.shape)}; accepted are bfloat16, float16 and float32 with an even last dimension."
        )
    return _forward(x)


def _eager(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) for outputs and gradients of inputs from a standard normal distribution.

    atol: below six standard deviations erf, wrong by 2 ulp of 1, moves y by at most 36 * 2^-23, about 4e-6; in the
    gradient dg the density adds as much. rtol: half precision rounds at most twice on the CPU and once by truncation in
    Triton's interpreter, an ulp either way; float32 multiplies four times, half an ulp each.
    """
    return (2 if dtype == torch.float32 else 1.01) * torch.finfo(dtype).eps, 1e-5


def _case(*shape: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        return (torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, dtype),)

    return Case("x".join(map(str, shape)), make, bytes=6 * math.prod(shape))


def _aot(name: str, kernel: triton.JITFunction, pointers: tuple[str, ...], dtype: str) -> AotKernel:
    signature = dict.fromkeys(pointers, dtype) | {
        "rows": "i32",
        "width": "i32",
        "ROWS": "constexpr",
        "COLUMNS": "constexpr",
    }
    return AotKernel(name, kernel, signature, {"ROWS": _TILE // _COLUMNS, "COLUMNS": _COLUMNS}, _WARPS)


SPEC = OpSpec(
    name="geglu",
    function=geglu,
    reference=reference,
    cases=(_case(1, 1), _case(3, 7), _case(9, 257), *(_case(2, 3, width) for width in (128, 256, 1280, 2560, 5120))),
    bench=tuple(
        _case(batch, tokens, width)
        for batch in (16, 128)
        for tokens, width in ((4096, 1280), (1024, 2560), (256, 5120), (64, 5120))  # SD 1.x at 512 x 512
    ),
    dtypes=DTYPES,
    tolerance=_tolerance,
    differentiable=(0,),
    rivals={"eager": _eager},
    aot=tuple(
        aot
        for dtype in ("bf16", "fp16", "fp32")
        for aot in (
            _aot(f"forward_{dtype}", _forward_kernel, ("x_ptr", "y_ptr"), f"*{dtype}"),
            _aot(f"backward_{dtype}", _backward_kernel, ("dy_ptr", "x_ptr", "dx_ptr"), f"*{dtype}"),
        )
    ),
)
