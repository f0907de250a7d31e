"""Group normalisation and SiLU of channels-last activations plus a time embedding, in one pass over memory.

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
    dweight = sum over samples and pixels of dz * xhat      dbias = the same of dz      dtemb = sum over pixels of dx

All three gradients of vectors follow from three sums per sample and channel, of dz, dz * xhat and xhat.
Bytes an element in half precision: forward 4 (x once, y once), backward 6 (x, dy, dx). In channels-last memory a group
is H * W rows of only 2 * D bytes, so a program takes a bundle of neighbouring groups.
On CUDA there are two backends, Triton (group_norm_silu_triton.py) and CUDA C++ (csrc/, by group_norm_silu_cuda.py);
`BACKENDS` chooses and says which is used.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels import group_norm_silu_cuda, group_norm_silu_triton, native
from fastgrpo.kernels.operators import DTYPES, on_its_device
from fastgrpo.kernels.timing import device_milliseconds

_log = logging.getLogger("fastgrpo")

AUTO, TRITON, NATIVE = "auto", "triton", "native"


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """Computes the formula in plain operations, in the dtype it is given."""
    value = x if temb is None else x + temb[:, :, None, None]
    grouped = value.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normalised = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    z = normalised.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return z * torch.sigmoid(z) if silu else z


class Backends:
    """Chooses who computes a call on CUDA: the backend that was named, or the faster one for each kind of call.

    Measurements differ from run to run, and the backends in their last bits. So a run keeps its `choices`, and a
    resumed one sets them again by `set_choices`: it computes what it would have.
    """

    def __init__(self) -> None:
        self._setting = AUTO
        self._chosen: dict[str, str] = {}
        self._told: set[str] = set()

    def set(self, name: str) -> None:
        """Uses the backend of this name for every call from now on, or with "auto" the faster one for each kind.

        Raises ValueError for another name, and for "native" where it cannot be had.
        """
        accepted = (AUTO, TRITON, NATIVE)
        if name not in accepted:
            raise ValueError(f"the backend of group_norm_silu is {name!r}; {', '.join(accepted)} are accepted")
        if name == NATIVE and (reason := native.available()):
            raise ValueError(f"the backend of group_norm_silu cannot be {name!r}: {reason}")
        self._setting = name

    def choices(self) -> dict[str, str]:
        """Returns what "auto" has chosen so far: kind of call -> backend; strings, which a run can keep as JSON."""
        return dict(self._chosen)

    def set_choices(self, choices: Mapping[str, str]) -> None:
        """Replaces what "auto" has chosen by the `choices` of an earlier run; other kinds of calls are measured.

        Raises ValueError for an unknown backend. One that cannot be had here is replaced with a warning, when called.
        """
        for key, name in choices.items():
            if name not in (TRITON, NATIVE):
                raise ValueError(
                    f"the backend of group_norm_silu chosen for {key!r} is {name!r}; {TRITON} and {NATIVE} are accepted"
                )
        self._chosen = dict(choices)

    def choose(self, key: str, calls: Mapping[str, Callable[[], object]]) -> str:
        """Returns the backend for the call at hand. key: its kind. calls: backend -> the call made with it."""
        if self._setting != AUTO:
            return self._setting
        name = self._chosen.get(key)
        if name is None or (name == NATIVE and native.available()):
            name = self._chosen[key] = self._measured(calls)
        return name

    def _measured(self, calls: Mapping[str, Callable[[], object]]) -> str:
        if reason := native.available():
            return self._only_triton(reason)
        if torch.cuda.is_current_stream_capturing():
            return TRITON  # nothing can be timed inside of a graph
        try:
            times = {name: device_milliseconds(call) for name, call in calls.items()}
        except native.LaunchError as error:
            return self._only_triton(str(error))
        return min(times, key=times.__getitem__)

    def _only_triton(self, reason: str) -> str:
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("group_norm_silu: triton only, since native cannot be used: %s", reason)
        return TRITON


BACKENDS = Backends()


def _kind(direction: str, x: Tensor, weight: Tensor, groups: int, silu: bool, temb: Tensor | None) -> str:
    """Names everything about a call that decides how long either backend takes."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (x, weight)]
    parts = ["x".join(map(str, x.shape)), dtypes[0], f"weight {dtypes[1]}", f"groups {groups}"]
    parts += ["silu"] * silu + ["temb"] * (temb is not None)
    return f"{direction} {', '.join(parts)}"


def _format(x: Tensor) -> torch.memory_format:
    """Returns the output's: channels_last if x is, contiguous otherwise; x with one channel or one pixel is both."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.custom_op("fastgrpo::group_norm_silu", mutates_args=(), device_types="cuda")
@on_its_device
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, mean and rstd."""
    rows = x.contiguous(memory_format=torch.channels_last)
    temb = None if temb is None else temb.contiguous()
    arguments = (rows, weight.contiguous(), bias.contiguous(), groups, eps, silu, temb)
    calls = {
        TRITON: lambda: group_norm_silu_triton.launch_forward(*arguments),
        NATIVE: lambda: group_norm_silu_cuda.launch_forward(*arguments),
    }
    y, mean, rstd = calls[BACKENDS.choose(_kind("forward", x, weight, groups, silu, temb), calls)]()
    return y.contiguous(memory_format=_format(x)), mean, rstd


@_forward_op.register_kernel("cpu")
def _forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes in float32."""
    value = _shifted(x, temb)
    value = value.contiguous(memory_format=_format(value))
    samples, channels, height, width = x.shape
    y, mean, rstd = torch.native_group_norm(
        value, weight.float(), bias.float(), samples, channels, height * width, groups, eps
    )
    return (F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=_format(x)), mean, rstd


@_forward_op.register_fake
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x, memory_format=_format(x)), statistic, torch.empty_like(statistic)


@torch.library.custom_op("fastgrpo::group_norm_silu_backward", mutates_args=(), device_types="cuda")
@on_its_device
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx, dweight and dbias in one [2, C], and dtemb, which is empty without temb."""
    rows = x.contiguous(memory_format=torch.channels_last)
    dy = dy.contiguous(memory_format=torch.channels_last)
    temb = None if temb is None else temb.contiguous()
    arguments = (dy, rows, weight.contiguous(), bias.contiguous(), mean, rstd, groups, silu, temb)
    calls = {
        TRITON: lambda: group_norm_silu_triton.launch_backward(*arguments),
        NATIVE: lambda: group_norm_silu_cuda.launch_backward(*arguments),
    }
    dx, vectors, dtemb = calls[BACKENDS.choose(_kind("backward", x, weight, groups, silu, temb), calls)]()
    return dx.contiguous(memory_format=_format(x)), vectors, dtemb


@_backward_op.register_kernel("cpu")
def _backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes in float32."""
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
    return dx, torch.stack((dweight, dbias)).to(weight.dtype), dtemb


@_backward_op.register_fake
def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    temb = rest[-1]
    dx = torch.empty_like(x, memory_format=_format(x))
    dtemb = x.new_empty(0) if temb is None else torch.empty_like(temb, memory_format=torch.contiguous_format)
    return dx, weight.new_empty((2, *weight.shape)), dtemb


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, groups, _, silu, temb = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, temb)
    ctx.groups, ctx.silu = groups, silu


def _backward(ctx, dy: Tensor, *_):
    x, weight, bias, mean, rstd, temb = ctx.saved_tensors
    dx, vectors, dtemb = _backward_op(dy, x, weight, bias, mean, rstd, ctx.groups, ctx.silu, temb)
    return dx, vectors[0], vectors[1], None, None, None, None if temb is None else dtemb


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _shifted(x: Tensor, temb: Tensor | None) -> Tensor:
    """Returns x + temb in float32."""
    return x.float() if temb is None else x.float() + temb[:, :, None, None].float()


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """Computes silu(group_norm(x + temb[:, :, None, None])), or without either of the outer two.

    x: [N, C, H, W] bfloat16, float16 or float32, channels_last where speed matters. weight, bias: [C], both x's dtype
    or both float32. groups: divides C. eps: added to the variance, at least 0. temb: [N, C], x's dtype.
    Returns [N, C, H, W], x's dtype and memory format. Differentiable in all four tensors; once, on CUDA.
    On the CPU it is PyTorch's own operations, in float32: bit for bit those of a diffusers UNet in float32.
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
    if x.dtype not in DTYPES:
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
            f"group_norm_silu: temb is {temb.dtype} {list(temb.shape)} on {temb.device}; "
            f"{x.dtype} [{samples}, {channels}] on {x.device} is accepted"
        )


if name := os.environ.get("FASTGRPO_GROUP_NORM"):
    BACKENDS.set(name)
