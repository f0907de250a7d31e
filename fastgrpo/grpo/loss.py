"""The clipped policy loss, its ratio, and the divergence from the base model, one number per (sample, step) pair."""

import torch
from torch import Tensor


def clipped_loss(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347, equation 7) as a loss.

    ratio = exp(log_ratio);  loss = max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)).
    log_ratio, advantage: [N] float32.
    Returns the loss [N], the ratio [N], and clipped [N] bool: where the clip decides, and so no gradient flows.
    """
    ratio = torch.exp(log_ratio)
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, bounded), ratio, bounded > free


def normalised_log_ratio(mean: Tensor, old_mean: Tensor, taken: Tensor, sigma: Tensor) -> Tensor:
    """RatioNorm of GRPO-Guard (Wang et al., arXiv 2510.22319): sigma * (log ratio + |mean - old_mean|^2 / (2 sigma^2)).

    With z = (taken - old_mean) / sigma, the noise of the step, log ratio = (mean - old_mean) . z / sigma
    - |mean - old_mean|^2 / (2 sigma^2): what is added takes out the bias that pulls every ratio below 1, and the factor
    the 1 / sigma by which ratios of late steps vary more. What is left is (mean - old_mean) . z.
    mean, old_mean, taken: [N, C, H, W]; old_mean and taken float32. sigma: [N], above 0.
    Returns [N] float32, averaged over C, H and W as the log-probability is; exactly 0 where mean, rounded to float32,
    is old_mean. Computed in float64.
    """
    noise = (taken.double() - old_mean.double()) / sigma.double().reshape(-1, 1, 1, 1)
    return ((mean.float().double() - old_mean.double()) * noise).mean(dim=(1, 2, 3)).float()


def gaussian_kl(mean: Tensor, ref_mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence between two steps of the same sigma, in closed form: (mu - mu_ref)^2 / (2 sigma^2).

    mean, ref_mean: [N, C, H, W]. sigma: [N], above 0.
    Returns [N] float32, averaged over C, H and W as the log-probability is; computed in float64.
    """
    difference = (mean.double() - ref_mean.double()) / sigma.double().reshape(-1, 1, 1, 1)
    return 0.5 * difference.square().mean(dim=(1, 2, 3)).float()
