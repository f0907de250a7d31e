"""Sampling as a Gaussian policy, for training (`rollout`) and for looking at (`draw_images`)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastgrpo.engine.overlap import pipeline
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.sampler import Denoise, Sampler
from fastgrpo.grpo.branches import Tree, tree_of
from fastgrpo.policy import DECODE_BATCH, Policy
from fastgrpo.schedule import Schedule
from fastgrpo.system.finite import PictureSource, require_finite
from fastgrpo.system.pulse import PULSE
from fastgrpo.system.workers import shares
from fastgrpo.types import PromptBatch, Trajectory

Progress = Callable[[int, int], None]


@torch.no_grad()
def rollout(
    engine: Passes,
    prompts: PromptBatch,
    generator: torch.Generator,
    score: Callable[[slice, Tensor], object] | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    """Draw `group_size` images for each prompt and keep every latent on the way; for RatioNorm every step's mean too.

    Chunks of samples are denoised one after the other; where memory runs out, a chunk is drawn again in smaller ones.
    prompts: this process's share. generator: on any device, in the same state on all processes.
    score: where the engine `scores_early`, called with every prompt whose images are all there, and these images, while
        the next are drawn.
    progress: called after every denoising step of a chunk, with the number of samples' steps done and of all.
    Raises BrokenPicture for images that are not finite, before they are scored.
    """
    engine.begin_rollout(prompts.iteration)
    drawing = _Drawing(engine, prompts, generator, progress)
    everything, half = slice(0, drawing.samples), "micro_batch" if engine.draws_micro_batches else "rollout_batch"
    finishing = _Finishing(drawing, score if engine.scores_early(drawing.samples) else None)
    with pipeline(finishing.finish, engine.policy.device) if engine.overlaps else nullcontext() as line:
        for steps, count in drawing.phases:
            nodes, embeds = len(prompts) * count, prompts.embeds.repeat_interleave(count, dim=0)
            waiting, together = engine.chunks(slice(0, nodes)), engine.workers.count
            while waiting:
                drawn: list[list[Tensor]] = []
                for attempt in engine.attempts(half, most=nodes):
                    if attempt.again:
                        waiting = [chunk for part in waiting for chunk in engine.chunks(part)]
                    with attempt:
                        drawn = list(engine.workers.map(partial(drawing.draw, steps, embeds), waiting[:together]))
                for part, latents in zip(waiting[:together], drawn, strict=True):
                    drawing.store_latents(steps, part, latents)
                    if line and steps is drawing.phases[-1][0]:
                        line.drawn(drawing.samples_of(steps.start, part))
                waiting = waiting[together:]
    images = finishing.images if engine.overlaps else drawing.decode(everything)
    return Trajectory(drawing.latents, drawing.log_probs, images, drawing.means)


class _Drawing:
    """A rollout under way: B = P * G samples of this process, which workers draw chunk by chunk.

    latents, log_probs, means: as of `Trajectory`; latents not drawn yet hold the noise that will lead there.
    phases: steps that equally many latents of each group are taken through, and this number.
    """

    def __init__(self, engine: Passes, prompts: PromptBatch, generator: torch.Generator, progress: Progress | None):
        self.engine, self._prompts, self._progress = engine, prompts, progress
        self.group_size, self.steps = engine.config.group_size, len(engine.schedule)
        self._tree = tree_of(engine.schedule, engine.config) or Tree((self.group_size,) * (self.steps + 1))
        self.phases = self._tree.phases()
        ranks, kind, device = engine.ranks, engine.config.rollout.initial_noise, engine.policy.device
        shape = (ranks.count * len(prompts) * self.group_size, *engine.policy.latent_shape)
        own = ranks.share(shape[0])
        start = initial_noise(ranks.count, len(prompts), self.group_size, shape[1:], kind, generator)[own]
        self.samples = len(start)
        self.latents = torch.empty(self.steps + 1, *start.shape, device=device)
        self.log_probs = torch.empty(self.steps, self.samples, device=device)
        self.means = torch.empty(self.steps, *start.shape, device=device) if engine.keeps_means else None
        self.latents[0] = start
        for step, noisy in enumerate(engine.schedule.trainable.tolist()):
            if not noisy:
                self.latents[step + 1] = 0.0
                continue
            # Drawn for all samples of all processes at once, so that neither the chunks' size nor the number of
            # processes changes the numbers. It waits where the latents it leads to will be.
            self.latents[step + 1] = torch.randn(shape, generator=generator, device=generator.device)[own]
        self._reached = [0] * self.samples  # steps of each; every worker writes places of its own

    def draw(self, steps: range, embeds: Tensor, part: slice) -> list[Tensor]:
        """Take these steps of some nodes. Returns the latents that each leads to, which are not stored yet.

        embeds: [N, L, D], of all nodes.
        Should memory run out here or in another worker's chunk, smaller ones find their noise as it was.
        """
        tree, count = self._tree, self._tree.counts[steps.start]
        denoise = self.engine.denoiser(embeds[part], part, self.means is not None, count)
        latents, results = tree.nodes(self.latents[steps.start], count)[part, 0], []
        for step in steps:
            PULSE.mark()
            into = slice(part.start * tree.width(step), part.stop * tree.width(step))
            noise = tree.nodes(self.latents[step + 1], tree.counts[step + 1])[into, 0]
            latents, log_probs, *mean = denoise(step, latents, noise)
            latents = latents.clone()  # the next step may be written where this one was
            results.append(latents)
            self._store(self.log_probs[step], step, part, log_probs)
            if self.means is not None:
                self._store(self.means[step], step, part, mean[0])
            if self._progress is not None:
                samples = self.samples_of(steps.start, part)
                self._reached[samples] = [step + 1] * (samples.stop - samples.start)
                self._progress(sum(self._reached), self.steps * self.samples)
        return results

    def store_latents(self, steps: range, part: slice, latents: list[Tensor]) -> None:
        """Keep what `draw` returned of these nodes."""
        for step, each in zip(steps, latents, strict=True):
            self._store(self.latents[step + 1], step, part, each)

    def samples_of(self, step: int, part: slice) -> slice:
        """The samples on the paths of some nodes before this step."""
        spread = self.group_size // self._tree.counts[step]
        return slice(part.start * spread, part.stop * spread)

    def _store(self, into: Tensor, step: int, part: slice, results: Tensor) -> None:
        """Write what this step of some nodes led to in the places of all samples on the way. into: [B, ...]."""
        into[self.samples_of(step, part)] = self._tree.spread(results, self._tree.counts[step + 1])

    def decode(self, part: slice) -> Tensor:
        """Returns the images [N, 3, h, w] of these samples, whose steps are all taken. Raises BrokenPicture."""
        policy, latents = self.engine.policy, self.latents[-1, part]
        decoded = policy.decode(latents, self.engine.config.rollout.decode_batch)
        when = f"iteration {self._prompts.iteration}, " if self._prompts.iteration else ""

        def request(index: int) -> PictureSource:
            prompt, place = divmod(part.start + index, self.group_size)
            sample = f"{when}sample {place + 1} of {self.group_size}"
            return PictureSource(sample, self._prompts.prompts[prompt].text)

        embeds = self._prompts.embeds.repeat_interleave(self.group_size, dim=0)[part]
        require_finite(decoded, latents, policy.dtype, request, embeds)
        return decoded


class _Finishing:
    """Decodes chunk after chunk, and has each group scored as soon as it is whole. images: [B, 3, h, w], filled in."""

    def __init__(self, drawing: _Drawing, score: Callable[[slice, Tensor], object] | None):
        self._drawing, self._score, self._scored = drawing, score, 0
        policy, count = drawing.engine.policy, drawing.samples if drawing.engine.overlaps else 0
        self.images = torch.empty(count, *policy.image_shape, device=policy.device)

    def finish(self, part: slice) -> None:
        """These samples are drawn; chunks come in order."""
        self.images[part] = self._drawing.decode(part)
        size = self._drawing.group_size
        complete = part.stop // size
        if self._score is not None and complete > self._scored:
            self._score(slice(self._scored, complete), self.images[self._scored * size : complete * size])
            self._scored = complete


@torch.no_grad()
def draw_images(
    policy: Policy,
    embeds: Tensor,
    schedule: Schedule,
    guidance: float,
    seeds: Sequence[int],
    batch: int = 256,
    decode_batch: int = DECODE_BATCH,
    latent_shape: tuple[int, int, int] | None = None,
    chunk: Callable[[Tensor], Denoise] | None = None,
    requests: Sequence[PictureSource] = (),
) -> Tensor:
    """Draw one image per embedding, which depends on its own prompt and seed, not on its neighbours or the device.

    Evaluations and pictures to look at give DDIM's schedule of eval.steps, with noise in every step, whatever
    rollout.stochastic says; only the guard's of the base model are drawn as the first rollout's are.
    embeds: [N, L, D]. seeds: N numbers, each the seed of one sample's own CPU generator. batch, decode_batch: images
    denoised and decoded at once. latent_shape: (C, H, W) for images of another size; None is the policy's own.
    chunk: what takes the steps of samples with these embeddings, [n, L, D]; None is `Sampler.chunk`. requests: what
    messages call the images, N of them or none.
    Returns [N, 3, h, w] float32 in [0, 1]. Raises BrokenPicture for an image that is not finite.
    """
    chunk = chunk or Sampler(policy, schedule, guidance).chunk
    shape = latent_shape or policy.latent_shape
    if not len(seeds):
        return torch.empty(0, *policy.image_shape, device=policy.device)

    def draw(part: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        latents, denoise = _noise_of_each(generators, shape).to(policy.device), chunk(embeds[part])
        for step in range(len(schedule)):
            PULSE.mark()
            latents, _ = denoise(step, latents, _noise_of_each(generators, shape).to(policy.device))
        return latents

    latents = torch.cat(list(policy.workers.map(draw, shares(len(seeds), batch, policy.workers.count))))
    images = policy.decode(latents, decode_batch)

    def request(index: int) -> PictureSource:
        called = requests[index] if requests else PictureSource(f"image {index + 1} of {len(seeds)}")
        return replace(called, seed=seeds[index])

    require_finite(images, latents, policy.dtype, request, embeds)
    return images


def initial_noise(
    processes: int, prompts: int, group_size: int, latent_shape: tuple[int, ...], kind: str, generator: torch.Generator
) -> Tensor:
    """The latents that the rollouts of all processes start from, on the generator's device.

    prompts: of each process. kind: "shared", one latent for all samples of a process; "per_prompt", one for each group;
    "independent", one for each sample. Returns [processes * prompts * group_size, C, H, W] float32.
    """
    samples = processes * prompts * group_size
    distinct = {"shared": processes, "per_prompt": processes * prompts, "independent": samples}[kind]
    noise = torch.randn((distinct, *latent_shape), generator=generator, device=generator.device)
    return noise.repeat_interleave(samples // distinct, dim=0)


def _noise_of_each(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """[N, C, H, W] float32 on the CPU: the next draw of each sample's own generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
