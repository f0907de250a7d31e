"""Micro-batches of noise, and how an engine gathers rows of them."""

from dataclasses import dataclass, replace

import torch

from fastgrpo.engine.passes import Passes
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import MicroBatch, blank_batch
from fastgrpo.grpo.pairs import Pairs


def noise_batch(loss: PolicyLoss, size: int, seed: int = 1) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    batch = blank_batch(loss.policy, loss.config, size)
    taken = batch.latents + 0.1 * torch.randn(batch.latents.shape, generator=generator)
    rewards, pair = torch.randn(batch.rewards.shape, generator=generator), torch.arange(size)
    group, slot = pair % rewards.shape[0], pair // rewards.shape[0] % rewards.shape[1]
    weight, share = torch.full((size,), 1 / size), torch.ones(size)
    given = {
        "rewards": rewards,
        "group": group,
        "reward": rewards[group, slot],
        "taken": taken,
        "weight": weight,
        "kl_share": share,
    }
    return replace(batch, step=pair % 2, **given)


@dataclass(frozen=True)
class Rows:
    """Stands in for an `Experience`: pairs number the batch's rows."""

    batch: MicroBatch

    def micro_batch(self, pairs: Pairs, *_: object) -> MicroBatch:
        rewards, *others = self.batch.tensors()
        return MicroBatch(rewards, *(None if t is None else t[pairs.sample] for t in others))


def gradient(engine: Passes, batch: MicroBatch, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat gradient of the batch's rows taken in this order, and their losses in the batch's own."""
    engine.clear()
    losses = torch.empty(len(batch))
    results = engine.learn(Pairs(order, batch.step[order]), Rows(batch), None, 0.0)
    losses[order] = torch.cat([each.loss for each in results])
    result = engine.weights.collect_gradients().clone()
    engine.clear()
    return result, losses
