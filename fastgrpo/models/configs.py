"""A pipeline's components and their configs: what these describe, and what in them cannot be obeyed and is refused.

Everything that a config says changes the picture as in diffusers' StableDiffusionPipeline, or is refused: here or, of
the scheduler, by `fastgrpo.schedule`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from fastgrpo.system.errors import ConfigError

ACCEPTED = "an SD 1.x / 2.x text-to-image StableDiffusionPipeline is accepted"
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}

_OTHER_CHANNELS = {
    5: "one that also takes a depth map",
    7: "an upscaler's, which also takes the image to enlarge",
    8: "InstructPix2Pix's, which also takes the image to edit",
    9: "an inpainting one, which also takes a mask and the masked image",
}
# What a UNet's config says of inputs that nothing here would give it -> the value of a plain one.
_CONDITIONS = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "dual_cross_attention": False,
}


@dataclass(frozen=True)
class Description:
    """A pipeline without its weights.

    unet, vae, text_encoder, scheduler: the components' config files. tokenizer: the folder of its files, or None where
    CLIP's own is meant. notes: lines for the screen, of what the files say that no setting does.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: Path | None
    notes: tuple[str, ...] = ()

    def empty_components(self) -> dict[str, nn.Module]:
        """`unet`, `vae` and `text_encoder` on the meta device: names and shapes, no memory."""
        with init_empty_weights(), no_init_weights():  # on meta too, random weights take longer than all the rest
            return {
                "unet": UNet2DConditionModel.from_config(dict(self.unet)),
                "vae": AutoencoderKL.from_config(dict(self.vae)),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(self.text_encoder))),
            }


@dataclass(frozen=True)
class Components:
    """What a text-to-image Stable Diffusion is made of, on the CPU.

    unet: float32. vae, text_encoder: in the precision asked for. tokenizer: the text encoder's.
    scheduler_config: its scheduler_config.json, with the prediction type of model.prediction_type.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]


def check_configs(here: str, description: Description) -> None:
    """Raise ConfigError for configs of other models and for what cannot be obeyed. here: begins the sentence."""
    unet, vae, text_encoder = description.unet, description.vae, description.text_encoder
    for component, config in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        found = (config.get("architectures") or [config.get("_class_name", CLASSES[component])])[0]
        if found != CLASSES[component]:
            name = component.replace("_", " ")
            raise ConfigError(f"{here}, whose {name} is a {found}; {CLASSES[component]} is accepted.")
        if config.get("quantization_config"):
            raise ConfigError(
                f"{here}, whose {component} is quantised (quantization_config); plain weights are accepted."
            )
    check_channels(here, unet.get("in_channels", 4))
    for name, plain in _CONDITIONS.items():
        if unet.get(name, plain) != plain:
            raise ConfigError(
                f"{here}, whose UNet has {name} = {unet[name]!r}, a condition besides time and text; {ACCEPTED}."
            )
    _check_numbers(here, unet, vae)
    if unet.get("cross_attention_dim") != text_encoder.get("hidden_size"):
        raise ConfigError(
            f"{here}, whose UNet takes text embeddings {unet.get('cross_attention_dim')} wide and whose text encoder "
            f"makes them {text_encoder.get('hidden_size')} wide; the same width is accepted."
        )


def check_channels(here: str, channels: int) -> None:
    """Raise ConfigError for a UNet that takes more than latents. channels: that it takes."""
    if channels != 4:
        kind = _OTHER_CHANNELS.get(channels, "one that takes more than latents")
        raise ConfigError(f"{here}, whose UNet is {kind} ({channels} channels); a text-to-image UNet takes 4.")


def as_in_pipelines(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as StableDiffusionPipeline takes it: it overrules these two, which outdated files lack."""
    return {**scheduler, "steps_offset": 1, "clip_sample": False}


def _check_numbers(here: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse numbers that give what goes from one component to the next another shape or scale."""
    for component, config, name, default, accepted in (
        ("UNet", unet, "out_channels", 4, 4),
        ("vae", vae, "latent_channels", 4, 4),
        ("vae", vae, "out_channels", 3, 3),
    ):
        if config.get(name, default) != accepted:
            raise ConfigError(f"{here}, whose {component} has {name} = {config[name]!r}; {accepted} is accepted.")
    size = unet.get("sample_size")
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(
            f"{here}, whose unet/config.json has sample_size = {size!r}, so that nothing says how large its images "
            "are; accepted is the side of its latents, such as 64 for images of 512 pixels, or [height, width]."
        )
    scale = vae.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not scale > 0:
        raise ConfigError(f"{here}, whose vae has scaling_factor = {scale!r}; a number above 0 is accepted.")
