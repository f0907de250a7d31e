"""The CUDA C++ side of `group_norm_silu`: calls csrc/group_norm_silu.cu with what the Triton kernels are given."""

import torch
from torch import Tensor

from fastgrpo.kernels import native

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, temb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, mean, rstd. x is dense in channels_last. Raises native.LaunchError."""
    samples, channels, height, width = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty((samples, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    native.call(
        "fastgrpo_group_norm_silu_forward", x.device,
        y, mean, rstd, x, temb, weight, bias, samples, height * width, channels, groups, eps, silu,
        _DTYPES[x.dtype], _DTYPES[weight.dtype],
    )  # fmt: skip
    return y, mean, rstd


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    temb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx, dweight and dbias in one [2, C], and dtemb (empty without temb). Raises native.LaunchError."""
    samples, channels, height, width = x.shape
    dx, vectors = torch.empty_like(x), weight.new_empty((2, channels))
    dtemb = torch.empty_like(temb) if temb is not None else None
    shares = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device)
    native.call(
        "fastgrpo_group_norm_silu_backward", x.device,
        dx, vectors[0], vectors[1], dtemb, shares, dy, x, temb, weight, bias, mean, rstd,
        samples, height * width, channels, groups, silu, _DTYPES[x.dtype], _DTYPES[weight.dtype],
    )  # fmt: skip
    return dx, vectors, x.new_empty(0) if dtemb is None else dtemb
