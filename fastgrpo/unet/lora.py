"""LoRA adapters on the UNet (Hu et al., arXiv 2106.09685): y = W x + (alpha / rank) B A x, with W frozen.

peft puts them in; they are saved as diffusers' `load_lora_weights` takes them, with alpha / rank multiplied into B:
what reads no metadata (diffusers before 0.35, ComfyUI) takes alpha for the rank, and would draw with another strength.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastgrpo.models.save import save_tensors
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError, nearest

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
_METADATA = "lora_adapter_metadata"  # diffusers' key
_ADAPTER = "default"
_COMPONENT = "unet."


@dataclass(frozen=True)
class Adapters:
    """Trained adapters and their strength.

    tensors: A and B of every adapter, float32, by the names of these parameters in the UNet. rank: rows of A.
    alpha: the change of a weight is (alpha / rank) B A. targets: ends of the names of the layers that have adapters.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]


def add_lora(unet: UNet2DConditionModel, config: ModelConfig, seed: int, frozen_dtype: torch.dtype) -> None:
    """Freezes the UNet, holds its weights in `frozen_dtype`, and gives it float32 adapters, A random and B zero.

    Raises ConfigError for layers that are not there, as `check_targets`.
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
    """Raises ConfigError for the first of `targets` that does not end the names of layers adapters can be put in."""
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
                f"model.lora_targets = {target!r}: no such layers{nearest(target, fitting)}; accepted are ends of "
                "names of the UNet's linear and convolution layers, such as to_q."
            )


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether `add_lora` gave the UNet adapters."""
    return any(isinstance(module, LoraLayer) for module in unet.modules())


def adapters_of(unet: UNet2DConditionModel) -> Adapters:
    """Returns the adapters that `add_lora` put in, as they are now."""
    config = unet.peft_config[_ADAPTER]
    tensors = {name: parameter.detach() for name, parameter in unet.named_parameters() if parameter.requires_grad}
    return Adapters(tensors, config.r, config.lora_alpha, tuple(sorted(config.target_modules)))


@torch.no_grad()
def merged_state_dict(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Returns the state dict, float32, of a plain UNet that does the same without adapters: W + (alpha / rank) B A."""
    own = {name: tensor for name, tensor in unet.state_dict().items() if ".lora_" not in name}
    state = {name.replace(".base_layer.", "."): tensor.float() for name, tensor in own.items()}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight(_ADAPTER).float()
    return state


def save_lora(folder: Path, adapters: Adapters, dtype: torch.dtype = torch.float32) -> None:
    """Writes adapters in `dtype` for `pipeline.load_lora_weights(folder)`: the same bytes for the same adapters.

    B is multiplied by alpha / rank in float32 and alpha written as the rank, so that the file means the same with its
    metadata and without. The metadata has only what every version of peft knows.
    """
    scale = adapters.alpha / adapters.rank
    tensors = {
        _file_name(name): (tensor * scale if ".lora_B." in name else tensor).to("cpu", dtype).contiguous()
        for name, tensor in adapters.tensors.items()
    }
    described = {
        "r": adapters.rank,
        "lora_alpha": adapters.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(adapters.targets),
        "use_dora": False,
        "lora_bias": False,
    }
    text = json.dumps({_COMPONENT + key: value for key, value in described.items()}, indent=2, sort_keys=True)
    folder.mkdir()
    save_tensors(folder / LORA_FILE, tensors, {"format": "pt", _METADATA: text})


def parameters_in(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the tensors of a file that `load_lora_weights` reads as their parameters in the UNet."""
    return {_parameter_name(name): tensor for name, tensor in saved.items()}


@torch.no_grad()
def load_adapters(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors`, as of `Adapters`, into a UNet's adapters; KeyError or RuntimeError for other names or shapes."""
    wanted = adapters_of(unet).tensors
    for name in [*wanted, *tensors]:
        wanted[name].copy_(tensors[name])


def _file_name(parameter: str) -> str:
    """Returns diffusers' name of an adapter's parameter, which leaves out what peft puts into it."""
    return _COMPONENT + parameter.replace(f".{_ADAPTER}.", ".")


def _parameter_name(name: str) -> str:
    module, _, letter = name.removeprefix(_COMPONENT).removesuffix(".weight").rpartition(".")
    return f"{module}.{letter}.{_ADAPTER}.weight"


def module_and_letter(parameter: str) -> tuple[str, str]:
    """Name of an adapter's parameter in the UNet -> that of the layer it is put into, and `lora_A` or `lora_B`."""
    module, _, letter = parameter.removesuffix(f".{_ADAPTER}.weight").rpartition(".")
    return module, letter
