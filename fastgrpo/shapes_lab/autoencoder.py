"""The autoencoder of the embedded Stable Diffusion."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastgrpo.shapes_lab import architectures
from fastgrpo.shapes_lab.drawings import paint_pictures, to_unit
from fastgrpo.shapes_lab.optimization import Stage
from fastgrpo.shapes_lab.pretrain_config import PretrainConfig


def train(config: PretrainConfig) -> dict[str, float]:
    """L1 + L2 reconstruction with a faint KL; the scaling factor makes the latents' std 1."""
    images = to_unit(paint_pictures(config.pictures, config.seed * 100 + 1).images) * 2 - 1
    vae = architectures.build_vae().to(memory_format=torch.channels_last)
    stage = Stage(vae, config.work / "vae.pt", config.vae_steps, 2e-3, config.seed, made_with=config.settings)
    for step in stage.steps("autoencoder"):
        _, generator = stage.random(step)
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - batch
        stage.step(error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean())
    with torch.no_grad():
        held = images[:512]
        latents = vae.encode(held).latent_dist.mode()
        error = (vae.decode(latents).sample - held).square().mean().item() / 4
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(config.out / "pipeline/vae")
    return {"vae_psnr_db": -10 * np.log10(error)}


def load(config: PretrainConfig) -> AutoencoderKL:
    """The trained autoencoder, float32."""
    return AutoencoderKL.from_pretrained(config.out / "pipeline/vae", dtype=torch.float32)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents of uint8 pictures: [N, 3, 32, 32] -> [N, 4, 8, 8] float32."""
    modes = [vae.encode(to_unit(chunk) * 2 - 1).latent_dist.mode() for chunk in images.split(256)]
    return torch.cat(modes) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """uint8 pictures of scaled latents: [N, 4, 8, 8] -> [N, 3, 32, 32]."""
    chunks = [vae.decode(chunk / vae.config.scaling_factor).sample for chunk in latents.split(256)]
    return ((torch.cat(chunks) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
