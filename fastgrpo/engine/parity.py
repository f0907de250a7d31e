"""Whether the update finds the rollout's log-probs again, before the policy has moved."""

from collections import deque

import torch

from fastgrpo.engine.eager import EagerEngine
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.grpo.steps import trained_steps


def disagreement(engine: EagerEngine) -> float:
    """The largest |ratio - 1| of samples drawn as the rollout draws and learned from as the update learns.

    Noise is denoised by one step; then the pairs come in another order, every second one beside pairs of other steps. The
    last trained step is taken, whose sigma is smallest, and the first. The weights and their gradient stay as they are.
    Begins anew where memory ran out: rollout and update were of different sizes then.
    """
    learner = engine.learner
    steps = trained_steps(learner.schedule, learner.config.grpo, iteration=1)
    sizes = None
    while sizes != (engine.micro_batch, engine.rollout_batch):
        sizes = engine.micro_batch, engine.rollout_batch
        apart = max(_at(engine, step) for step in {int(steps[0]), int(steps[-1])})
    return apart


def _at(engine: EagerEngine, step: int) -> float:
    learner, policy = engine.learner, engine.learner.policy
    generator = torch.Generator().manual_seed(0)
    # As many as a rollout draws together or the update learns from together, whichever is less.
    size = min(engine.micro_batch, engine.chunks(engine.micro_batch)[0].stop)
    latents, noise = torch.randn(2, size, *policy.latent_shape, generator=generator).to(policy.device)
    embeds = policy.encode(["a photo of an apple"]).expand(size, -1, -1)
    keep_mean = learner.config.grpo.ratio_norm
    taken, log_prob, means = torch.empty_like(latents), latents.new_empty(size), torch.empty_like(latents)

    def draw(part: slice) -> None:
        denoise = engine.denoiser(embeds[part], part, keep_mean)
        taken[part], log_prob[part], *mean = denoise(step, latents[part], noise[part])
        if keep_mean:
            means[part] = mean[0]

    with torch.no_grad():
        deque(engine.draw(size, draw), maxlen=0)
    order = torch.randperm(size, generator=generator)
    steps = torch.full((size,), step)
    steps[1::2] = torch.randint(len(learner.schedule), (size // 2,), generator=generator)

    def gather(pairs: Pairs) -> MicroBatch:
        zeros, sample = torch.zeros(len(pairs), device=policy.device), pairs.sample
        old_mean = means[sample] if keep_mean else None
        return MicroBatch(
            latents[sample], taken[sample], pairs.step, embeds[sample], zeros, zeros, log_prob[sample], old_mean
        )

    pairs = Pairs(order.to(policy.device), steps.to(policy.device))
    engine.clear()
    ratios = torch.cat([outcome.ratio for _, outcome in engine.learn(pairs, gather)])
    engine.clear()
    return float((ratios[pairs.step == step] - 1).abs().max())
