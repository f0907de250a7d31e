"""Micro-batches of noise, and how an engine gathers rows of them."""

from dataclasses import dataclass, replace

import torch

from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import MicroBatch, blank_batch
from fastgrpo.grpo.pairs import Pairs


def noise_batch(loss: PolicyLoss, size: int, seed: int = 1) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    batch = blank_batch(loss.policy, size)
    taken = batch.latents + 0.1 * torch.randn(batch.latents.shape, generator=generator)
    step, advantage = torch.arange(size) % 2, torch.randn(size, generator=generator)
    return replace(batch, taken=taken, step=step, advantage=advantage, weight=torch.full((size,), 1 / size))


@dataclass(frozen=True)
class Rows:
    """Stands in for an `Experience`: pairs number the batch's rows."""

    batch: MicroBatch

    def micro_batch(self, pairs: Pairs, *_: object) -> MicroBatch:
        return MicroBatch(*(None if t is None else t[pairs.sample] for t in self.batch.tensors()))
