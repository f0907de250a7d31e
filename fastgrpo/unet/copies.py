"""The UNet that computes: the trained one's modules around weights in the dtype of the computation.

float32 shares every weight with the trained UNet. In half precision weights are copies, and those that are trained lie
in the flat working copy, which the optimizer's own pass keeps up to date: nothing is cast while the UNet runs.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

Network = Callable[..., tuple[Tensor, ...]]
"""(latents [R, C, H, W], timesteps [R], contexts [R, L, D], return_dict=False) -> ([R, C, H, W],): diffusers' UNet."""


def computing_unet(
    unet: UNet2DConditionModel, dtype: torch.dtype, working: Mapping[str, Tensor] | None = None
) -> UNet2DConditionModel:
    """Returns a UNet with modules of its own, so that patching or wrapping them leaves `unet` and its state dict alone.

    working: parameter name -> the tensor in `dtype` to compute with in its place. Other parameters are shared where
    they are in `dtype`, and rounded to it here where they are not.
    """
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in unet.named_parameters():
        value = (working or {}).get(name)
        if value is None and parameter.dtype != dtype:
            value = parameter.detach().to(dtype)
        replaced[id(parameter)] = parameter if value is None else nn.Parameter(value, parameter.requires_grad)
    return copy.deepcopy(unet, replaced)


def base_unet(network: UNet2DConditionModel) -> UNet2DConditionModel:
    """Returns the UNet that `network` is now, and stays: frozen, with modules of its own.

    Weights that are not trained are shared: beside adapters it costs a copy of these. Without, it is as large as
    `network`, in the same dtype.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    shared |= {id(buffer): buffer for buffer in network.buffers()}
    return copy.deepcopy(network, shared).requires_grad_(False)
