"""The engine without fixed shapes: plain calls, micro-batches shared out among CPU cores."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgrpo.engine.sampler import Denoise, Sampler
from fastgrpo.engine.trainable import Trainable
from fastgrpo.engine.weights import FlatWeights
from fastgrpo.grpo.loss import MicroBatch, PairResults, PolicyLoss
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.workers import shares

Gather = Callable[[Pairs], MicroBatch]
Changed = Callable[[str, Any, str], object]
Item = TypeVar("Item")
Part = TypeVar("Part", Pairs, slice)

_HALVED = {"micro_batch": "micro-batches have {} pairs", "rollout_batch": "rollouts draw {} samples at once"}


def ignore(name: str, value: Any, why: str) -> None:
    """What an engine without a record tells its changes."""


def out_of_memory(name: str, size: int) -> str:
    """What is said when `name` is halved to `size`."""
    return f"out of memory: {_HALVED[name].format(size)} from now on, and what is learned stays the same"


class Passes:
    """Runs one training's passes of the UNet.

    loss: what a pass of the update computes. trainable: what learns; None where there is only drawing.
    ranks: the processes that train together. share_first: whether a rollout computes equal rows of its first step once.
    micro_batch: pairs in a pass at most. rollout_batch: samples in a rollout's pass at most, where that is another number,
    else 0. Both are halved where memory runs out.
    old_log_prob: grpo.old_log_prob, or "replay" since the update did not find the rollout's log-probs again.
    allowed: how far a ratio may be from 1 before the policy has moved; anything, unless told otherwise.
    resized: whether a size was halved since the last rollout began, so that passes are of another size than its own were.
    changed: told of the three which is another from now on, by name, what it is, and a sentence that says why.
    """

    def __init__(
        self,
        loss: PolicyLoss,
        trainable: Trainable | None,
        micro_batch: int,
        share_first: bool = False,
        changed: Changed = ignore,
        rollout_batch: int = 0,
        allowed: float = math.inf,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ):
        self.loss, self._trainable, self.micro_batch, self.share_first = loss, trainable, micro_batch, share_first
        self.rollout_batch = rollout_batch or self.config.rollout.batch
        self.old_log_prob, self.resized = self.config.grpo.old_log_prob, False
        self.allowed, self.ranks, self._changed = allowed, ranks, changed
        self._workers = self.policy.workers

    @property
    def config(self) -> TrainConfig:
        return self.loss.config

    @property
    def policy(self) -> Policy:
        return self.loss.policy

    @property
    def schedule(self) -> Schedule:
        return self.loss.schedule

    @property
    def trainable(self) -> Trainable:
        assert self._trainable is not None, "an engine that only draws has nothing to train"
        return self._trainable

    @property
    def weights(self) -> FlatWeights:
        """Where gradients are summed."""
        return self.trainable.optimizer.weights

    @property
    def keeps_means(self) -> bool:
        """Whether a rollout keeps its steps' means, for RatioNorm."""
        return self.config.grpo.ratio_norm and self.old_log_prob == "rollout"

    @property
    def draws_micro_batches(self) -> bool:
        """Whether a rollout's passes are as large as the update's: on CUDA, where memory is known to hold those."""
        return not self.rollout_batch and self.policy.device.type == "cuda"

    def chunks(self, samples: int) -> list[slice]:
        """The samples that a rollout denoises together: nearly equal shares, at least one for each worker."""
        most = self.micro_batch if self.draws_micro_batches else self.rollout_batch or samples
        return shares(samples, most, self._workers.count)

    @property
    def overlaps(self) -> bool:
        """Whether chunks are decoded while the next ones are drawn: where they are drawn one after the other."""
        return self.config.engine.overlap and self.policy.device.type == "cuda"

    def scores_early(self, samples: int) -> bool:
        """Whether groups are scored then too: where one is whole before the last chunk is drawn."""
        group = self.config.group_size
        return self.overlaps and any(part.stop >= group for part in self.chunks(samples)[:-1])

    def denoiser(self, embeds: Tensor, part: slice, keep_mean: bool) -> Denoise:
        """Takes the steps of one chunk. embeds: [N, L, D] of its samples. part: where they are among this process's."""
        config = self.config
        sampler = Sampler(self.policy, self.schedule, config.rollout.guidance, keep_mean)
        distinct = None
        if self.share_first:
            samples = range(part.start, part.stop)
            distinct = sampler.first_rows(config.rollout.initial_noise, config.group_size, samples)
        return sampler.chunk(embeds, distinct)

    def draw(self, samples: int, draw: Callable[[slice], object]) -> Iterator[slice]:
        """Have the samples drawn chunk by chunk; yields each chunk then. Smaller ones when memory runs out.

        draw: may be called again for samples that it failed to draw.
        """
        self.resized = False

        def split(part: slice) -> list[tuple[slice, ...]]:
            chunks = self.chunks(part.stop - part.start)
            moved = [slice(part.start + chunk.start, part.start + chunk.stop) for chunk in chunks]
            return list(_batched(moved, self._workers.count))

        def run(some: tuple[slice, ...]) -> list[object]:
            return list(self._workers.map(draw, some))

        name = "micro_batch" if self.draws_micro_batches else "rollout_batch"
        for part, _ in self._halving(name, slice(0, samples), split, run, most=samples):
            yield part

    def clear(self) -> None:
        """Forget the gradient."""
        for parameter in self.weights.parameters.values():
            parameter.grad = None

    def learn(self, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, PairResults]]:
        """Add the pairs' gradient to the sum, micro-batch by micro-batch; smaller ones when memory runs out."""
        return self._halving("micro_batch", pairs, self._split, lambda some: self._learn(some, gather))

    def evaluate_pairs(self, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, PairResults]]:
        """What the pairs come to, without a gradient; smaller micro-batches when memory runs out."""
        return self._forward(self._evaluate_pairs, pairs, gather)

    def recompute(self, pairs: Pairs, gather: Gather) -> Iterator[tuple[Pairs, tuple[Tensor, Tensor]]]:
        """The pairs' log-probs and means under the policy as it is now, in the very micro-batches of `learn`.

        Smaller ones when memory runs out: the others are then to be computed again.
        """
        return self._forward(self._recompute, pairs, gather)

    def replay(self, apart: float) -> None:
        """From now on have updates recompute the old log-probs. apart: how far the rollout's put a ratio from 1."""
        self.old_log_prob = "replay"
        self._changed(
            "old_log_prob",
            "replay",
            f"rollout and update differ by up to {apart:.1e} in an unchanged policy's ratio, at most {self.allowed:.0e} is "
            "allowed: from now on the update recomputes old log-probs (as grpo.old_log_prob replay), up to a third more "
            "work there",
        )

    def agree(self) -> None:
        """Go on with the smallest sizes of all processes, so that what the first one records is what all have."""
        sizes = {"micro_batch": self.micro_batch, "rollout_batch": self.rollout_batch}
        smallest = self.ranks.gather(torch.tensor([list(sizes.values())])).amin(dim=0).tolist()
        for (name, size), least in zip(sizes.items(), smallest, strict=True):
            if least < size:
                self._resize(name, least)

    def _evaluate_pairs(self, batch: MicroBatch) -> PairResults:
        return self.loss.evaluate_pairs(batch)

    def _recompute(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self.loss.recompute(batch)

    def _forward(
        self, call: Callable[[MicroBatch], Item], pairs: Pairs, gather: Gather
    ) -> Iterator[tuple[Pairs, Item]]:
        def run(some: tuple[Pairs, ...]) -> list[Item]:
            return list(self._workers.map(lambda part: call(gather(part)), some))

        return self._halving("micro_batch", pairs, self._split, run)

    def _split(self, pairs: Pairs) -> list[tuple[Pairs, ...]]:
        """As many micro-batches at a time as there are workers, so that no more gradients than those exist at once."""
        return list(_batched(pairs.split(self.micro_batch), self._workers.count))

    def _learn(self, some: tuple[Pairs, ...], gather: Gather) -> list[PairResults]:
        results = list(self._workers.map(lambda part: self.loss.learn(gather(part)), some))
        for _, gradients in results:
            # In the micro-batches' order, so that the sum does not depend on which worker was first.
            self.weights.accumulate(gradients)
        return [outcome for outcome, _ in results]

    def _halving(
        self,
        name: str,
        whole: Part,
        split: Callable[[Part], list[tuple[Part, ...]]],
        run: Callable[[tuple[Part, ...]], list[Item]],
        most: int = 0,
    ) -> Iterator[tuple[Part, Item]]:
        """Every part with its result; when memory runs out, the size `name` is halved and what is left is split anew.

        Another size, where the error's attribute `size` names it. split: into the parts that are run together, one run
        after the other. most: what a size of 0 stands for.
        """
        waiting = split(whole)
        while waiting:
            some, *waiting = waiting
            try:
                results = run(some)
            except torch.OutOfMemoryError as error:
                short = getattr(error, "size", name)
                size = getattr(self, short) or most
                if size == 1:
                    raise
                results = None
            if results is None:  # only here: until the exception is gone, it holds what the failed pass computed
                self._resize(short, size // 2)
                waiting = [again for part in chain(some, *waiting) for again in split(part)]
            else:
                yield from zip(some, results, strict=True)

    def _resize(self, name: str, size: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        setattr(self, name, size)
        self.resized = True
        self._changed(name, size, out_of_memory(name, size))


def _batched(items: Iterable[Item], count: int) -> Iterator[tuple[Item, ...]]:
    """Runs of `count` items (itertools.batched, which Python 3.11 does not have)."""
    iterator = iter(items)
    while run := tuple(islice(iterator, count)):
        yield run
