"""Denoising steps of a chunk of samples."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fastgrpo.engine.first_step import DistinctRows, distinct_rows
from fastgrpo.kernels.ddim_step import ddim_step
from fastgrpo.kernels.solver_step import solver_step
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule

Denoise = Callable[[int, Tensor, Tensor], tuple[Tensor, ...]]
"""(step, latents, noise), [N, C, H, W] float32 -> the next latents, their log-probs [N] and, if wanted, their means.

Of a step that leads to W siblings from each latent there is noise for each, [N * W, C, H, W]; results are as many.
"""


@dataclass(frozen=True)
class Sampler:
    """Takes steps x_p = mu + sigma * noise. The log-probability is of exactly the latents that are returned.

    guidance: classifier-free guidance's scale. keep_mean: also return the steps' means.
    """

    policy: Policy
    schedule: Schedule
    guidance: float
    keep_mean: bool = False

    def step(
        self,
        latents: Tensor,
        noise: Tensor,
        step: Tensor,
        contexts: Tensor,
        history: Tensor | None = None,
        distinct: DistinctRows | None = None,
    ) -> tuple[Tensor, ...]:
        """One step of N samples; all its inputs are on the device, so one capture serves all steps.

        latents: [N, C, H, W] float32. noise: the same, or [N * W, C, H, W] for steps to W siblings from each latent.
        step: [1] int64. contexts: as `Policy.contexts`. history: [N, C, H, W] float32, the x0 that the step before has
        predicted, as `begin_history` has it first; the step's own is then returned last. distinct: rows to compute;
        None is all.
        """
        rows = latents.to(self.policy.dtype).repeat(1 if self.guidance == 1.0 else 2, 1, 1, 1)
        at = step.expand(len(rows))
        if distinct:
            rows, at, contexts = (distinct.select(each) for each in (rows, at, contexts))
        output = self.policy.forward(rows, self.schedule.timesteps[at], contexts, return_dict=False)[0].detach()
        if distinct:
            output = distinct.expand(output)
        siblings = len(noise) // len(latents)
        if siblings > 1:
            output, latents = output.repeat_interleave(siblings, dim=0), latents.repeat_interleave(siblings, dim=0)
            history = None if history is None else history.repeat_interleave(siblings, dim=0)
        tables, rescale = self.schedule.tables, self.schedule.rescale(self.guidance)
        given = output, latents, tables, step, self.guidance, noise
        if history is None or self.schedule.solver is None:
            return ddim_step(*given, rescale, self.keep_mean)
        return solver_step(*given, history, self.schedule.solver, rescale, self.keep_mean)

    def begin_history(self, samples: int) -> Tensor | None:
        """What `step` is to be given before the first one: zeros that nothing looks at; None where no step does."""
        if self.schedule.solver is None:
            return None
        return torch.zeros(samples, *self.policy.latent_shape, device=self.policy.device)

    def chunk(self, embeds: Tensor, distinct: DistinctRows | None = None) -> Denoise:
        """The steps of samples with these embeddings, [N, L, D]. distinct: rows of the first step to compute."""
        contexts = self.policy.contexts(embeds, self.guidance)
        positions = torch.arange(len(self.schedule), device=embeds.device)
        history = self.begin_history(len(embeds))

        def denoise(step: int, latents: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            nonlocal history
            first = distinct if step == 0 else None
            results = self.step(latents, noise, positions[step : step + 1], contexts, history, first)
            if history is not None:
                results, history = results[:-1], results[-1]
            return results

        return denoise

    def plain(self) -> "Sampler":
        """One that calls the module itself, whatever the number of rows."""
        return replace(self, policy=replace(self.policy, passes=None))

    def first_rows(self, initial_noise: str, group_size: int, samples: range) -> DistinctRows:
        """The rows of these samples' first step, for `chunk`."""
        return _distinct_rows(initial_noise, group_size, samples, self.guidance, self.policy.device)


# Made on the host, which waits while they are copied to the device: once for a chunk's place, not in every rollout.
_distinct_rows = cache(distinct_rows)
