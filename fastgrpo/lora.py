"""LoRA adapters on the UNet (Hu et al., arXiv 2106.09685): y = W x + (alpha / rank) B A x, with W frozen.

peft puts them in; they are saved as diffusers' `load_lora_weights` takes them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgrpo.config import ConfigError, ModelConfig, nearest

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
_ADAPTER = "default"


def add_lora(unet: UNet2DConditionModel, config: ModelConfig, seed: int, frozen_dtype: torch.dtype) -> None:
    """Freeze the UNet and give it float32 adapters, A random and B zero, so that nothing changes yet.

    frozen_dtype: what the UNet's own weights are held in from now on.
    Raises ConfigError as `check_targets`.
    """
    check_targets(unet, config.lora_targets)
    for parameter in unet.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(frozen_dtype)
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,
        target_modules=list(config.lora_targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(adapters, _ADAPTER)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_targets(unet: UNet2DConditionModel, targets: Sequence[str]) -> None:
    """Raise ConfigError for the first of `targets` that is not the end of the name of layers adapters can be put in.

    unet: may be on the meta device.
    """
    ends: dict[str, bool] = {}  # of every module's name -> whether adapters fit all modules with this end
    for name, module in unet.named_modules():
        parts = name.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            ends[end] = ends.get(end, True) and isinstance(module, nn.Linear | nn.Conv2d)
    for target in targets:
        if not ends.get(target):
            fitting = [end for end, fits in ends.items() if fits]
            raise ConfigError(
                f"model.lora_targets = {target!r}: no such layers{nearest(target, fitting)}; accepted are ends of names "
                "of the UNet's linear and convolution layers, such as to_q."
            )


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether `add_lora` has been here."""
    return any(isinstance(module, LoraLayer) for module in unet.modules())


@torch.no_grad()
def merged_state_dict(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The state dict of a plain UNet that does what this one does with its adapters: W + (alpha / rank) B A, float32."""
    state = {
        name.replace(".base_layer.", "."): tensor.float()
        for name, tensor in unet.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight(_ADAPTER).float()
    return state


def save_lora(folder: Path, unet: UNet2DConditionModel) -> None:
    """Write the adapters, their rank and alpha, for `pipeline.load_lora_weights(folder)`."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=_ADAPTER),
        **_collate_lora_metadata({"unet": unet}),
    )


def load_lora(file: Path, unet: UNet2DConditionModel) -> None:
    """Put saved adapters into a UNet that has adapters of the same shapes."""
    saved = load_file(file)
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(saved["unet." + name.replace(f".{_ADAPTER}.", ".")])
