"""Adapters as kohya's sd-scripts write them, which is what A1111, Forge and ComfyUI load from their folder of LoRAs.

One file has three tensors for each layer. Its name is the one diffusers gives it, with `_` for `.`, after `lora_unet_`:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight   A, [rank, inputs]
                                                                         .lora_up.weight     B, [outputs, rank]
                                                                         .alpha              alpha, []

Of a convolution A is [rank, inputs, height, width] and B [outputs, rank, 1, 1]. Readers multiply B A by alpha / rank
themselves, so B is as it was trained. What a program shows of a file, and whether it takes it for one of SD 1.x or 2.x,
it reads in the metadata: strings under kohya's names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.models.save import save_tensors
from fastgrpo.unet.lora import Adapters, module_and_letter

_PREFIX = "lora_unet_"
_TENSORS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
_VERSIONS = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True")}  # width of the text's embeddings -> version, ss_v2


def save_kohya(file: Path, name: str, adapters: Adapters, unet: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write adapters, in `dtype`, to one .safetensors file: the same bytes for the same adapters.

    name: what programs call the LoRA. unet: config of the UNet that they are of.
    """
    alpha = torch.tensor(float(adapters.alpha))  # float32 whatever the rest is in: it scales all of it
    tensors: dict[str, Tensor] = {}
    for parameter, tensor in adapters.tensors.items():
        module, letter = module_and_letter(parameter)
        key = _PREFIX + module.replace(".", "_")
        tensors[f"{key}.{_TENSORS[letter]}"] = tensor.to("cpu", dtype).contiguous()
        tensors[f"{key}.alpha"] = alpha.clone()  # tensors of a file may not share memory
    save_tensors(file, tensors, _metadata(name, adapters, unet))


def _metadata(name: str, adapters: Adapters, unet: Mapping[str, Any]) -> dict[str, str]:
    """What readers look for; the version is left out of a UNet that is neither SD 1.x's nor 2.x's."""
    rank, alpha = str(adapters.rank), str(float(adapters.alpha))
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_output_name": name,
    }
    if version := _VERSIONS.get(unet["cross_attention_dim"]):
        metadata |= dict(zip(("ss_base_model_version", "ss_v2"), version, strict=True))
    if any(tensor.ndim == 4 and max(tensor.shape[2:]) > 1 for tensor in adapters.tensors.values()):
        # Of convolutions larger than 1x1 kohya has a rank and an alpha of their own.
        metadata["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    return metadata
