"""Sampling: DDIM with eta > 0 as a Gaussian policy, for training (`rollout`) and for looking at (`sample`)."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.config import RolloutConfig
from fastgrpo.distributed import Ranks
from fastgrpo.kernels.ddim_step import ddim_step
from fastgrpo.policy import DECODE_BATCH, Policy
from fastgrpo.schedule import Schedule
from fastgrpo.types import PromptBatch, Trajectory


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: PromptBatch,
    schedule: Schedule,
    config: RolloutConfig,
    group_size: int,
    generator: torch.Generator,
    keep_means: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Draw `group_size` images for each prompt and keep every latent on the way.

    prompts: this process's share. generator: on any device, in the same state on all processes. A step's noise is
    drawn for all samples of all processes at once, so neither `config.batch`, the number of samples denoised together,
    nor the number of processes changes the numbers drawn.
    keep_means: also keep every step's mean.
    progress: called after every denoising step with 1, the number of steps just finished.
    """
    embeds = prompts.embeds.repeat_interleave(group_size, dim=0)
    shape = (ranks.count * len(prompts) * group_size, *policy.latent_shape)
    own = ranks.share(shape[0])
    start = initial_noise(ranks.count, len(prompts), group_size, shape[1:], config.initial_noise, generator)[own]
    samples, device = start.shape[0], policy.device
    chunks = _slices(samples, config.batch or samples, policy.workers.count)
    latents = torch.empty(len(schedule) + 1, *start.shape, device=device)
    log_probs = torch.empty(len(schedule), samples, device=device)
    means = torch.empty(len(schedule), *start.shape, device=device) if keep_means else None
    latents[0] = start.to(device)
    for step in range(len(schedule)):
        noise = torch.randn(shape, generator=generator, device=generator.device)[own].to(device)

        def advance(part: slice, step: int = step, noise: Tensor = noise) -> None:
            latents[step + 1, part], log_probs[step, part], *mean = denoise_step(
                policy, schedule, step, latents[step, part], embeds[part], config.guidance, noise[part], keep_means
            )
            if keep_means:
                means[step, part] = mean[0]

        deque(policy.workers.map(advance, chunks), maxlen=0)
        if progress is not None:
            progress(1)
    return Trajectory(latents, log_probs, images=policy.decode(latents[-1], config.decode_batch), means=means)


@torch.no_grad()
def sample(
    policy: Policy,
    embeds: Tensor,
    schedule: Schedule,
    guidance: float,
    seeds: Sequence[int],
    batch: int = 256,
    decode_batch: int = DECODE_BATCH,
) -> Tensor:
    """Draw one image per embedding; the picture depends on its own prompt and seed, not on its neighbours or the device.

    embeds: [N, L, D]. seeds: N numbers, each the seed of one sample's own CPU generator. batch, decode_batch: images denoised
    and decoded at once.
    Returns [N, 3, h, w] float32 in [0, 1].
    """

    def draw(part: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        latents = _noise_of_each(generators, policy)
        for step in range(len(schedule)):
            noise = _noise_of_each(generators, policy)
            latents, _ = denoise_step(policy, schedule, step, latents, embeds[part], guidance, noise)
        return latents

    latents = list(policy.workers.map(draw, _slices(len(seeds), batch, policy.workers.count)))
    return policy.decode(torch.cat(latents), decode_batch)


def denoise_step(
    policy: Policy,
    schedule: Schedule,
    step: int,
    latents: Tensor,
    embeds: Tensor,
    guidance: float,
    noise: Tensor,
    keep_mean: bool = False,
) -> tuple[Tensor, ...]:
    """Take one step of N samples: x_p = mu + sigma * noise.

    latents, noise: [N, C, H, W] float32. embeds: [N, L, D].
    Returns the next latents [N, C, H, W] float32, the log-probability [N] float32 of exactly those, and with keep_mean the
    mean [N, C, H, W] float32.
    """
    timesteps = schedule.timesteps[step].expand(latents.shape[0])
    output = policy.output(latents, timesteps, embeds, guidance)
    position = torch.full((1,), step, device=latents.device)
    return ddim_step(output, latents, schedule.tables, position, guidance, noise, keep_mean=keep_mean)


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


def _slices(samples: int, batch: int, workers: int) -> list[slice]:
    """Nearly equal shares of at most `batch` samples, at least one for each worker."""
    count = min(samples, max(-(-samples // batch), workers))
    bounds = [samples * i // count for i in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def _noise_of_each(generators: Sequence[torch.Generator], policy: Policy) -> Tensor:
    """[N, C, H, W] float32: the next draw of each sample's own generator."""
    return torch.stack([torch.randn(policy.latent_shape, generator=g) for g in generators]).to(policy.device)
