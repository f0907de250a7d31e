"""What a model computes and keeps, counted from its architecture on the meta device: no weights, no GPU, no network.

FLOPs are those of convolutions, linear layers and attention, one multiplication and one addition being two. What a
fused attention kernel computes a second time in its backward pass is not counted.
"""

import json
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo.models import check
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Description
from fastgrpo.rewards.encoder_files import SHAPES_ENCODER
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.settings.schema import ModelConfig, RewardConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.lora import add_lora


@dataclass(frozen=True)
class Held:
    """Bytes that N samples hold at the worst moment: the most of fixed + N * each over its moments, (fixed, each)."""

    moments: tuple[tuple[int, int], ...]

    def bytes(self, samples: int) -> int:
        return max(fixed + samples * each for fixed, each in self.moments)


@dataclass(frozen=True, kw_only=True)
class ModelFlop:
    """What one Stable Diffusion computes.

    forward, forward_backward: FLOP of the UNet for one sample; backward, what the trained parameters' gradients need.
    decode: FLOP of the VAE for one image.
    """

    forward: int
    forward_backward: int
    decode: int


@dataclass(frozen=True, kw_only=True)
class ModelCost(ModelFlop):
    """What it computes and holds. Its UNet computes in one dtype throughout, weights and activations alike.

    unet: its parameters, without adapters. trained: parameters that learn, the UNet's own or the adapters'.
    frozen: parameters of the VAE and the text encoder.
    latent_shape: (C, H, W). image_shape: (3, h, w).
    activations: bytes that the UNet's forward pass saves for the backward pass, for one sample.
    saving: bytes that such a forward pass holds at its worst moment, for one sample.
    learning: bytes that it and its backward pass hold, the gradients of the trained parameters among them.
    passing, decoding: bytes that a forward pass without gradients, of the UNet for one sample or of the VAE for one
        image, holds at its worst moment.
    """

    unet: int
    trained: int
    frozen: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    activations: int
    saving: int
    learning: Held
    passing: int
    decoding: int


@dataclass(frozen=True)
class EncoderCost:
    """A reward's encoder.

    parameters: of both towers. image: FLOP of the image tower for one image.
    encoding: bytes that the tower holds for one image at its worst moment.
    """

    parameters: int
    image: int
    encoding: int


def find_architecture(model: ModelConfig) -> tuple[Description, bool]:
    """The configs of what `model` names, and whether they are its own.

    They are SD 1.x's where the hub cannot be reached and its cache on this machine does not hold the model's.
    model.unet is not looked at: it has the pipeline's architecture or training refuses it.
    Raises ConfigError, as `describe`, for anything else that is in the way.
    """
    try:
        return describe(replace(model, unet="")), True
    except ConfigError as error:
        if model.config or not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return sd1_architecture(), False


def sd1_architecture() -> Description:
    """The configs of SD 1.x that ship with fastgrpo."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((Path(check.__file__).parent / "sd1" / name).read_text(encoding="utf-8"))

    return Description(
        unet=read("unet/config.json"),
        vae=read("vae/config.json"),
        text_encoder=read("text_encoder/config.json"),
        scheduler=read("scheduler/scheduler_config.json"),
        tokenizer=None,
    )


def count_model(description: Description, model: ModelConfig, dtype: torch.dtype, kernels: bool = False) -> ModelCost:
    """Count a Stable Diffusion as it would be trained, with adapters where `model` has them. The same is counted once.

    dtype: what the UNet computes in. kernels: whether its norms and activations are fastgrpo's operators, which save less.
    Raises ConfigError for adapters that fit no module.
    """
    return _count(_key(description), model.lora_rank, model.lora_targets, dtype, kernels)


def count_flop(description: Description, model: ModelConfig) -> ModelFlop:
    """As `count_model`, the FLOPs alone, in a third of the time."""
    return _count_flop(_key(description), model.lora_rank, model.lora_targets)


def _key(description: Description) -> str:
    return json.dumps([dict(part) for part in (description.unet, description.vae, description.text_encoder)])


def _modules(key: str, lora_rank: int, lora_targets: tuple[str, ...], dtype: torch.dtype) -> tuple[nn.Module, ...]:
    """UNet, with adapters, VAE and text encoder on the meta device."""
    modules = Description(*json.loads(key), scheduler={}, tokenizer=None).empty_components()
    unet, vae, text_encoder = (modules[name].eval() for name in ("unet", "vae", "text_encoder"))
    if lora_rank:
        add_lora(unet, ModelConfig(lora_rank=lora_rank, lora_targets=lora_targets), seed=0, frozen_dtype=dtype)
    return unet, vae, text_encoder


def _count_passes(unet: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """FLOP of a forward pass, and of one with the backward pass that the trained parameters need."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False) as counter:
        output = unet(*inputs, return_dict=False)[0]
        forward = counter.get_total_flops()
        torch.autograd.grad(output.sum(), trained)
    return forward, counter.get_total_flops()


@cache
def _count_flop(key: str, lora_rank: int, lora_targets: tuple[str, ...]) -> ModelFlop:
    unet, vae, text_encoder = _modules(key, lora_rank, lora_targets, torch.float32)
    inputs = unet_inputs(unet, text_encoder, 1, torch.float32)
    forward, forward_backward = _count_passes(unet, inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(inputs[0], return_dict=False)
    return ModelFlop(forward=forward, forward_backward=forward_backward, decode=counter.get_total_flops())


@cache
def _count(key: str, lora_rank: int, lora_targets: tuple[str, ...], dtype: torch.dtype, kernels: bool) -> ModelCost:
    flop = _count_flop(key, lora_rank, lora_targets)
    unet, vae, text_encoder = _modules(key, lora_rank, lora_targets, dtype)
    for module in (unet, vae):
        cast(module, dtype)
    if kernels:
        patch_unet(unet)
    inputs = unet_inputs(unet, text_encoder, 1, dtype)
    saving, learning = held_bytes(unet, [unet_inputs(unet, text_encoder, samples, dtype) for samples in (2, 4)])
    with torch.no_grad(), FusedAttention(), _LiveBytes() as passing:
        unet(*inputs, return_dict=False)
    with torch.no_grad(), FusedAttention(), _LiveBytes() as decoding:
        image = vae.decode(inputs[0], return_dict=False)[0]
    return ModelCost(
        unet=sum(p.numel() for name, p in unet.named_parameters() if ".lora_" not in name),
        trained=sum(p.numel() for p in unet.parameters() if p.requires_grad),
        frozen=parameters(vae) + parameters(text_encoder),
        latent_shape=tuple(inputs[0].shape[1:]),
        image_shape=tuple(image.shape[1:]),
        **asdict(flop),
        activations=saved_bytes(unet, inputs),
        saving=saving,
        learning=learning,
        passing=passing.most,
        decoding=decoding.most,
    )


@cache
def count_encoder(spec: str) -> EncoderCost:
    """Count the open_clip model that `reward.encoder` names, without its weights. The same is counted once.

    Raises ConfigError for one whose architecture is not on this machine or cannot be built without weights.
    """
    try:
        with torch.device("meta"), torch.no_grad(), _quiet():
            model = open_clip.create_model(
                _architecture(spec), load_weights=False, pretrained_text=False, device="meta"
            ).eval()
            size = open_clip.get_model_preprocess_cfg(model)["size"]
            images = torch.empty(1, 3, *((size, size) if isinstance(size, int) else size))
            with FlopCounterMode(display=False) as counter, _LiveBytes() as encoding:
                model.encode_image(images)
            return EncoderCost(parameters(model), counter.get_total_flops(), encoding.most)
    except Exception as error:  # open_clip's, torch's, the hub's own, and those of the HTTP library it happens to use
        raise ConfigError(f"{spec!r} cannot be counted: {' '.join(str(error).split())[:200]}") from error


def encoder_specs(config: RewardConfig) -> tuple[str, ...]:
    """The open_clip models of the reward's terms, each once, in the notation of `reward.encoder`."""
    of_term = {"steering": config.encoder, "clip": config.clip_encoder or config.encoder, "hpsv2": "hpsv2"}
    return tuple(dict.fromkeys(of_term[term.name] for term in parse_terms(config.terms) if term.name in of_term))


def count_encoders(config: RewardConfig) -> tuple[dict[str, EncoderCost], list[str]]:
    """The reward's encoders by spec, and a line for each term that is not counted."""
    encoders, lines = {}, []
    for spec in encoder_specs(config):
        try:
            encoders[spec] = count_encoder(spec)
        except ConfigError as error:
            lines.append(f"Left out: the reward's encoder {error}")
    lines += [f"Left out: the reward's term {term.name}" for term in parse_terms(config.terms) if term.place]
    return encoders, lines


def parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters are."""
    return sum(parameter.numel() for parameter in module.parameters())


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights in `dtype`, without the words that diffusers has for `module.to`."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def unet_inputs(
    unet: nn.Module, text_encoder: nn.Module, samples: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, C, H, W], timesteps [N] int64 and embeddings [N, L, D], on the meta device; channels-last."""
    config, size = unet.config, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    latents = torch.empty(samples, config.in_channels, height, width, dtype=dtype, device="meta")
    tokens, features = text_encoder.config.max_position_embeddings, config.cross_attention_dim
    return (
        latents.to(memory_format=torch.channels_last),
        torch.empty(samples, dtype=torch.int64, device="meta"),
        torch.empty(samples, tokens, features, dtype=dtype, device="meta"),
    )


class FusedAttention(TorchFunctionMode):
    """Attention as one kernel on the meta device, where it otherwise falls apart into steps that hold a matrix of all
    tokens by all tokens."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            query, key, value = args
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        return function(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of what is computed until it is let go. most: bytes at the worst moment.

    history: bytes after everything that was computed, one number for each result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = [0]
        self._now = 0
        self._alive: set[int] = set()

    @property
    def most(self) -> int:
        return max(self.history)

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_identity(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _identity(tensor) not in given | self._alive:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._alive.add(storage._cdata)
        self._now += storage.nbytes()
        self.history.append(self._now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self._now -= size


def saved_bytes(unet: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that a forward pass leaves for the backward pass.

    What is saved twice counts once; weights do not count. All on the meta device.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[_identity(tensor)] = tensor.untyped_storage()  # held, so that no other takes its identity over
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(*inputs, return_dict=False)
    weights = {_identity(tensor) for tensor in unet.parameters()}
    return sum(storage.nbytes() for identity, storage in storages.items() if identity not in weights)


def held_bytes(unet: nn.Module, inputs: list[tuple[Tensor, ...]]) -> tuple[int, Held]:
    """What a forward pass that saves for a backward pass holds for a sample, and what both together hold.

    inputs: of two samples and of four; one alone spares some copies. The passes do the same things in the same order, so
    at each moment memory is a line through the two numbers. All on the meta device.
    """
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    forwards, histories = [], []
    for some in inputs:
        with FusedAttention(), _LiveBytes() as live:
            output = unet(*some, return_dict=False)[0]
            forwards.append(live.most)
            torch.autograd.grad(output, trained, torch.empty_like(output))
        histories.append(live.history)
    lines = {(2 * two - four, (four - two) // 2) for two, four in zip(*histories, strict=True)}
    return (forwards[1] - forwards[0]) // 2, Held(_upper(lines))


def _upper(lines: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Of (fixed, each), those that are above all others for some number of samples from 0 on; flattest first."""
    kept: list[tuple[int, int]] = []
    for fixed, each in sorted(lines, key=lambda line: (line[1], line[0])):
        while kept and (kept[-1][0] <= fixed or (len(kept) > 1 and _never_above(kept[-2], kept[-1], (fixed, each)))):
            kept.pop()
        kept.append((fixed, each))
    return tuple(kept)


def _never_above(flat: tuple[int, int], middle: tuple[int, int], steep: tuple[int, int]) -> bool:
    """Whether the steep line passes the flat one before the middle one does; slopes ascend."""
    return (flat[0] - steep[0]) * (middle[1] - flat[1]) <= (flat[0] - middle[0]) * (steep[1] - flat[1])


def _identity(tensor: Tensor) -> int:
    """The same for all views of one storage, while it lives; on the meta device addresses are all 0."""
    return tensor.untyped_storage()._cdata


def _architecture(spec: str) -> str:
    """The spec as open_clip.create_model's model_name."""
    if spec in ("hpsv2", "shapes"):
        return {"hpsv2": "ViT-H-14", "shapes": SHAPES_ENCODER}[spec]
    if spec.startswith(("local-dir:", "hf-hub:")):
        return spec
    return spec.partition(":")[0].replace("/", "-")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that there are no weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
