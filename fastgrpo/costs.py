"""What a model computes and keeps, counted from its architecture on the meta device: no weights, no GPU, no network.

FLOPs are those of convolutions, linear layers and attention, one multiplication and one addition being two. What a
fused attention kernel computes a second time in its backward pass is not counted.
"""

import json
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from fastgrpo.config import ConfigError, ModelConfig
from fastgrpo.lora import add_lora
from fastgrpo.models import check
from fastgrpo.models.check import Description, describe
from fastgrpo.rewards.encoder import SHAPES_ENCODER

# What CUDA's autocast computes in half precision, and what in float32 (of all that a UNet is made of).
_HALF = (F.conv2d, F.linear, F.scaled_dot_product_attention)
_FLOAT32 = (F.group_norm, F.layer_norm)


@dataclass(frozen=True)
class ModelCost:
    """One Stable Diffusion.

    unet: its parameters, without adapters. trained: parameters that learn, the UNet's own or the adapters'.
    frozen: parameters of the VAE and the text encoder.
    latent_shape: (C, H, W). image_shape: (3, h, w).
    forward, forward_backward: FLOP of the UNet for one sample; backward, what the trained parameters' gradients need.
    decode: FLOP of the VAE for one image.
    activations: bytes that the UNet's forward pass saves for the backward pass, for one sample.
    passing, decoding: bytes that a forward pass without gradients, of the UNet for one sample or of the VAE for one
        image, holds at its worst moment.
    cast: bytes of the half-precision copies of trained weights that autocast makes; 0 in float32.
    """

    unet: int
    trained: int
    frozen: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    forward: int
    forward_backward: int
    decode: int
    activations: int
    passing: int
    decoding: int
    cast: int


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


def count_model(description: Description, model: ModelConfig, dtype: torch.dtype) -> ModelCost:
    """Count a Stable Diffusion as it would be trained, with adapters where `model` has them.

    dtype: what the UNet computes in. Raises ConfigError for adapters that fit no module.
    """
    modules = description.empty_components()
    unet, vae, text_encoder = (modules[name].eval() for name in ("unet", "vae", "text_encoder"))
    own = parameters(unet)
    if model.lora_rank:
        add_lora(unet, model, seed=0, frozen_dtype=dtype)
    inputs, autocast = unet_inputs(unet, text_encoder, 1), GpuAutocast(dtype)
    activations = saved_bytes(unet, inputs, autocast)
    with torch.no_grad(), autocast, _LiveBytes() as passing:
        unet(*inputs, return_dict=False)
    unet.float()
    forward, forward_backward = _count_passes(unet, inputs)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        GpuAutocast(torch.float32),
        _LiveBytes() as decoding,
    ):
        image = vae.decode(inputs[0], return_dict=False)[0]
    return ModelCost(
        unet=own,
        trained=sum(p.numel() for p in unet.parameters() if p.requires_grad),
        frozen=parameters(vae) + parameters(text_encoder),
        latent_shape=tuple(inputs[0].shape[1:]),
        image_shape=tuple(image.shape[1:]),
        forward=forward,
        forward_backward=forward_backward,
        decode=counter.get_total_flops(),
        activations=activations,
        passing=passing.most,
        decoding=decoding.most * dtype.itemsize // torch.float32.itemsize,
        cast=sum(copy.nbytes for copy in autocast.copies.values()),
    )


def count_encoder(spec: str) -> EncoderCost:
    """Count the open_clip model that `reward.encoder` names, without its weights.

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


def parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters are."""
    return sum(parameter.numel() for parameter in module.parameters())


def unet_inputs(unet: nn.Module, text_encoder: nn.Module, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, C, H, W], timesteps [N] and embeddings [N, L, D], on the meta device."""
    config, size = unet.config, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        return (
            torch.empty(samples, config.in_channels, height, width),
            torch.empty(samples, dtype=torch.int64),
            torch.empty(samples, text_encoder.config.max_position_embeddings, config.cross_attention_dim),
        )


class GpuAutocast(TorchFunctionMode):
    """What torch.autocast("cuda") does, on the meta device, where it does nothing; and attention as one kernel.

    Without it attention falls apart into steps that hold a matrix of all tokens by all tokens.
    dtype: with torch.float32 nothing is cast.
    copies: the half-precision copies of trained weights, each made once.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._dtype != torch.float32 and function in _HALF + _FLOAT32:
            dtype = self._dtype if function in _HALF else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if function is F.scaled_dot_product_attention:
            query, key, value = args
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        return function(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if value.is_leaf and value.requires_grad:
            if id(value) not in self.copies:
                self.copies[id(value)] = value.to(dtype)
            return self.copies[id(value)]
        return value.to(dtype)


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of what is computed until it is let go. most: bytes at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: set[int] = set()

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
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self._now -= size


def saved_bytes(unet: nn.Module, inputs: tuple[Tensor, ...], autocast: GpuAutocast) -> int:
    """Bytes that a forward pass under `autocast` leaves for the backward pass.

    What is saved twice counts once; weights and their copies do not count. All on the meta device.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[_identity(tensor)] = tensor.untyped_storage()  # held, so that no other takes its identity over
        return tensor

    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(*inputs, return_dict=False)
    weights = {_identity(tensor) for tensor in (*unet.parameters(), *autocast.copies.values())}
    return sum(storage.nbytes() for identity, storage in storages.items() if identity not in weights)


def _identity(tensor: Tensor) -> int:
    """The same for all views of one storage, while it lives; on the meta device addresses are all 0."""
    return tensor.untyped_storage()._cdata


def _count_passes(unet: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """FLOP of a forward pass, and of one with the backward pass that the trained parameters need."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False) as counter:
        output = unet(*inputs, return_dict=False)[0]
        forward = counter.get_total_flops()
        torch.autograd.grad(output.sum(), trained)
    return forward, counter.get_total_flops()


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
