"""One denoising step and the loss on it in plain PyTorch operations, one after another, for autograd to go through.

What the operators on the CPU must equal to the last bit: float32 where the UNet's output is guided, float64 from the
mean to the log-prob, float32 from there.
"""

import math

import torch
from torch import Tensor

DIMS = (1, 2, 3)


def wide(per_sample: Tensor) -> Tensor:
    return per_sample.double().reshape(-1, 1, 1, 1)


def plain_mean(output: Tensor, latents: Tensor, tables: Tensor, step: Tensor, guidance: float | None) -> Tensor:
    guided = output.float()
    if guidance is not None:
        uncond, cond = output.float().chunk(2)
        guided = uncond + guidance * (cond - uncond)
    return wide(tables[0, step]) * latents.double() + wide(tables[1, step]) * guided.double()


def plain_log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    residual = (sample.double() - mean) / wide(sigma)
    sigma = sigma.double()
    return (-0.5 * residual.square().mean(dim=DIMS) - sigma.log() - 0.5 * math.log(2 * math.pi)).float()


def plain_kl(mean: Tensor, base_mean: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * ((mean - base_mean) / wide(sigma)).square().mean(dim=DIMS).float()


def plain_normalised_log_ratio(mean: Tensor, old_mean: Tensor, taken: Tensor, sigma: Tensor) -> Tensor:
    noise = (taken.double() - old_mean.double()) / wide(sigma)
    return ((mean.float().double() - old_mean.double()) * noise).mean(dim=DIMS).float()


def plain_advantages(rewards: Tensor, mode: str, std_floor: float, clamp: float) -> Tensor:
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = centred.std(dim=1, keepdim=True)
    flat = std <= std_floor
    if mode == "global":
        flat = flat | (centred.std() <= std_floor)
    scale = {"group": std, "global": centred.std(), "none": 1.0}[mode]
    return (centred / scale).clamp(-clamp, clamp).masked_fill(flat, 0.0).float()


def plain_clipped_loss(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the ratio, and where the bounds decide."""
    ratio = torch.exp(log_ratio)
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, bounded), ratio, bounded > free
