"""The engine without fixed shapes: plain calls, micro-batches shared out among CPU cores."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.sampler import Denoise, Sampler
from fastgrpo.engine.trainable import Trainable
from fastgrpo.engine.weights import FlatWeights
from fastgrpo.grpo.loss import PairResults, PolicyLoss
from fastgrpo.grpo.micro_batch import Experience, MicroBatch, Remembered
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.grpo.steps import rollout_schedule
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.pulse import PULSE
from fastgrpo.system.workers import Workers, shares

Changed = Callable[[str, Any, str], object]

_HALVED = {"micro_batch": "micro-batches have {} pairs", "rollout_batch": "rollouts draw {} samples at once"}


def ignore(*told: Any) -> None:
    """Takes what nobody wants to know."""


def out_of_memory(name: str, size: int) -> str:
    """The sentence that is said when `name` is halved to `size`."""
    return f"out of memory: {_HALVED[name].format(size)} from now on, and what is learned stays the same"


class Attempt:
    """One try of a piece of work, as a context that swallows an OutOfMemoryError while a size can still be halved.

    again: whether memory ran out in the try before. short: the name of the size that was too large in this one, or "".
    """

    def __init__(self, engine: "Passes", name: str, most: int, again: bool):
        self._engine, self._name, self._most, self.again = engine, name, most, again
        self.short, self.size = "", 0

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        short = getattr(error, "size", self._name)
        size = getattr(self._engine, short) or self._most
        if size > 1:
            self.short, self.size = short, size
        return size > 1


class Passes:
    """Runs one training's passes of the UNet.

    loss: what a pass of the update computes. trainable: what learns; None where there is only drawing.
    ranks: the processes that train together. share_first: whether a rollout computes equal rows of its first step once.
    micro_batch: most pairs of a pass. rollout_batch: most samples of a rollout's pass where that differs, else 0. Both
    are halved where memory runs out.
    old_log_prob: grpo.old_log_prob, or "replay" since the update did not find the rollout's log-probs again.
    allowed: how far a ratio may be from 1 before the policy has moved.
    changed: called when one of these three changes, with its name, its new value and a sentence that says why.
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
        self.old_log_prob: str = self.config.grpo.old_log_prob
        self.allowed, self.ranks, self._changed = allowed, ranks, changed
        self._drew_with = self._sizes

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
    def workers(self) -> Workers:
        return self.policy.workers

    @property
    def trainable(self) -> Trainable:
        assert self._trainable is not None, "an engine that only draws has nothing to train"
        return self._trainable

    @property
    def weights(self) -> FlatWeights:
        """Where gradients are summed."""
        return self.trainable.optimizer.weights

    # -----------------------------------------------------------------------------------------------------------------
    # Rollouts

    @property
    def keeps_means(self) -> bool:
        """Whether a rollout keeps its steps' means, for RatioNorm."""
        return self.config.grpo.ratio_norm and self.old_log_prob == "rollout"

    @property
    def draws_micro_batches(self) -> bool:
        """Whether a rollout's passes are as large as the update's: on CUDA, where memory is known to hold those."""
        return not self.rollout_batch and self.policy.device.type == "cuda"

    @property
    def overlaps(self) -> bool:
        """Whether chunks are decoded while the next ones are drawn: where they are drawn one after the other."""
        return self._overlap and self.policy.device.type == "cuda"

    @property
    def _overlap(self) -> bool:
        """engine.overlap, unless VAE and encoders are away during the rollout (engine.offload)."""
        return self.config.engine.overlap and self.config.engine.offload != "on"

    def begin_rollout(self, iteration: int = 0) -> None:
        """Take the smallest sizes of all processes, so that the first one's record holds for all.

        iteration: from 1; 0 outside training. Where noise is in a window of steps only, the schedule becomes its own.
        """
        if self.schedule.windowed:
            given = self.policy.scheduler_config, self.config, torch.device("cpu")
            self.schedule.become(rollout_schedule(*given, max(iteration, 1)))
        smallest = self.ranks.gather(torch.tensor([self._sizes])).amin(dim=0).tolist()
        for name, size, least in zip(_HALVED, self._sizes, smallest, strict=True):
            if least < size:
                self._resize(name, least)
        self._drew_with = self._sizes

    @property
    def resized(self) -> bool:
        """Whether a size was halved since the last rollout began."""
        return self._sizes != self._drew_with

    def chunks(self, samples: slice) -> list[slice]:
        """Splits samples into those that are denoised together: nearly equal shares, at least one for each worker."""
        count = samples.stop - samples.start
        most = self.micro_batch if self.draws_micro_batches else self.rollout_batch or count
        parts = shares(count, most, self.workers.count)
        return [slice(samples.start + part.start, samples.start + part.stop) for part in parts]

    def scores_early(self, samples: int) -> bool:
        """Whether groups are scored during the rollout: if one is whole before the last chunk is drawn."""
        group = self.config.group_size
        return self.overlaps and any(part.stop >= group for part in self.chunks(slice(0, samples))[:-1])

    def denoiser(self, embeds: Tensor, part: slice, keep_mean: bool, group_size: int) -> Denoise:
        """Takes the steps of one chunk. embeds: [N, L, D] of its samples. part: where they are among this process's.

        group_size: how many of them each group has, fewer than G where they are the trunk that samples share.
        """
        sampler = Sampler(self.policy, self.schedule, self.config.rollout.guidance, keep_mean)
        distinct = None
        if self.share_first:
            samples = range(part.start, part.stop)
            distinct = sampler.first_rows(self.config.rollout.initial_noise, group_size, samples)
        return sampler.chunk(embeds, distinct)

    # -----------------------------------------------------------------------------------------------------------------
    # The update

    def clear(self) -> None:
        """Forget the gradient."""
        for parameter in self.weights.parameters.values():
            parameter.grad = None

    def micro_batches(self, pairs: Pairs) -> list[list[Pairs]]:
        """As many micro-batches at a time as there are workers: no more gradients exist at once."""
        parts, count = pairs.split(self.micro_batch), self.workers.count
        return [parts[start : start + count] for start in range(0, len(parts), count)]

    def learn(
        self,
        pairs: Pairs,
        experience: Experience,
        old: Remembered | None,
        weight: float,
        progress: Callable[[int], object] = ignore,
    ) -> list[PairResults]:
        """Sum the gradient of an optimizer step's pairs; begun again with smaller micro-batches where memory runs out.

        Returns each micro-batch's results. old, weight: as of `Experience.micro_batch`. progress: told the pairs done.
        """
        results: list[PairResults] = []
        for attempt in self.attempts("micro_batch"):
            with attempt:
                self.clear()
                results, done = [], 0
                for parts in self.micro_batches(pairs):
                    results += self._learn([experience.micro_batch(part, old, weight) for part in parts])
                    for part in parts:
                        done += len(part)
                        progress(done)
        return results

    def evaluate_pairs(self, pairs: Pairs, experience: Experience, old: Remembered | None) -> list[PairResults]:
        """Returns each micro-batch's results, without a gradient; begun again with smaller ones as `learn` is."""
        results: list[PairResults] = []
        for attempt in self.attempts("micro_batch"):
            with attempt:
                results = []
                for parts in self.micro_batches(pairs):
                    PULSE.mark()
                    results += self._evaluate_pairs([experience.micro_batch(part, old, 0.0) for part in parts])
        return results

    def recompute(self, steps: Sequence[Pairs], experience: Experience) -> Remembered:
        """What the policy now says of these pairs, in `learn`'s micro-batches; all again where memory runs out."""
        trajectory, received = experience.trajectory, experience.received
        count = trajectory.log_probs.numel() + (0 if received is None else len(received))
        log_probs = trajectory.log_probs.new_zeros(count)
        shape = count, *trajectory.latents.shape[2:]
        means = trajectory.latents.new_zeros(shape) if self.config.grpo.ratio_norm else None
        for attempt in self.attempts("micro_batch"):
            with attempt:
                for parts in (parts for pairs in steps for parts in self.micro_batches(pairs)):
                    PULSE.mark()
                    batches = [experience.micro_batch(part, None, 0.0) for part in parts]
                    for part, (old, mean) in zip(parts, self._recompute(batches), strict=True):
                        places = experience.places(part)
                        log_probs[places] = old
                        if means is not None:
                            means[places] = mean
        return Remembered(log_probs, means)

    def replay(self, apart: float) -> None:
        """From now on updates recompute the old log-probs. apart: how far the rollout's put a ratio from 1."""
        self.old_log_prob = "replay"
        why = (
            f"rollout and update differ by up to {apart:.1e} in an unchanged policy's ratio, at most "
            f"{self.allowed:.0e} is allowed: from now on the update recomputes old log-probs (as grpo.old_log_prob "
            "replay), up to a third more work there"
        )
        self._changed("old_log_prob", "replay", why)

    def _learn(self, batches: list[MicroBatch]) -> list[PairResults]:
        learned = list(self.workers.map(self.loss.learn, batches))
        for _, gradients in learned:
            # In the micro-batches' order, so that the sum does not depend on which worker was first.
            self.weights.accumulate(gradients)
        return [results for results, _ in learned]

    def _evaluate_pairs(self, batches: list[MicroBatch]) -> list[PairResults]:
        return list(self.workers.map(self.loss.evaluate_pairs, batches))

    def _recompute(self, batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        return list(self.workers.map(self.loss.recompute, batches))

    # -----------------------------------------------------------------------------------------------------------------
    # Memory

    @property
    def _sizes(self) -> list[int]:
        return [getattr(self, name) for name in _HALVED]

    def attempts(self, name: str, most: int = 0) -> Iterator[Attempt]:
        """Tries of one piece of work until memory is enough; before each further one a size is halved.

        name: that size, unless the error's attribute `size` names another. most: what a size of 0 stands for.
        """
        again = False
        while True:
            yield (attempt := Attempt(self, name, most, again))
            if not attempt.short:
                return
            # Only here: until the exception is gone, it holds what the failed pass computed.
            self._resize(attempt.short, attempt.size // 2)
            again = True

    def _resize(self, name: str, size: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        setattr(self, name, size)
        self._changed(name, size, out_of_memory(name, size))
