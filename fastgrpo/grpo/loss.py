"""The clipped policy loss and the divergence from the base model, one number per (sample, step) pair."""

import torch
from torch import Tensor


def clipped_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347, equation 7) as a loss.

    ratio = exp(log_prob - old_log_prob);  loss = max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)).
    log_prob, old_log_prob, advantage: [N] float32.
    Returns the loss [N], the ratio [N], and clipped [N] bool: where the clip decides, and so no gradient flows.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, bounded), ratio, bounded > free


def gaussian_kl(mean: Tensor, ref_mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence between two steps of the same sigma, in closed form: (mu - mu_ref)^2 / (2 sigma^2).

    mean, ref_mean: [N, C, H, W]. sigma: [N], above 0.
    Returns [N] float32, averaged over C, H and W as the log-probability is; computed in float64.
    """
    difference = (mean.double() - ref_mean.double()) / sigma.double().reshape(-1, 1, 1, 1)
    return 0.5 * difference.square().mean(dim=(1, 2, 3)).float()
