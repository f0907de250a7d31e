"""SD 1.5's UNet, as it is trained, on a device that is not there; all inside of `absent_device()`."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from absent import module_on_device
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastgrpo.costs.counting import sd1_architecture
from fastgrpo.engine.trainable import Trainable, make_trainable
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.unet.attention import AttentionPlan, AttentionShape, Choice, apply_plan, attention_shapes
from fastgrpo.unet.compilation import replace_upsamplers
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.lora import add_lora

LATENT, TOKENS, WIDTH = (4, 64, 64), 77, 768


def trainable_unet(config: TrainConfig) -> Trainable:
    """SD 1.5's UNet ready to be trained, on the device; inside of `absent_device()`."""
    with unset_fake_temporarily():
        unet = sd1_architecture().empty_components()["unet"].to(memory_format=torch.channels_last)
        if config.model.lora_rank:  # here, since peft cannot move adapters that have no values
            add_lora(unet, config.model, 0, torch.bfloat16)
    with mock.patch("fastgrpo.engine.trainable.add_lora"):
        return make_trainable(module_on_device(unet.eval()), config, torch.device("cuda"), torch.bfloat16)


def computing_unet(config: TrainConfig, backend: str) -> UNet2DConditionModel:
    """What computes in its place, as an engine on CUDA has it before it is compiled. backend: of all attention."""
    network = trainable_unet(config).network
    patch_unet(network)
    apply_plan(network, attention_plan(backend, attention_shapes(network, 2, LATENT, TOKENS)))
    replace_upsamplers(network)
    return network


def attention_plan(backend: str, shapes: Sequence[AttentionShape]) -> AttentionPlan:
    return AttentionPlan(backend, tuple(Choice(shape, backend) for shape in shapes))


def unet_inputs(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and contexts on the device."""
    with torch.device("cuda"):
        latents, contexts = torch.empty(rows, *LATENT, dtype=dtype), torch.empty(rows, TOKENS, WIDTH, dtype=dtype)
        return latents, torch.empty(rows, dtype=torch.int64), contexts


def block_inputs(network: UNet2DConditionModel, name: str, rows: int) -> tuple[list[Any], dict[str, Any]]:
    """What the module `name` is called with in a pass of the UNet; with gradients, as within a pass."""
    found = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))

    handle = network.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        network(*unet_inputs(rows), return_dict=False)
    handle.remove()
    args, kwargs = found[0]

    def wanting(value: Any) -> Any:
        wants = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if wants else value

    return [wanting(value) for value in args], {key: wanting(value) for key, value in kwargs.items()}
