"""Painters draw a batch of images: by DDIM, as training samples, or by a plain diffusers pipeline with another sampler.

    ddim   ours; deterministic with eta 0, diffusers' default too, and stochastic as in training with eta 1
    pndm   what SD 1.x pipelines ship with, and GenEval's own script draws with
    lms    what most code for concept erasure, RECE's and its descendants', draws I2P with

Every image begins with the noise of its own CPU generator, so that it does not depend on the device. Scripts that seed
a CUDA generator begin with other noise, and draw other pictures of the same distribution.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import LMSDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from fastgrpo import rollout
from fastgrpo.engine.graphs import StaticCall
from fastgrpo.engine.sampler import Denoise, Sampler
from fastgrpo.evaluation.images.folder import ImageRequest, Painter, Requests
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.suites import DDIM, SamplerName
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.finite import PictureSource, require_finite


def make_painter(policy: Policy, sampler: SamplerName, schedule: Schedule, batch: int) -> Painter:
    """schedule: DDIM's; of the others it says how many steps. batch: rows at most."""
    if sampler == DDIM:
        return DdimPainter(policy, schedule, batch, policy.device.type == "cuda")
    return PipelinePainter(policy, sampler, len(schedule), schedule.guidance_rescale)


class DdimPainter:
    """Draws with our sampler.

    With `fixed` every batch has the same number of rows, a short one repeating its first, and its steps are calls on
    fixed memory: on CUDA one graph, captured anew where size or guidance change, which rows are grouped by.
    """

    def __init__(self, policy: Policy, schedule: Schedule, batch: int, fixed: bool) -> None:
        self.policy, self.schedule, self.batch, self.fixed = policy, schedule, batch, fixed
        self._kind: tuple | None = None  # guidance and latents' shape of `_step`
        self._step: StaticCall | None = None

    def __call__(self, rows: Requests) -> Tensor:
        first, shape = rows[0], latent_shape(self.policy, rows[0])
        padded = [*rows, *[first] * (self.batch - len(rows))] if self.fixed else rows
        embeds = self.policy.encode([row.text for row in padded])
        guidance = max(first.guidance, 1.0)  # up to 1 there is none, as in diffusers' pipelines
        chunk = self._chunk(guidance, shape) if self.fixed else None
        seeds, size = [row.seed for row in padded], len(padded)
        requests = [_request(row) for row in padded]
        images = rollout.draw_images(
            self.policy, embeds, self.schedule, guidance, seeds, size, size, shape, chunk=chunk, requests=requests
        )
        return images[: len(rows)]

    def _chunk(self, guidance: float, shape: tuple[int, int, int]) -> Callable[[Tensor], Denoise]:
        positions = torch.arange(len(self.schedule), device=self.policy.device)

        def chunk(embeds: Tensor) -> Denoise:
            contexts = self.policy.contexts(embeds, guidance)
            step = self._step
            if step is None or self._kind != (guidance, shape):
                self._step = step = None  # frees the memory of the last graph
                noise = torch.zeros(len(embeds), *shape, device=self.policy.device)
                one = Sampler(self.policy, self.schedule, guidance).step
                step = StaticCall(one, (noise, noise, positions[:1], contexts), self.policy.device.type == "cuda")
                self._step, self._kind = step, (guidance, shape)
            return lambda index, latents, noise: step(latents, noise, positions[index : index + 1], contexts)

        return chunk


class PipelinePainter:
    """Draws with diffusers' StableDiffusionPipeline, without its safety checker."""

    def __init__(self, policy: Policy, sampler: SamplerName, steps: int, guidance_rescale: float = 0.0) -> None:
        self.policy, self.steps, self.guidance_rescale = policy, steps, guidance_rescale
        scheduler = make_scheduler(policy.scheduler_config, sampler)
        parts = policy.vae, policy.text_encoder, policy.tokenizer, policy.computing, scheduler
        self._pipeline = StableDiffusionPipeline(
            *parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        self._pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, rows: Requests) -> Tensor:
        first, factor = rows[0], size_factor(self.policy)
        _, height, width = latent_shape(self.policy, first)
        embeds = self.policy.encode([row.text for row in rows]).to(self.policy.dtype)
        latents = self._pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=self.policy.unconditional.to(self.policy.dtype).expand_as(embeds),
            num_inference_steps=self.steps,
            guidance_scale=first.guidance,
            guidance_rescale=self.guidance_rescale,
            height=height * factor,
            width=width * factor,
            generator=[torch.Generator().manual_seed(row.seed) for row in rows],
            # The pipeline would clamp what is infinite to plain white.
            output_type="latent",
        ).images
        images = self.policy.decode(latents, len(rows))
        require_finite(images, latents, self.policy.dtype, lambda index: _request(rows[index]), embeds)
        return images


def make_scheduler(config: Mapping[str, Any], sampler: SamplerName) -> PNDMScheduler | LMSDiscreteScheduler:
    """Make diffusers' sampler for the noise that a model was trained with.

    PNDM is as in SD 1.x, without Runge-Kutta steps; LMS as erasure's code makes it, from the last training timestep to
    the first. config: the pipeline's scheduler_config.json. Raises ConfigError for an option that these do not know.
    """
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError(f"--sampler {sampler}: the model wants rescale_betas_zero_snr; accepted is ddim.")
    if sampler == "lms":
        # Steps of this kind know no offset; pipelines only complain where it is not 1.
        return LMSDiscreteScheduler(**{name: config[name] for name in _NOISE if name in config}, steps_offset=1)
    names = (*_NOISE, "steps_offset", "set_alpha_to_one", "timestep_spacing")
    return PNDMScheduler(**{name: config[name] for name in names if name in config}, skip_prk_steps=True)


_NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def _request(row: ImageRequest) -> PictureSource:
    """A row's image, for messages."""
    return PictureSource(f"image {row.id}", row.text, row.seed)


def model_hashes(policy: Policy) -> dict[str, str]:
    """Hash the weights of every part of the model, wherever they were loaded from: part -> sha256."""
    return {name: weights_sha256(getattr(policy, name)) for name in ("unet", "vae", "text_encoder")}


def check_sizes(policy: Policy, wanted: Requests) -> None:
    """Raise ConfigError for a row whose size this model cannot draw."""
    factor = size_factor(policy)
    for row in wanted:
        if row.width % factor or row.height % factor:
            raise ConfigError(
                f"prompt {row.prompt}: its image is to be {row.width} x {row.height} pixels; multiples of {factor} are "
                "accepted."
            )


def latent_shape(policy: Policy, row: ImageRequest) -> tuple[int, int, int]:
    """(C, H, W) of the latent of a row's image."""
    channels, height, width = policy.latent_shape
    factor = size_factor(policy)
    return channels, row.height // factor or height, row.width // factor or width


def size_factor(policy: Policy) -> int:
    """Pixels of an image per pixel of its latent, along a side."""
    return policy.image_shape[1] // policy.latent_shape[1]
