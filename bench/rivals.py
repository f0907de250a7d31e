"""What our operators are measured against.

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
from fastgrpo.kernels.specs.accumulate import starts_of
from fastgrpo.kernels.specs.fused_adamw import EMA_DECAY, HYPERPARAMETERS


def rivals_of(spec: OpSpec) -> dict[str, Callable[..., Any]]:
    """Name -> function. "eager", the operation as plain PyTorch has it, is always among them."""
    installed = {name: function for name, module, function in _LIBRARIES.get(spec.name, ()) if _importable(module)}
    return {"eager": spec.reference, **_PYTORCH.get(spec.name, {}), **installed}


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


def _eager_solver_step(
    output: Tensor,
    latents: Tensor,
    tables: Tensor,
    step: Tensor,
    guidance: Tensor,
    noise: Tensor,
    history: Tensor,
    solver: Tensor,
    rescale: float,
    keep_mean: bool,
) -> tuple[Tensor, ...]:
    """The same chain with the two products and sums more of a step that looks back."""
    data, _ = _mean(output, latents, solver[[1, 2, 0]], step, guidance)
    mean, sigma = _mean(output, latents, tables, step, guidance)
    mean = mean + solver[0, step].reshape(-1, 1, 1, 1) * history
    following = mean + sigma * noise
    results = (following, _log_prob(following, mean, sigma))
    return (*results, *([mean] if keep_mean else []), data)


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
    reward: Tensor,
    clip_range: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain of float32 operations and autograd: loss, ratio, and the gradient with respect to the output."""
    output = output.detach().requires_grad_()
    advantage = ((reward - rewards.mean(dim=1)[group]) / rewards.std(dim=1)[group]).clamp(-2.5, 2.5)
    with torch.enable_grad():
        ratio = torch.exp(_log_prob(taken, *_mean(output, latents, tables, step, guidance)) - old_log_prob)
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
        (gradient,) = torch.autograd.grad(loss.sum(), output)
    return loss.detach(), ratio.detach(), gradient


def _eager_geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    hidden, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _eager_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y if residual is None else (total, y)


def _eager_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, temb: Tensor | None = None
) -> Tensor:
    """What diffusers does."""
    z = F.group_norm(x if temb is None else x + temb[:, :, None, None], groups, weight, bias, eps)
    return F.silu(z) if silu else z


def _foreach(in_place: bool, total: Tensor, *gradients: Tensor) -> None:
    parts = [total[s : s + g.numel()] for g, s in zip(gradients, starts_of(gradients), strict=False)]
    torch._foreach_add_(parts, gradients)


def _torch_fused(in_place: bool, max_norm: float, *tensors: Any) -> None:
    """torch.optim.AdamW(fused=True) and what it leaves to others: the norm, the working copy and the average."""
    parameters, exp_avg, exp_avg_sq, gradient, step, lr, working, ema = tensors
    # By this the fused step divides the gradient. The clipped gradient itself is not written.
    grad_scale = ((torch.linalg.vector_norm(gradient) + 1e-6) / max_norm).clamp(min=1)
    torch._fused_adamw_(
        [parameters], [gradient], [exp_avg], [exp_avg_sq], [], [step],
        lr=lr, amsgrad=False, maximize=False, grad_scale=grad_scale, **HYPERPARAMETERS,
    )  # fmt: skip
    if working is not None:
        working.copy_(parameters)
    if ema is not None:
        ema.lerp_(parameters, 1 - EMA_DECAY)


_PYTORCH: dict[str, dict[str, Callable[..., Any]]] = {
    "accumulate": {"foreach": _foreach},
    "ddim_step": {"eager": _eager_ddim_step},
    "fused_adamw": {"torch fused": _torch_fused},
    "geglu": {"eager": _eager_geglu},
    "group_norm_silu": {"eager": _eager_group_norm},
    "grpo_step": {"eager": _eager_grpo_step},
    "layer_norm": {"eager": _eager_layer_norm},
    "solver_step": {"eager": _eager_solver_step},
}


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
