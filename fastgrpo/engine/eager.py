"""The engine without fixed shapes: plain calls, micro-batches shared out among CPU cores."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.engine.reuse import Reuse
from fastgrpo.engine.sampling import Denoise, Sampler
from fastgrpo.engine.weights import FlatWeights
from fastgrpo.engine.workers import shares
from fastgrpo.grpo.micro_batch import Learner, MicroBatch, Outcome
from fastgrpo.grpo.pairs import Pairs

Gather = Callable[[Pairs], MicroBatch]
Item = TypeVar("Item")


class EagerEngine:
    """Runs one training's passes of the UNet.

    learner: what a pass is. weights: where gradients are summed. micro_batch: pairs in a pass at most.
    old_log_prob: grpo.old_log_prob, or what an engine takes in its place. reuse: what a rollout computes once.
    halved: told the new size of micro-batches when memory ran out.
    """

    def __init__(
        self,
        learner: Learner,
        weights: FlatWeights,
        micro_batch: int,
        reuse: Reuse = Reuse(),  # noqa: B008 (frozen)
        halved: Callable[[int], object] = lambda size: None,
    ):
        self.learner, self.weights, self.micro_batch, self.reuse = learner, weights, micro_batch, reuse
        self._halved = halved
        self.old_log_prob = learner.config.grpo.old_log_prob
        self._workers = learner.policy.workers

    def chunks(self, samples: int) -> list[slice]:
        """The samples that a rollout denoises together: nearly equal shares, at least one for each worker.

        Unless the settings say how many, on CUDA as many as a micro-batch has: memory is known to hold those.
        """
        cuda, batch = self.learner.policy.device.type == "cuda", self.learner.config.rollout.batch
        return shares(samples, batch or (self.micro_batch if cuda else samples), self._workers.count)

    @property
    def overlaps(self) -> bool:
        """Whether chunks are decoded while the next ones are drawn: where they are drawn one after the other."""
        return self.learner.config.engine.overlap and self.learner.policy.device.type == "cuda"

    def scores_early(self, samples: int) -> bool:
        """Whether they are scored then too: where each has whole groups."""
        group = self.learner.config.group_size
        return self.overlaps and all(part.start % group == part.stop % group == 0 for part in self.chunks(samples))

    def denoiser(self, embeds: Tensor, part: slice, keep_mean: bool) -> Denoise:
        """Takes the steps of one chunk. embeds: [N, L, D] of its samples. part: where they are among this process's."""
        config, learner = self.learner.config, self.learner
        sampler = Sampler(learner.policy, learner.schedule, config.rollout.guidance, keep_mean)
        distinct = None
        if self.reuse.first:
            samples = range(part.start, part.stop)
            distinct = sampler.first_rows(config.rollout.initial_noise, config.group_size, samples)
        return sampler.chunk(embeds, self.reuse, distinct)

    def clear(self) -> None:
        """Forget the gradient."""
        for parameter in self.weights.parameters.values():
            parameter.grad = None

    def learn(self, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, Outcome]]:
        """Add the pairs' gradient to the sum, micro-batch by micro-batch; halved when memory runs out."""
        waiting = self._split(pairs)
        while waiting:
            some, *waiting = waiting
            try:
                done = self._learn(some, gather)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                done = None
            if done is None:  # only here: until the exception is gone, it holds what the failed pass computed
                self._halve()
                waiting = [again for part in chain(some, *waiting) for again in self._split(part)]
            else:
                yield from done

    def judge(self, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, Outcome]]:
        """What the pairs come to, micro-batch by micro-batch, without a gradient."""
        return self._forward(self.learner.judge, pairs, gather)

    def recompute(self, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, tuple[Tensor, Tensor]]]:
        """The pairs' log-probs and means under the policy as it is now, in the very micro-batches of `learn`."""
        return self._forward(self.learner.recompute, pairs, gather)

    def _forward(self, call: Callable, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, Item]]:
        parts = pairs.split(self.micro_batch)
        return zip(parts, self._workers.map(lambda part: call(gather(part)), parts), strict=True)

    def _split(self, pairs: Pairs) -> list[tuple[Pairs, ...]]:
        """As many micro-batches at a time as there are workers, so that no more gradients than those exist at once."""
        return list(_batched(pairs.split(self.micro_batch), self._workers.count))

    def _learn(self, some: tuple[Pairs, ...], gather: Gather) -> list[tuple[Pairs, Outcome]]:
        results = list(self._workers.map(lambda part: self.learner.learn(gather(part)), some))
        for _, gradients in results:
            # In the micro-batches' order, so that the sum does not depend on which worker was first.
            self.weights.accumulate(gradients)
        return [(part, outcome) for part, (outcome, _) in zip(some, results, strict=True)]

    def _halve(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.micro_batch //= 2
        self._halved(self.micro_batch)


def _batched(items: Iterable[Pairs], count: int) -> Iterator[tuple[Pairs, ...]]:
    """Runs of `count` items (itertools.batched, which Python 3.11 does not have)."""
    iterator = iter(items)
    while run := tuple(islice(iterator, count)):
        yield run
