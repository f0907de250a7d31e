"""What our operations are measured against beside the rivals their SPECs name.

Each function takes the arguments of the operation it stands for. Libraries are used where they are installed; none of
them is a dependency. xformers (0.0.35) has RMSNorm and SwiGLU, and none of these operations.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels.spec import OpSpec


def rivals_of(spec: OpSpec) -> dict[str, Callable[..., Any]]:
    """Name -> function. "eager", the operation as plain PyTorch has it, is always among them."""
    installed = {name: function for name, module, function in _LIBRARIES.get(spec.name, ()) if _importable(module)}
    return {"eager": _EAGER.get(spec.name, spec.reference), **spec.rivals, **installed}


def _importable(module: str) -> bool:
    """By importing: a library built for another torch is found and does not load."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _mean(output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sigma) of a denoising step in float32."""
    without, within = output.float().chunk(2)
    coef_sample, coef_output, sigma = tables[:, step].reshape(3, -1, 1, 1, 1)
    return coef_sample * latents + coef_output * (without + guidance * (within - without)), sigma


def _log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    terms = -((sample - mean) ** 2) / (2 * sigma**2) - torch.log(sigma) - 0.5 * math.log(2 * math.pi)
    return terms.mean(dim=(1, 2, 3))


def _eager_ddim_step(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor,
    noise: Tensor,
    rescale: float,
    keep_mean: bool,
) -> tuple[Tensor, ...]:
    """The chain of float32 operations of DDPO-style trainers; the reference's float64 would be no fair rival."""
    mean, sigma = _mean(output, latents, tables, step, guidance)
    following = mean + sigma * noise
    results = (following, _log_prob(following, mean, sigma))
    return (*results, mean) if keep_mean else results


def _eager_grpo_step(
    output: Tensor,
    latents: Tensor,
    taken: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor,
    old_log_prob: Tensor,
    rewards: Tensor,
    group: Tensor,
    slot: Tensor,
    clip_range: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain of float32 operations and autograd: loss, ratio, and the gradient with respect to the output."""
    output = output.detach().requires_grad_()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantage = (centred / centred.std(dim=1, keepdim=True)).clamp(-2.5, 2.5)[group, slot]
    with torch.enable_grad():
        ratio = torch.exp(_log_prob(taken, *_mean(output, latents, tables, step, guidance)) - old_log_prob)
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
        (gradient,) = torch.autograd.grad(loss.sum(), output)
    return loss.detach(), ratio.detach(), gradient


_EAGER = {"ddim_step": _eager_ddim_step, "grpo_step": _eager_grpo_step}


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    return total, function(total, weight, bias, eps)


def _apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    function = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return total, function(total, weight, bias, weight.shape, eps)


def _liger_geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """With GELU's tanh approximation: within a few 1e-4 of ours, for about the same work."""
    hidden, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return importlib.import_module("liger_kernel.ops.geglu").LigerGELUMulFunction.apply(gate, hidden)


def _apex_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """One pass over small images, two over large ones: the rule of apex's module, from compute capability 8.0 on."""
    module = importlib.import_module("apex.contrib.group_norm.group_norm")
    function = module.cuda_group_norm_nhwc_one_pass if x[0, 0].numel() <= 1024 else module.cuda_group_norm_nhwc_two_pass
    value = x if temb is None else x + temb[:, :, None, None]
    return function(value, groups, weight, bias, eps, "silu" if silu else "")


def _liger_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """NCHW only: Liger converts channels-last inputs, as its users' code would."""
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction.apply
    value = x if temb is None else x + temb[:, :, None, None]
    z = function(value, weight, bias, x.shape[1], groups, eps)
    return F.silu(z) if silu else z


_LIBRARIES = {
    "layer_norm": (
        ("Liger", "liger_kernel.ops.layer_norm", _liger_layer_norm),
        ("apex", "apex.normalization.fused_layer_norm", _apex_layer_norm),
    ),
    "geglu": (("Liger", "liger_kernel.ops.geglu", _liger_geglu),),
    "group_norm_silu": (
        ("apex", "apex.contrib.group_norm.group_norm", _apex_group_norm),
        ("Liger", "liger_kernel.ops.group_norm", _liger_group_norm),
    ),
}
