"""Micro-batches of noise, and how an engine gathers rows of them."""

from dataclasses import replace

import torch

from fastgrpo.grpo.loss import MicroBatch, PolicyLoss, blank_batch


def noise_batch(loss: PolicyLoss, size: int, seed: int = 1) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    batch = blank_batch(loss, size)
    taken = batch.latents + 0.1 * torch.randn(batch.latents.shape, generator=generator)
    step, advantage = torch.arange(size) % 2, torch.randn(size, generator=generator)
    return replace(batch, taken=taken, step=step, advantage=advantage, weight=torch.full((size,), 1 / size))


def gatherer(batch: MicroBatch):
    """Pairs number the batch's rows."""
    return lambda pairs: MicroBatch(*(None if t is None else t[pairs.sample] for t in batch.tensors()))
