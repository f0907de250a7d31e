"""AdamW on flat buffers, in one pass: gradient scale, weight decay, moments, bias correction, half-precision copy, EMA.

For step t, learning rate lr and gradient g (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the order of
roundings is that of torch.optim.AdamW):

    g = scale * gradient                   scale: clip coefficient / loss scale
    p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m)
    v = v * beta2 + (1 - beta2) * g * g
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    working = p in bf16 or fp16            optional
    ema = ema + (1 - ema_decay) * (p - ema)                     optional

parameters, exp_avg (m), exp_avg_sq (v), ema: [n] float32. gradient: [n] float32, bf16 or fp16. working: [n] bf16 or
fp16. Bytes an element: 28 with a float32 gradient, 2 more with a working copy, 8 more with an average.

Step counter, learning rate, scale and `found_inf` are read on the device: a CUDA graph of a step stays right, and the
host need not know that a step is left out since its gradient is not finite. Scale and `found_inf` come from

    norm = global_norm(gradient)           sqrt(sum g^2), summed in float64, in two stages, in an order fixed by n alone
    scale, found_inf = clip_coefficient(norm, max_norm, loss_scale)

which is torch.nn.utils.clip_grad_norm_ with a better sum. 4 (or 2) bytes an element more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import HALF, on_its_device

# 4 elements a thread of 128: a 16-byte load from each of four or five buffers is enough in flight. 8 take three times
# the registers, since half-precision stores would want another layout.
_BLOCK = 512
# The norm reads one buffer, with two such loads for each of 256 threads. The number of programs is fixed, so that the
# order of the sum, and with it the norm, is the same on every GPU: about two waves of 132 SMs.
_NORM_BLOCK = 2048
_NORM_PROGRAMS = 2048
_CPU_CHUNK = 1 << 16  # elements of every buffer that the CPU works on at a time: together they fit into its cache

# Products and sums are only fused where torch fuses them, by tl.fma: every rounding is then where torch has it.
_OPTIONS = {"enable_fp_fusion": False}


class AdamWArguments(NamedTuple):
    """The operator's arguments, in its order; `fused_adamw` describes them."""

    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    step: Tensor
    lr: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    working: Tensor | None = None
    ema: Tensor | None = None
    ema_decay: float = 0.0


def reference(a: AdamWArguments) -> tuple[Tensor, ...]:
    """Returns parameters, exp_avg, exp_avg_sq, step, and working and ema if given, as they are after a step."""
    dtype = a.parameters.dtype
    t, rate = a.step.item() + 1, a.lr.item()
    g = a.gradient.to(dtype) * (1 if a.scale is None else a.scale.to(dtype))
    m = a.beta1 * a.exp_avg + (1 - a.beta1) * g
    v = a.beta2 * a.exp_avg_sq + (1 - a.beta2) * g * g
    p = a.parameters * (1 - rate * a.weight_decay)
    p = p - rate * (m / (1 - a.beta1**t)) / ((v / (1 - a.beta2**t)).sqrt() + a.eps)
    after = [p, m, v, a.step + 1]
    if a.working is not None:
        after.append(p.to(a.working.dtype))
    if a.ema is not None:
        after.append(a.ema_decay * a.ema + (1 - a.ema_decay) * p)
    return tuple(after)


@triton.jit
def _power(base, exponent):
    """base ** exponent of a float64 and an integer not below 0, by squaring: relative error up to exponent * 2^-53."""
    power = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        power = tl.where(exponent % 2 == 1, power * base, power)
        base = base * base
        exponent = exponent // 2
    return power


@triton.jit
def _coefficients_kernel(
    step_ptr, lr_ptr, scale_ptr, found_inf_ptr, coefficients_ptr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
):  # fmt: skip
    """One program computes in float64 what all elements share, rounds it once, and counts the step.

    The betas are constants of the program since Triton passes floats as float32, in which 1 - beta2 is off by 1e-5.
    """
    taken = tl.full((), 1, tl.int64)
    if found_inf_ptr is not None:
        taken = (tl.load(found_inf_ptr) == 0).to(tl.int64)
    scale = tl.full((), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    step = tl.load(step_ptr).to(tl.int64) + taken
    tl.store(step_ptr, step.to(step_ptr.dtype.element_ty))
    t = tl.maximum(step, 1)  # 0 where the very first step is left out
    lr = tl.load(lr_ptr).to(tl.float64)
    decay = 1 - lr * tl.full((), WEIGHT_DECAY, tl.float64)
    step_size = lr / (1 - _power(tl.full((), BETA1, tl.float64), t))
    root = tl.sqrt(1 - _power(tl.full((), BETA2, tl.float64), t))
    tl.store(coefficients_ptr, decay.to(tl.float32))
    tl.store(coefficients_ptr + 1, -step_size.to(tl.float32))
    tl.store(coefficients_ptr + 2, root.to(tl.float32))
    tl.store(coefficients_ptr + 3, scale)
    tl.store(coefficients_ptr + 4, taken.to(tl.float32))


@triton.jit
def _lerp(start, end, weight):
    """Interpolates from the nearer end, as torch.lerp does."""
    difference = end - start
    return tl.where(weight < 0.5, tl.fma(difference, weight, start), end - difference * (1 - weight))


@triton.jit
def _update(
    parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, gradient_ptr, working_ptr, ema_ptr, at, mask,
    decay, step_size_neg, root, scale, weight1, beta2, weight2, eps, ema_weight,
):  # fmt: skip
    """Takes the step for the elements `at`; with a mask only for those where it is true."""
    g = tl.load(gradient_ptr + at, mask=mask).to(tl.float32) * scale
    p = tl.load(parameters_ptr + at, mask=mask).to(tl.float32)
    m = tl.load(exp_avg_ptr + at, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + at, mask=mask).to(tl.float32)
    p = p * decay
    m = _lerp(m, g, weight1)
    v = tl.fma(weight2 * g, g, v * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
    p = p + tl.div_rn(step_size_neg * m, denominator)
    tl.store(parameters_ptr + at, p, mask=mask)
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)
    if working_ptr is not None:
        tl.store(working_ptr + at, p.to(working_ptr.dtype.element_ty), mask=mask)
    if ema_ptr is not None:
        average = tl.load(ema_ptr + at, mask=mask).to(tl.float32)
        tl.store(ema_ptr + at, _lerp(average, p, ema_weight), mask=mask)


@triton.jit
def _adamw_kernel(
    parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, gradient_ptr, working_ptr, ema_ptr, coefficients_ptr,
    n, weight1, beta2, weight2, eps, ema_weight, BLOCK: tl.constexpr,
):  # fmt: skip
    decay = tl.load(coefficients_ptr)
    step_size_neg = tl.load(coefficients_ptr + 1)
    root = tl.load(coefficients_ptr + 2)
    scale = tl.load(coefficients_ptr + 3)
    taken = tl.load(coefficients_ptr + 4)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    end = tl.where(taken != 0, n, 0)  # a step that is left out reads and writes nothing
    # A full block goes without a mask: unless n is a multiple of 16, that would make every access one of 4 bytes.
    if start + BLOCK <= end:
        _update(
            parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, gradient_ptr, working_ptr, ema_ptr, at, None,
            decay, step_size_neg, root, scale, weight1, beta2, weight2, eps, ema_weight,
        )  # fmt: skip
    else:
        _update(
            parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, gradient_ptr, working_ptr, ema_ptr, at, at < end,
            decay, step_size_neg, root, scale, weight1, beta2, weight2, eps, ema_weight,
        )  # fmt: skip


@triton.jit
def _squares_kernel(gradient_ptr, partials_ptr, n, BLOCK: tl.constexpr):
    """Program i sums the squares of blocks i, i + programs, ...: in float64 they neither round nor overflow."""
    total = tl.zeros((BLOCK,), tl.float64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= n:  # without a mask, as in _adamw_kernel
            g = tl.load(gradient_ptr + at).to(tl.float64)
        else:
            g = tl.load(gradient_ptr + at, mask=at < n, other=0.0).to(tl.float64)
        total += g * g
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _root_kernel(partials_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(partials)).to(tl.float32))


@triton.jit
def _clip_kernel(norm_ptr, loss_scale_ptr, coefficient_ptr, found_inf_ptr, max_norm):
    norm = tl.load(norm_ptr).to(tl.float32)
    inverse = tl.full((), 1.0, tl.float32)
    if loss_scale_ptr is not None:
        inverse = tl.div_rn(inverse, tl.load(loss_scale_ptr).to(tl.float32))
    coefficient = tl.div_rn(tl.full((), 1.0, tl.float32), norm * inverse + 1e-6) * max_norm
    tl.store(coefficient_ptr, tl.where(coefficient > 1, 1.0, coefficient) * inverse)
    tl.store(found_inf_ptr, tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0))


@on_its_device
def _launch_fused_adamw(*arguments: Any) -> None:
    """arguments: those of `AdamWArguments`, in its order."""
    a = AdamWArguments(*arguments)
    n = a.parameters.numel()
    coefficients = torch.empty(5, dtype=torch.float32, device=a.parameters.device)
    _coefficients_kernel[(1,)](
        a.step, a.lr, a.scale, a.found_inf, coefficients, a.beta1, a.beta2, a.weight_decay, num_warps=1, **_OPTIONS
    )
    _adamw_kernel[(triton.cdiv(n, _BLOCK),)](
        a.parameters, a.exp_avg, a.exp_avg_sq, a.gradient, a.working, a.ema, coefficients,
        n, 1 - a.beta1, a.beta2, 1 - a.beta2, a.eps, 1 - a.ema_decay, _BLOCK, num_warps=4, **_OPTIONS,
    )  # fmt: skip


@on_its_device
def _launch_global_norm(gradient: Tensor) -> Tensor:
    n = gradient.numel()
    count = min(triton.cdiv(n, _NORM_BLOCK), _NORM_PROGRAMS)
    partials = torch.empty(count, dtype=torch.float64, device=gradient.device)
    norm = torch.empty(1, dtype=torch.float32, device=gradient.device)
    _squares_kernel[(count,)](gradient, partials, n, _NORM_BLOCK, num_warps=8)
    _root_kernel[(1,)](partials, norm, count, _NORM_PROGRAMS, num_warps=4)
    return norm


@on_its_device
def _launch_clip_coefficient(norm: Tensor, max_norm: float, loss_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    coefficient, found_inf = torch.empty_like(norm), torch.empty_like(norm)
    _clip_kernel[(1,)](norm, loss_scale, coefficient, found_inf, max_norm, num_warps=1, **_OPTIONS)
    return coefficient, found_inf


_adamw_operator = torch.library.custom_op(
    "fastgrpo::fused_adamw",
    _launch_fused_adamw,
    mutates_args=("parameters", "exp_avg", "exp_avg_sq", "step", "working", "ema"),
    device_types="cuda",
    # No defaults: arguments that equal them are left out on the way, and torch 2.11 then misses those that are mutated.
    schema="(Tensor(a!) parameters, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor gradient, Tensor(d!) step, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, Tensor? scale, Tensor? found_inf, "
    "Tensor(e!)? working, Tensor(f!)? ema, float ema_decay) -> ()",
)
_norm_operator = torch.library.custom_op(
    "fastgrpo::global_norm", _launch_global_norm, mutates_args=(), device_types="cuda"
)
_clip_operator = torch.library.custom_op(
    "fastgrpo::clip_coefficient", _launch_clip_coefficient, mutates_args=(), device_types="cuda"
)


@_adamw_operator.register_kernel("cpu")
def _cpu_fused_adamw(*arguments: Any) -> None:
    """Runs the very operations of torch.optim.AdamW, for the same bits."""
    a = AdamWArguments(*arguments)
    if a.found_inf is not None and a.found_inf.item():
        return
    a.step.add_(1)
    t, rate = int(a.step.item()), a.lr.item()
    decay = 1 - rate * a.weight_decay
    step_size = rate / (1 - a.beta1**t)
    root = (1 - a.beta2**t) ** 0.5
    for start in range(0, a.parameters.numel(), _CPU_CHUNK):
        here = slice(start, start + _CPU_CHUNK)
        p, m, v, g = a.parameters[here], a.exp_avg[here], a.exp_avg_sq[here], a.gradient[here].float()
        if a.scale is not None:
            g = g * a.scale
        p.mul_(decay)
        m.lerp_(g, 1 - a.beta1)
        v.mul_(a.beta2).addcmul_(g, g, value=1 - a.beta2)
        p.addcdiv_(m, v.sqrt().div_(root).add_(a.eps), value=-step_size)
        if a.working is not None:
            a.working[here].copy_(p)
        if a.ema is not None:
            a.ema[here].lerp_(p, 1 - a.ema_decay)


@_norm_operator.register_kernel("cpu")
def _cpu_global_norm(gradient: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in gradient.split(_CPU_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1)


@_clip_operator.register_kernel("cpu")
def _cpu_clip_coefficient(norm: Tensor, max_norm: float, loss_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    inverse = torch.ones_like(norm) if loss_scale is None else loss_scale.reciprocal()
    coefficient = (max_norm / (norm * inverse + 1e-6)).clamp(max=1.0) * inverse
    return coefficient, (~norm.isfinite()).float()


_adamw_operator.register_fake(lambda *arguments: None)
_norm_operator.register_fake(lambda gradient: gradient.new_empty(1, dtype=torch.float32))
_clip_operator.register_fake(lambda norm, *rest: (torch.empty_like(norm), torch.empty_like(norm)))


def fused_adamw(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    working: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
) -> None:
    """Takes one optimizer step in place, on parameters, exp_avg, exp_avg_sq, step, working and ema.

    parameters, exp_avg, exp_avg_sq, ema: [n] float32. gradient: [n] float32, bfloat16 or float16. working: [n] bfloat16
    or float16, receives the new parameters. step: [1] int64 or float32, steps taken so far. lr: [1] float64 or float32;
    float64 gives the bits of a Python number. scale: [1] float32, multiplies the gradient. found_inf: [1] float32,
    where not 0 nothing changes, the counter included. All are contiguous and on one device.
    On the CPU parameters and moments get the bits that torch.optim.AdamW would give them.
    Raises ValueError for a wrong shape, dtype, memory layout or device.
    """
    n, device = parameters.numel(), parameters.device
    floats = (torch.float32,)
    accepted = {
        "parameters": (parameters, n, floats),
        "exp_avg": (exp_avg, n, floats),
        "exp_avg_sq": (exp_avg_sq, n, floats),
        "gradient": (gradient, n, (*floats, *HALF)),
        "step": (step, 1, (torch.int64, *floats)),
        "lr": (lr, 1, (torch.float64, *floats)),
        "scale": (scale, 1, floats),
        "found_inf": (found_inf, 1, floats),
        "working": (working, n, HALF),
        "ema": (ema, n, floats),
    }
    for name, (tensor, size, dtypes) in accepted.items():
        if tensor is not None:
            _check(name, tensor, size, dtypes, device)
    _adamw_operator(
        parameters, exp_avg, exp_avg_sq, gradient, step, lr, beta1, beta2, eps, weight_decay,
        scale, found_inf, working, ema, ema_decay,
    )  # fmt: skip


def global_norm(gradient: Tensor) -> Tensor:
    """Returns the 2-norm, [1] float32, of [n] float32, bfloat16 or float16; inf or nan where an element is.

    Its sum is float64, in a fixed order: the same bits every time, correctly rounded but for one case in millions.
    Raises ValueError for a wrong shape, dtype or memory layout.
    """
    _check("gradient", gradient, gradient.numel(), (torch.float32, *HALF), gradient.device)
    return _norm_operator(gradient)


def clip_coefficient(norm: Tensor, max_norm: float, loss_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns what the gradient is to be multiplied by, and whether it may not be used: `fused_adamw` takes both.

    norm: [1] float32, of the gradient as it is. loss_scale: [1] float32, by which that is too large. max_norm: inf for
    no clipping. Returns
        scale     [1] float32, min(1, max_norm / (norm / loss_scale + 1e-6)) / loss_scale, as clip_grad_norm_ has it
        found_inf [1] float32, 1 where the norm is inf or nan, otherwise 0, as GradScaler has it
    Raises ValueError for a wrong shape or dtype.
    """
    for name, tensor in (("norm", norm), ("loss_scale", loss_scale)):
        if tensor is not None:
            _check(name, tensor, 1, (torch.float32,), norm.device)
    return _clip_operator(norm, max_norm, loss_scale)


def _check(name: str, tensor: Tensor, size: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    fits = tensor.shape == (size,) and size > 0 and tensor.dtype in dtypes and tensor.device == device
    if not (fits and tensor.is_contiguous()):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"accepted is a contiguous, not empty [{size}] tensor of {names} on {device}"
        )
