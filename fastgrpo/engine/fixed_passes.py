"""The engine of fixed shapes: all passes have equally many rows, so each is compiled and captured once, then replayed.

Rollout and update call the same compiled function with the same number of rows, both with gradients enabled. So the
same kernels run, and the update finds the rollout's log-probs to the last bit. Missing pairs are filled up with the
first, without weight.

The settings tell which calls a run makes. The first call warms all of them up with blank pairs and then captures them,
so that no pass has its memory twice.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.graphs import Inputs, StaticCall, capture_all, memory_pool
from fastgrpo.engine.passes import Changed, Passes, ignore
from fastgrpo.engine.sampler import Denoise, Sampler
from fastgrpo.engine.trainable import Trainable
from fastgrpo.grpo.branches import tree_of
from fastgrpo.grpo.loss import PairResults, PolicyLoss
from fastgrpo.grpo.micro_batch import SURE, MicroBatch, blank_batch
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.grpo.steps import trained_steps
from fastgrpo.system.distributed import Ranks
from fastgrpo.unet.convolutions import searching

Key = tuple[str, tuple[bool, ...], int]
"""A function's name, which of its inputs are None, and how many siblings start from one latent."""


class FixedPasses(Passes):
    """Runs one training's passes of the UNet, `micro_batch` pairs or samples at a time.

    capture: into CUDA graphs; without it the same calls are made plainly, on the same fixed memory. search: whether
    cuDNN is to search for their fastest algorithms.
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
        capture: bool = False,
        search: bool = False,
    ):
        super().__init__(loss, trainable, micro_batch, share_first, changed, rollout_batch, allowed, ranks)
        self._capture, self._search, self._pool = capture, search, memory_pool(self.policy.device)
        self._calls: dict[Key, StaticCall] = {}

    @property
    def draws_micro_batches(self) -> bool:
        return not self.rollout_batch

    @property
    def chunk_size(self) -> int:
        """Samples that a rollout denoises together: a micro-batch's number, unless the settings give another."""
        return self.rollout_batch or self.micro_batch

    def chunks(self, samples: slice) -> list[slice]:
        size = self.chunk_size
        return [slice(start, min(start + size, samples.stop)) for start in range(samples.start, samples.stop, size)]

    @property
    def overlaps(self) -> bool:
        return self._overlap

    def denoiser(self, embeds: Tensor, part: slice, keep_mean: bool, group_size: int) -> Denoise:
        count, size = len(embeds), self.chunk_size
        sampler = Sampler(self.policy, self.schedule, self.config.rollout.guidance, keep_mean)
        contexts = self.policy.contexts(_padded(embeds, size), sampler.guidance)
        distinct = None
        if self.share_first:
            samples = range(part.start, part.start + size)
            distinct = sampler.first_rows(self.config.rollout.initial_noise, group_size, samples)
        positions = torch.arange(len(self.schedule), device=embeds.device)
        history = sampler.begin_history(size)

        def denoise(step: int, latents: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            nonlocal history
            siblings = len(noise) // len(latents)
            given = _padded(latents, size), _padded(noise, size * siblings)
            inputs = *given, positions[step : step + 1], contexts, history
            if step == 0 and distinct is not None:  # of another size, so not compiled or captured
                results = sampler.plain().step(*inputs, distinct)
            else:
                name = "step with means" if keep_mean or self._kept_means else "step"
                results = self._prepared(name, inputs, siblings)(*inputs)
            if history is not None:
                history = results[-1]
            return tuple(result[: count * siblings] for result in results[: 3 if keep_mean else 2])

        return denoise

    def clear(self) -> None:
        self.weights.zero_gradient()

    def micro_batches(self, pairs: Pairs) -> list[list[Pairs]]:
        return [[part] for part in pairs.blocks(self.micro_batch)]

    def _learn(self, batches: list[MicroBatch]) -> list[PairResults]:
        (batch,) = batches
        inputs = batch.padded(self.micro_batch).tensors()
        results, _ = self._prepared("learn", inputs, batch.siblings)(*inputs)
        return [results.first(len(batch))]

    def _evaluate_pairs(self, batches: list[MicroBatch]) -> list[PairResults]:
        (batch,) = batches
        inputs = batch.padded(self.micro_batch).tensors()
        return [self._prepared("evaluate_pairs", inputs, batch.siblings)(*inputs).first(len(batch))]

    def _recompute(self, batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        (batch,) = batches
        inputs = batch.padded(self.micro_batch).tensors()
        log_probs, means = self._prepared("recompute", inputs, batch.siblings)(*inputs)
        return [(log_probs[: len(batch)].clone(), means[: len(batch)].clone())]

    def _resize(self, name: str, size: int) -> None:
        self._calls.clear()
        self._pool = memory_pool(self.policy.device)  # a pool cannot be used again once its graphs are gone
        super()._resize(name, size)

    # -----------------------------------------------------------------------------------------------------------------
    # What is captured: functions of tensors alone

    def _prepared(self, name: str, inputs: tuple[Tensor | None, ...], siblings: int) -> StaticCall:
        """The call of this name for inputs like these, captured where calls are."""
        key = name, tuple(tensor is None for tensor in inputs), siblings
        if not self._calls:
            self._prepare()
        if key not in self._calls:
            self._calls[key] = self._make(key)
        call = self._calls[key]
        if self._capture and not call.captured:
            capture_all([call])
        return call

    def _prepare(self) -> None:
        """Make the foreseen calls, warm all of them up and capture those that are sure to come."""
        needed, possible = self._foreseen()
        calls = {key: self._make(key) for key in needed + possible}
        if self._capture:
            for (name, _, _), call in calls.items():
                try:
                    call.warm_up()
                except torch.OutOfMemoryError as error:
                    draws = name.startswith("step") and self.rollout_batch
                    vars(error)["size"] = "rollout_batch" if draws else "micro_batch"
                    raise
            capture_all([calls[key] for key in needed])
        self._calls = calls

    def _foreseen(self) -> tuple[list[Key], list[Key]]:
        """What iterations call, largest in memory first; and what they also call should the ratio not be 1."""
        config, mode, several = self.config, self.old_log_prob, self.config.updates_per_iteration > 1
        own = *[False] * SURE, True, True  # no old log-probs, no old means: the policy as it is
        other = own if mode == "detach" else (*[False] * SURE, False, not config.grpo.ratio_norm)
        replay = [("learn", own), *[("recompute", own)] * several]
        drawn = [("learn", other), *[("recompute", own)] * (self.ranks.count > 1)]  # pairs of other processes' rollouts
        needed = {"rollout": drawn, "detach": [("learn", own)], "replay": [*replay]}[mode]
        if several:
            needed += [("learn", other)] if mode == "replay" else []
            needed += [("evaluate_pairs", other)] if config.grpo.skip_clipped else []
        step = "step with means" if self._kept_means else "step"
        first_order = self.schedule.solver is None
        tree = tree_of(self.schedule, config)
        drawn_widths = tree.widths(range(len(self.schedule))) if tree else [1]
        widths = tree.widths(trained_steps(self.schedule, config.grpo, iteration=1).tolist()) if tree else [1]
        calls = [(*call, width) for width in widths for call in needed]
        calls += [(step, (False, False, False, False, first_order), width) for width in drawn_widths]
        possible = replay if mode == "rollout" and math.isfinite(self.allowed) else []
        return calls, [(*call, width) for width in widths for call in possible]

    @property
    def _kept_means(self) -> bool:
        """Whether rollouts compute means, in the same graph even after a switch to "replay" made them needless."""
        return self.config.grpo.ratio_norm and self.config.grpo.old_log_prob == "rollout"

    def _make(self, key: Key) -> StaticCall:
        """A call, not yet captured. Its example adds 0 to the gradient."""
        name, absent, siblings = key
        if name.startswith("step"):
            return self._make_step(name == "step with means", siblings)
        blank = blank_batch(self.policy, self.config, self.micro_batch, siblings)
        given = (*blank.tensors()[:SURE], blank.weight, blank.latents)
        example = [None if none else tensor for tensor, none in zip(given, absent, strict=True)]
        functions: dict[str, Any] = {
            "learn": partial(self.loss.learn, accumulate=self.weights.accumulate),
            "evaluate_pairs": self.loss.evaluate_pairs,
            "recompute": self.loss.recompute,
        }
        return self._call(torch.enable_grad()(functions[name]), example, pack=partial(MicroBatch, siblings=siblings))

    def _make_step(self, keep_mean: bool, siblings: int) -> StaticCall:
        size, guidance = self.chunk_size, self.config.rollout.guidance
        contexts = self.policy.contexts(self.policy.unconditional.expand(size, -1, -1), guidance)
        blank = blank_batch(self.policy, self.config, size)
        noise = blank.taken.repeat_interleave(siblings, dim=0)
        sampler = Sampler(self.policy, self.schedule, guidance, keep_mean)
        example = [blank.latents, noise, blank.step[:1], contexts, sampler.begin_history(size)]
        # A compiled pass of the update's size is the update's program, with what gradients need: the same bits. One of
        # another size is another program anyway, and can leave that out.
        shared = self.policy.passes is not None and size == self.micro_batch
        return self._call(torch.set_grad_enabled(shared)(sampler.step), example)

    def _call(self, function: Any, example: Inputs, pack: Any = None) -> StaticCall:
        return StaticCall(searching(self._search)(function), example, capture=False, pool=self._pool, pack=pack)


def _padded(rows: Tensor, size: int) -> Tensor:
    """`size` rows, the first repeated at the end."""
    missing = size - len(rows)
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows
