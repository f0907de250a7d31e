"""Sampling: DDIM with eta > 0 as a Gaussian policy, for training (`rollout`) and for looking at (`draw_images`)."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgrpo.engine.overlap import pipeline
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.sampler import Denoise, Sampler
from fastgrpo.policy import DECODE_BATCH, Policy
from fastgrpo.schedule import Schedule
from fastgrpo.system.finite import PictureSource, require_finite
from fastgrpo.system.workers import shares
from fastgrpo.types import PromptBatch, Trajectory


@torch.no_grad()
def rollout(
    engine: Passes,
    prompts: PromptBatch,
    generator: torch.Generator,
    score: Callable[[slice, Tensor], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trajectory:
    """Draw `group_size` images for each prompt and keep every latent on the way; for RatioNorm every step's mean too.

    engine: takes the steps. prompts: this process's share. generator: on any device, in the same state on all processes. A
    step's noise is drawn for all samples of all processes at once, so neither the number of samples denoised together
    nor the number of processes changes the numbers drawn.
    score: called with prompts whose images are all there, and these images, while the next are drawn; once for each where
        the engine `scores_early`, else never.
    progress: called after every denoising step of every batch, with the number of samples' steps done and of all.
    Raises BrokenPicture for images that are not finite, before they are scored.
    """
    engine.agree()
    policy, ranks, steps, keep_means = engine.policy, engine.ranks, len(engine.schedule), engine.keeps_means
    config, group_size = engine.config.rollout, engine.config.group_size
    when = f"iteration {prompts.iteration}, " if prompts.iteration else ""
    embeds = prompts.embeds.repeat_interleave(group_size, dim=0)
    shape = (ranks.count * len(prompts) * group_size, *policy.latent_shape)
    own = ranks.share(shape[0])
    start = initial_noise(ranks.count, len(prompts), group_size, shape[1:], config.initial_noise, generator)[own]
    samples, device = start.shape[0], policy.device
    latents = torch.empty(steps + 1, *start.shape, device=device)
    log_probs = torch.empty(steps, samples, device=device)
    means = torch.empty(steps, *start.shape, device=device) if keep_means else None
    latents[0] = start
    for step in range(steps):
        # Each step's noise waits where the latents that it leads to will be.
        latents[step + 1] = torch.randn(shape, generator=generator, device=generator.device)[own]
    reached = [0] * samples  # steps of each; workers may share it, for they write places of their own

    def draw(part: slice) -> None:
        denoise = engine.denoiser(embeds[part], part, keep_means)
        # A copy: should memory run out midway, smaller batches find their noise as it was.
        drawn = latents[:, part].clone()
        for step in range(steps):
            drawn[step + 1], log_probs[step, part], *mean = denoise(step, drawn[step], drawn[step + 1])
            if keep_means:
                means[step, part] = mean[0]
            if progress is not None:
                reached[part] = [step + 1] * (part.stop - part.start)
                progress(sum(reached), steps * samples)
        latents[:, part] = drawn

    def decode(part: slice) -> Tensor:
        decoded = policy.decode(latents[-1, part], config.decode_batch)

        def request(index: int) -> PictureSource:
            prompt, place = divmod(part.start + index, group_size)
            return PictureSource(f"{when}sample {place + 1} of {group_size}", prompts.prompts[prompt].text)

        require_finite(decoded, latents[-1, part], policy.dtype, request, embeds[part])
        return decoded

    if not engine.overlaps:
        deque(engine.draw(samples, draw), maxlen=0)
        return Trajectory(latents, log_probs, images=decode(slice(0, samples)), means=means)
    images = torch.empty(samples, *policy.image_shape, device=device)
    scored, early = 0, engine.scores_early(samples)

    def finish(part: slice) -> None:
        nonlocal scored
        images[part] = decode(part)
        complete = part.stop // group_size
        if early and score is not None and complete > scored:
            score(slice(scored, complete), images[scored * group_size : complete * group_size])
            scored = complete

    with pipeline(finish, device) as line:
        for part in engine.draw(samples, draw):
            line.drawn(part)
    return Trajectory(latents, log_probs, images=images, means=means)


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
    """Draw one image per embedding; the picture depends on its own prompt and seed, not on its neighbours or the device.

    embeds: [N, L, D]. seeds: N numbers, each the seed of one sample's own CPU generator. batch, decode_batch: images denoised
    and decoded at once. latent_shape: (C, H, W) for images of another size; None is the policy's own.
    chunk: what takes the steps of samples with these embeddings, [n, L, D]; None is `Sampler.chunk`.
    requests: what messages call the images, N of them or none.
    Returns [N, 3, h, w] float32 in [0, 1]. Raises BrokenPicture for an image that is not finite.
    """

    chunk = chunk or Sampler(policy, schedule, guidance).chunk
    shape = latent_shape or policy.latent_shape

    def draw(part: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        latents, denoise = _noise_of_each(generators, shape).to(policy.device), chunk(embeds[part])
        for step in range(len(schedule)):
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
    processes: int,
    prompts: int,
    group_size: int,
    latent_shape: tuple[int, ...],
    kind: str,
    generator: torch.Generator,
) -> Tensor:
    """The latents that the rollouts of all processes start from, on the generator's device.

    prompts: of each process. kind: "shared", one latent for all samples of a process; "per_prompt", one for each group;
    "independent", one for each sample.
    Returns [processes * prompts * group_size, C, H, W] float32.
    """
    samples = processes * prompts * group_size
    distinct = {"shared": processes, "per_prompt": processes * prompts, "independent": samples}[kind]
    noise = torch.randn((distinct, *latent_shape), generator=generator, device=generator.device)
    return noise.repeat_interleave(samples // distinct, dim=0)


def _noise_of_each(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """[N, C, H, W] float32 on the CPU: the next draw of each sample's own generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
