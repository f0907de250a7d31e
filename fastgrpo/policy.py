"""The Stable Diffusion being trained: a float32 UNet that learns, and a VAE and text encoder that do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fastgrpo.kernels.language import VERSION
from fastgrpo.models.load import load_components
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.memory import halve_until_it_fits
from fastgrpo.system.offload import offload, resident
from fastgrpo.system.workers import Workers
from fastgrpo.unet.copies import Network, computing_unet

DECODE_BATCH = 64
"""Latents decoded at once: the VAE's activations are large, and more at once are not faster."""


@dataclass(frozen=True)
class Policy:
    """A Stable Diffusion pipeline taken apart.

    unet: float32 weights, trained; always in eval mode, since dropout would give every pass a different policy.
    network: computes in the UNet's place, in `dtype`; None is the UNet itself, which is enough for float32.
    passes: how `network` is called; None is as it is, else for instance compiled.
    vae, text_encoder: frozen, in `dtype`; elsewhere while unused after `offload`. tokenizer: the text encoder's.
    scheduler_config: the pipeline's scheduler_config.json, from which `make_schedule` builds the steps.
    device: where everything is. dtype: what the UNet computes in: torch.float32, torch.bfloat16 or torch.float16.
    workers: run shares of a batch side by side on CPU cores; one on a GPU.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    network: UNet2DConditionModel | None = None
    passes: Network | None = None
    workers: Workers = field(default_factory=lambda: Workers(1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the size the model was trained for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, h, w) of one image at that size."""
        _, height, width = self.latent_shape
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return 3, height * scale, width * scale

    @cached_property
    def unconditional(self) -> Tensor:
        """[1, L, D] float32: the empty prompt's embedding, which guidance moves away from."""
        return self.encode([""])

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed N texts, padded or cut to the tokenizer's length. Returns [N, L, D] float32.

        As diffusers' pipelines do: padding is attended to unless the text encoder's config says `use_attention_mask`.
        """
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        with resident(self.text_encoder):
            return self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].float()

    def offload(self) -> None:
        """Keep VAE and text encoder in the host's memory while they are not used. On a CPU nothing is moved."""
        for module in (self.vae, self.text_encoder):
            offload([*module.parameters(), *module.buffers()], module, self.device)

    def contexts(self, embeds: Tensor, guidance: float) -> Tensor:
        """What the UNet's rows attend to: [2N, L, D] in `dtype`, the empty prompt's first; at guidance 1 [N, L, D]."""
        if guidance != 1.0:
            embeds = torch.cat([self.unconditional.expand_as(embeds), embeds])
        return embeds.to(self.dtype)

    @property
    def computing(self) -> UNet2DConditionModel:
        """The module whose weights compute."""
        return self.network or self.unet

    @property
    def forward(self) -> Network:
        """What is called for the UNet: with latents and contexts in `dtype`, of as many rows."""
        return self.passes or self.computing

    def rows(
        self, latents: Tensor, timesteps: Tensor, embeds: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the latents, timesteps and contexts of 2N rows: N samples without, then with their prompts.

        Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) joins the halves of the UNet's output in the
        operators of `fastgrpo.kernels`; at guidance 1 there are only the second N rows.
        latents: [N, C, H, W] float32. timesteps: [N] int64. embeds: [N, L, D].
        """
        contexts, latents = self.contexts(embeds, guidance), latents.to(self.dtype)
        if guidance != 1.0:
            latents, timesteps = latents.repeat(2, 1, 1, 1), timesteps.repeat(2)
        return latents, timesteps, contexts

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = DECODE_BATCH) -> Tensor:
        """Turn latents [N, C, H, W] into images [N, 3, h, w] float32 in [0, 1], at most `batch` at once.

        Where a pixel is not finite it is NaN. Where memory runs out, half as many are decoded at once, with a warning.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
        size = min(batch, -(-len(scaled) // self.workers.count))
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (factor * side for side in scaled.shape[-2:])
        images = torch.empty(len(scaled), 3, height, width, device=self.device)

        def decode(part: tuple[Tensor, Tensor]) -> None:
            into, chunk = part
            pictures = self.vae.decode(chunk, return_dict=False)[0].float() / 2 + 0.5
            # Infinity, which an overflow makes, would be clamped to plain white.
            into.copy_(pictures.clamp(0, 1).masked_fill_(~pictures.isfinite(), torch.nan))

        def decoded(at_once: int) -> None:
            # Into their places: the images together are large, and are there once.
            list(self.workers.map(decode, zip(images.split(at_once), scaled.split(at_once), strict=True)))

        with resident(self.vae):
            halve_until_it_fits(decoded, size, "latents are decoded")
        return images

    def rounded(self) -> "Policy":
        """In half precision a policy that computes with a copy of the present weights, else itself."""
        return self if self.dtype == torch.float32 else replace(self, network=computing_unet(self.unet, self.dtype))


def load_policy(model: ModelConfig, device: torch.device, dtype: torch.dtype, workers: int = 1) -> Policy:
    """Load an SD 1.x / 2.x pipeline: a diffusers folder, a hub id, a single file, or the one that ships with fastgrpo.

    dtype: what the UNet is to compute in and the frozen parts are held in. The UNet's own weights are always float32;
        in half precision it computes once `network` is set, by training or `rounded`.
    workers: CPU cores to share batches among.
    Raises ConfigError when there is no such pipeline, it is of another kind, or a GPU lacks Triton for its kernels.
    """
    if device.type == "cuda" and not VERSION:
        raise ConfigError(
            f"the device is {device}, and Triton, which its kernels need, is not installed; accepted is cpu."
        )
    components = load_components(model, dtype)
    # Convolutions run a third faster on CPU in this layout, and it is the one tensor cores want.
    components.unet.to(device, memory_format=torch.channels_last).eval()
    for frozen in (components.vae, components.text_encoder):
        frozen.to(device).eval().requires_grad_(False)
    return Policy(
        unet=components.unet,
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        scheduler_config=components.scheduler_config,
        device=device,
        dtype=dtype,
        workers=Workers(workers),
    )
