"""Loading what a run was trained to, for the commands that use it."""

import copy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgrpo.models.sound import load_finite
from fastgrpo.run import checkpoint
from fastgrpo.run.opening import EMA_FILE, Weights
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet.lora import Adapters, add_lora, load_adapters, merged_state_dict

_UNET = "unet/diffusion_pytorch_model.safetensors"


def load_unet(unet: UNet2DConditionModel, folder: Path, weights: Weights, model: ModelConfig) -> None:
    """Give the base model's UNet the weights of a verified checkpoint, in place; adapters are merged into its own.

    unet: float32, loaded from `model`, the run's.
    Raises ConfigError where it is not the UNet that was trained, but one of other shapes, and for weights that are
    not finite.
    """
    try:
        unet.load_state_dict(_merged(unet, folder, weights, model) if model.lora_rank else _whole(folder, weights))
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"model.path is {model.path!r}, whose UNet has other shapes than that of {folder}; accepted is the model "
            "that the run began with."
        ) from error


def read_adapters(folder: Path, weights: Weights, model: ModelConfig) -> Adapters:
    """The adapters of a verified checkpoint of a run on `model`."""
    tensors = checkpoint.read_adapters(folder) if weights == "trained" else load_finite(folder / EMA_FILE)
    return Adapters(tensors, model.lora_rank, model.lora_alpha or model.lora_rank, model.lora_targets)


def _whole(folder: Path, weights: Weights) -> dict[str, Tensor]:
    """All weights of a UNet that was trained itself, float32."""
    return load_finite(folder / (_UNET if weights == "trained" else EMA_FILE))


@torch.no_grad()
def _merged(unet: UNet2DConditionModel, folder: Path, weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """The UNet's own weights with a checkpoint's adapters merged into them, float32.

    The checkpoint's own merged UNet is not used: its frozen weights are as exact as training held them, which may be
    bfloat16. Raises KeyError or RuntimeError where the adapters do not fit.
    """
    adapted = copy.deepcopy(unet)
    add_lora(adapted, model, seed=0, frozen_dtype=torch.float32)
    load_adapters(adapted, read_adapters(folder, weights, model).tensors)
    return merged_state_dict(adapted)
