"""What a model computes and keeps, counted from its architecture on the meta device: no weights, no GPU, no network.

FLOPs are those of convolutions, linear layers and attention, one multiplication and one addition being two. What a
fused attention kernel computes a second time in its backward pass is not counted; what gradient checkpointing does is.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPTextModel

from fastgrpo.costs.held_memory import (
    FusedAttention,
    LiveBytes,
    PeakBytes,
    held_bytes,
    recompute_with_fused_attention,
    saved_bytes,
)
from fastgrpo.models import check
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Description
from fastgrpo.models.repository import Repository
from fastgrpo.rewards.encoder_files import SHIPPED_ENCODERS, TRANSFORMERS
from fastgrpo.rewards.terms import Term, parse_terms
from fastgrpo.rewards.transformers_clip import ImageTower, empty_transformers_clip
from fastgrpo.settings.schema import ModelConfig, RewardConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.gradient_checkpointing import checkpoint_blocks
from fastgrpo.unet.lora import add_lora

_CHECKER = "safety-checker:"  # begins the spec of the detector of that name, before its source


@dataclass(frozen=True, kw_only=True)
class ModelFlop:
    """How many FLOP one Stable Diffusion computes.

    forward, forward_backward: of the UNet for one sample; backward is what the trained parameters' gradients need.
    decode: of the VAE for one image.
    gradient_checkpointing: whether the backward pass computes blocks again, which forward_backward then contains.
    """

    forward: int
    forward_backward: int
    decode: int
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelCost(ModelFlop):
    """What one Stable Diffusion, whose UNet computes in one dtype throughout, has in FLOP, parameters and bytes.

    unet: its parameters, without adapters. trained: those that learn, the UNet's own or the adapters'.
    frozen: parameters of the VAE and the text encoder. text_encoder: those of the latter.
    latent_shape: (C, H, W). image_shape: (3, h, w).
    activations: bytes that the UNet's forward pass saves for the backward pass, for one sample.
    saving: bytes that this pass holds at its worst moment. learning: the same with the backward pass and gradients.
    passing, decoding: the most bytes that the UNet holds for one sample, or the VAE for one image, without gradients.
    """

    unet: int
    trained: int
    frozen: int
    text_encoder: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    activations: int
    saving: int
    learning: PeakBytes
    passing: int
    decoding: int


@dataclass(frozen=True)
class EncoderCost:
    """A reward's encoder. parameters: of both towers. text: of what reads texts, and of what neither tower has.

    image, encoding: FLOP and most bytes of an image in its tower.
    """

    parameters: int
    text: int
    image: int
    encoding: int


def find_architecture(model: ModelConfig) -> tuple[Description, bool]:
    """Returns the configs of what `model` names, and whether they are its own: SD 1.x's where neither hub nor cache is.

    model.unet is not looked at: it has the pipeline's architecture or training refuses it. Raises what `describe` does.
    """
    try:
        return describe(replace(model, unet="")), True
    except ConfigError as error:
        if model.config or not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return sd1_architecture(), False


def sd1_architecture() -> Description:
    """Reads the configs of SD 1.x that ship with fastgrpo."""
    folder = Path(check.__file__).parent / "sd1"
    names = "unet/config", "vae/config", "text_encoder/config", "scheduler/scheduler_config"
    unet, vae, text_encoder, scheduler = (json.loads((folder / f"{name}.json").read_bytes()) for name in names)
    return Description(unet, vae, text_encoder, scheduler, tokenizer=None)


def count_model(
    description: Description,
    model: ModelConfig,
    dtype: torch.dtype,
    kernels: bool = False,
    gradient_checkpointing: bool = False,
) -> ModelCost:
    """Counts a Stable Diffusion as it would be trained, with adapters where `model` has them; the same only once.

    dtype: what the UNet computes in. kernels: whether its norms and activations are fastgrpo's, which save less.
    gradient_checkpointing: whether its blocks save their inputs only.
    Raises ConfigError for adapters that fit no module.
    """
    return _count(_key(description), model.lora_rank, model.lora_targets, dtype, kernels, gradient_checkpointing)


def count_flop(description: Description, model: ModelConfig, gradient_checkpointing: bool = False) -> ModelFlop:
    """Counts the FLOPs alone, in a third of the time of `count_model`."""
    return _count_flop(_key(description), model.lora_rank, model.lora_targets, gradient_checkpointing)


def _key(description: Description) -> str:
    return json.dumps([dict(part) for part in (description.unet, description.vae, description.text_encoder)])


def _modules(
    key: str, lora_rank: int, lora_targets: tuple[str, ...], dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Builds UNet, with adapters, VAE and text encoder on the meta device."""
    unet, vae, text_encoder = json.loads(key)
    modules = Description(unet, vae, text_encoder, scheduler={}, tokenizer=None).empty_components()
    unet, vae, text_encoder = (modules[name].eval() for name in ("unet", "vae", "text_encoder"))
    if lora_rank:
        add_lora(unet, ModelConfig(lora_rank=lora_rank, lora_targets=lora_targets), seed=0, frozen_dtype=dtype)
    return unet, vae, text_encoder


def count_passes(unet: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Counts the FLOP of a forward pass, and of one with the backward pass that the trained parameters need."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False) as counter:
        output = unet(*inputs, return_dict=False)[0]
        forward = counter.get_total_flops()
        torch.autograd.grad(output.sum(), trained)
    return forward, counter.get_total_flops()


@cache
def _count_flop(key: str, lora_rank: int, lora_targets: tuple[str, ...], gradient_checkpointing: bool) -> ModelFlop:
    unet, vae, text_encoder = _modules(key, lora_rank, lora_targets, torch.float32)
    if gradient_checkpointing:
        checkpoint_blocks(unet)
    inputs = unet_inputs(unet, text_encoder, 1, torch.float32)
    forward, forward_backward = count_passes(unet, inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(inputs[0], return_dict=False)
    return ModelFlop(
        forward=forward,
        forward_backward=forward_backward,
        decode=counter.get_total_flops(),
        gradient_checkpointing=gradient_checkpointing,
    )


@cache
def _count(
    key: str,
    lora_rank: int,
    lora_targets: tuple[str, ...],
    dtype: torch.dtype,
    kernels: bool,
    gradient_checkpointing: bool,
) -> ModelCost:
    flop = _count_flop(key, lora_rank, lora_targets, gradient_checkpointing)
    unet, vae, text_encoder = _modules(key, lora_rank, lora_targets, dtype)
    for module in (unet, vae):
        cast(module, dtype)
    if kernels:
        patch_unet(unet)
    if gradient_checkpointing:
        recompute_with_fused_attention(unet)
    inputs = unet_inputs(unet, text_encoder, 1, dtype)
    channels, height, width = inputs[0].shape[1:]
    saving, learning = held_bytes(unet, [unet_inputs(unet, text_encoder, samples, dtype) for samples in (2, 4)])
    with torch.no_grad(), FusedAttention(), LiveBytes() as passing:
        unet(*inputs, return_dict=False)
    with torch.no_grad(), FusedAttention(), LiveBytes() as decoding:
        image = vae.decode(inputs[0], return_dict=False)[0]
    return ModelCost(
        unet=sum(p.numel() for name, p in unet.named_parameters() if ".lora_" not in name),
        trained=sum(p.numel() for p in unet.parameters() if p.requires_grad),
        frozen=parameters(vae) + parameters(text_encoder),
        text_encoder=parameters(text_encoder),
        latent_shape=(channels, height, width),
        image_shape=(image.shape[1], image.shape[2], image.shape[3]),
        **asdict(flop),
        activations=saved_bytes(unet, inputs),
        saving=saving,
        learning=learning,
        passing=passing.most,
        decoding=decoding.most,
    )


@cache
def count_encoder(spec: str) -> EncoderCost:
    """Counts the model that `reward.encoder` names, once. Raises ConfigError if it cannot be built here."""
    try:
        with torch.device("meta"), torch.no_grad(), _quiet():
            model = _empty_encoder(spec).eval()
            size = open_clip.get_model_preprocess_cfg(model)["size"]
            images = torch.empty(1, 3, *((size, size) if isinstance(size, int) else size))
            with FlopCounterMode(display=False) as counter, LiveBytes() as encoding:
                model.encode_image(images)
            texts = parameters(model) - parameters(model.visual)
            return EncoderCost(parameters(model), texts, counter.get_total_flops(), encoding.most)
    except Exception as error:  # open_clip's, torch's, the hub's own, and those of the HTTP library it happens to use
        raise ConfigError(f"{spec!r} cannot be counted: {' '.join(str(error).split())[:200]}") from error


def encoder_specs(config: RewardConfig) -> tuple[str, ...]:
    """Lists the encoders of the reward's terms, each once, in the notation of `reward.encoder`."""
    of_term = {
        "steering": config.encoder,
        "clip": config.clip_encoder or config.encoder,
        "hpsv2": "hpsv2",
        "pickscore": TRANSFORMERS + config.pickscore,
        "aesthetic": config.aesthetic_encoder,
        "safety:q16": config.q16.encoder,
        "safety:open-clip": config.open_clip.encoder,
        "safety:safety-checker": _CHECKER + config.safety_checker.source,
    }
    return tuple(dict.fromkeys(of_term[term.name] for term in parse_terms(config.terms) if term.name in of_term))


def count_encoders(config: RewardConfig) -> tuple[dict[str, EncoderCost], list[str]]:
    """Counts the reward's encoders, by spec; also returns a line for each term that is not counted."""
    encoders, lines = {}, []
    for spec in encoder_specs(config):
        try:
            encoders[spec] = count_encoder(spec)
        except ConfigError as error:
            lines.append(f"Left out: the reward's encoder {error}")
    lines += [f"Left out: the reward's term {term.name}" for term in parse_terms(config.terms) if _uncounted(term)]
    return encoders, lines


def _uncounted(term: Term) -> bool:
    """Whether its cost is not known; oracles read pictures on the CPU."""
    return bool(term.place or term.given) or term.detector == "nudenet"


def parameters(module: nn.Module) -> int:
    """Counts the numbers that a module's parameters have."""
    return sum(parameter.numel() for parameter in module.parameters())


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts weights to `dtype`, without the warnings of diffusers' `module.to`."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def unet_inputs(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, samples: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes latents [N, C, H, W], timesteps [N] int64 and embeddings [N, L, D], on the meta device; channels-last."""
    config, size = unet.config, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    latents = torch.empty(samples, config.in_channels, height, width, dtype=dtype, device="meta")
    tokens, features = text_encoder.config.max_position_embeddings, config.cross_attention_dim
    return (
        latents.to(memory_format=torch.channels_last),
        torch.empty(samples, dtype=torch.int64, device="meta"),
        torch.empty(samples, tokens, features, dtype=dtype, device="meta"),
    )


class _EmptyChecker(nn.Module):
    """The image tower of Stable Diffusion's safety checker, which reads no texts, without weights."""

    def __init__(self, source: str) -> None:
        super().__init__()
        file = "safety_checker/config.json"
        folder = Repository("safety_checker.source", source).fetch([file, "config.json"])
        config = CLIPConfig.from_pretrained(
            (folder / file if (folder / file).is_file() else folder / "config.json").parent
        )
        size = {"size": config.vision_config.image_size}
        self.visual = ImageTower(StableDiffusionSafetyChecker(config), size)

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.visual(pixels)
        return features


def _empty_encoder(spec: str) -> Any:
    """An open_clip model, or its like, without weights."""
    if spec.startswith(_CHECKER):
        return _EmptyChecker(spec.removeprefix(_CHECKER))
    if spec.startswith(TRANSFORMERS):
        return empty_transformers_clip(spec.removeprefix(TRANSFORMERS))
    return open_clip.create_model(_architecture(spec), load_weights=False, pretrained_text=False, device="meta")


def _architecture(spec: str) -> str:
    """Writes the spec as the model_name of open_clip.create_model."""
    if spec.startswith(("local-dir:", "hf-hub:")):
        return spec
    own = {"hpsv2": "ViT-H-14", **SHIPPED_ENCODERS}
    return own.get(spec) or spec.partition(":")[0].replace("/", "-")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences open_clip's warning that there are no weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
