"""The engine of fixed shapes: every pass has as many pairs or samples as every other, so that it is compiled once, captured
into a CUDA graph once, and replayed.

Rollout and update call the same compiled function with the same number of rows, the rollout too with gradients enabled: the
same kernels run, and the update finds the rollout's log-probs to the last bit. Where there are fewer pairs, the first is
repeated without weight.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastgrpo.engine.eager import Changed, EagerEngine, Gather, ignore
from fastgrpo.engine.graphs import StaticCall, memory_pool
from fastgrpo.engine.reuse import RememberedText, RememberedTimes, Reuse, remember_text, remember_times
from fastgrpo.engine.sampling import Denoise, Sampler
from fastgrpo.engine.weights import FlatWeights
from fastgrpo.grpo.micro_batch import Learner, MicroBatch, Outcome
from fastgrpo.grpo.pairs import Pairs


class FixedEngine(EagerEngine):
    """Runs one training's passes of the UNet, `micro_batch` pairs or samples at a time.

    capture: into CUDA graphs; without it the calls that a graph would hold are made, on the same fixed memory.
    """

    def __init__(
        self,
        learner: Learner,
        weights: FlatWeights,
        micro_batch: int,
        reuse: Reuse = Reuse(),  # noqa: B008 (frozen)
        changed: Changed = ignore,
        rollout_batch: int = 0,
        allowed: float = math.inf,
        capture: bool = False,
    ):
        super().__init__(learner, weights, micro_batch, reuse, changed, rollout_batch, allowed)
        self._capture, self._pool = capture, memory_pool(learner.policy.device)
        self._calls: dict[tuple, StaticCall] = {}
        self._text: RememberedText | None = None
        self._times: RememberedTimes | None = None

    @property
    def draws_micro_batches(self) -> bool:
        return not self.rollout_batch

    @property
    def chunk_size(self) -> int:
        """Samples that a rollout denoises together: as many as a micro-batch has, unless the settings say how many."""
        return self.rollout_batch or self.micro_batch

    def chunks(self, samples: int) -> list[slice]:
        size = self.chunk_size
        return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]

    @property
    def overlaps(self) -> bool:
        return self.learner.config.engine.overlap

    def denoiser(self, embeds: Tensor, part: slice, keep_mean: bool) -> Denoise:
        learner, count = self.learner, len(embeds)
        sampler = Sampler(learner.policy, learner.schedule, learner.config.rollout.guidance, keep_mean)
        contexts = learner.policy.contexts(_padded(embeds, self.chunk_size), sampler.guidance)
        self._remember(contexts)
        distinct = None
        if self.reuse.first:
            samples = range(part.start, part.start + self.chunk_size)
            distinct = sampler.first_rows(learner.config.rollout.initial_noise, learner.config.group_size, samples)
        positions = torch.arange(len(learner.schedule), device=embeds.device)

        def step_of(latents: Tensor, noise: Tensor, position: Tensor, contexts: Tensor | None) -> tuple[Tensor, ...]:
            return sampler.step(latents, noise, position, self._text or contexts, self._times)

        def denoise(step: int, latents: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            position = positions[step : step + 1]
            latents, noise = (_padded(tensor, self.chunk_size) for tensor in (latents, noise))
            if step == 0 and distinct is not None:  # of another size than all others: neither compiled nor captured
                results = sampler.plain().step(latents, noise, position, contexts, self._times, distinct)
            else:
                given = latents, noise, position, None if self._text else contexts
                results = self._call(("step", keep_mean), step_of, given, given)
            return tuple(result[:count] for result in results)

        return denoise

    def clear(self) -> None:
        self.weights.zero_gradient()

    def _judge(self, batch: MicroBatch) -> Outcome:
        return self._run("judge", lambda *t: self.learner.judge(MicroBatch(*t)).tensors(), batch)

    def _recompute(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        given = batch.padded(self.micro_batch).tensors()
        results = self._call(("recompute",), lambda *t: self.learner.recompute(MicroBatch(*t)), given, given)
        return tuple(result[: len(batch)].clone() for result in results)

    def _remember(self, contexts: Tensor) -> None:
        """Compute anew, into the same memory, what the steps of a chunk have in common."""
        unet, timesteps = self.learner.policy.computing, self.learner.schedule.timesteps
        if self.reuse.text:
            if self._text is None:
                self._text = remember_text(unet, contexts)
            self._text.update(contexts)
        if self.reuse.times:
            if self._times is None:
                self._times = remember_times(unet, timesteps, contexts)
            self._times.update()

    def _split(self, pairs: Pairs) -> list[tuple[Pairs, ...]]:
        return [(part,) for part in pairs.blocks(self.micro_batch)]

    def _learn(self, some: tuple[Pairs, ...], gather: Gather) -> list[Outcome]:
        (part,) = some
        batch = gather(part)
        # Without weight a micro-batch adds nothing to the gradient, however often it is run before it is captured.
        example = replace(batch, weight=torch.zeros_like(batch.weight))
        return [self._run("learn", self._accumulate, batch, example)]

    def _accumulate(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        outcome, gradients = self.learner.learn(MicroBatch(*tensors))
        self.weights.accumulate(gradients)
        return outcome.tensors()

    def _resize(self, name: str, size: int) -> None:
        self._calls.clear()
        self._text = self._times = None
        self._pool = memory_pool(self.learner.policy.device)  # one that no graph has any more cannot be used again
        super()._resize(name, size)

    def _run(self, name: str, function: Callable, batch: MicroBatch, example: MicroBatch | None = None) -> Outcome:
        """example: what a graph is captured with, where calling the function leaves something behind."""
        given = batch.padded(self.micro_batch).tensors()
        results = self._call((name,), function, given, example.padded(self.micro_batch).tensors() if example else given)
        return Outcome(*(None if r is None else r[: len(batch)].clone() for r in results))

    def _call(
        self,
        key: tuple,
        function: Callable,
        given: tuple[Tensor | None, ...],
        example: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        key = *key, *(tensor is None for tensor in given)
        if key not in self._calls:
            self._calls[key] = StaticCall(function, example, self._capture, self._pool)
        return self._calls[key](*given)


def _padded(rows: Tensor, size: int) -> Tensor:
    """The first row repeated at the end."""
    missing = size - len(rows)
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows
