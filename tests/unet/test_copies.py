"""The base model that a KL term is measured from: what it shares with the network that learns, and that it stays."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fastgrpo.settings.schema import ModelConfig
from fastgrpo.unet.copies import base_unet, computing_unet
from fastgrpo.unet.lora import add_lora


@pytest.mark.parametrize("lora", [True, False])
def test_a_base_model_shares_what_is_frozen_and_stays(tiny_pipeline: Path, lora: bool) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet", dtype=torch.float32).eval()
    if lora:
        add_lora(unet, ModelConfig(lora_rank=2), seed=1, frozen_dtype=torch.bfloat16)
    network = computing_unet(unet, torch.bfloat16)
    inputs = torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([500]), torch.randn(1, 8, 32).bfloat16()
    with torch.no_grad():
        before, base = network(*inputs)[0], base_unet(network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
        assert torch.equal(base(*inputs)[0], before)
        assert not torch.equal(network(*inputs)[0], before)
    own = dict(base.named_parameters())
    shared = {name for name, parameter in network.named_parameters() if own[name] is parameter}
    assert shared == {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert not any(parameter.requires_grad for parameter in own.values())
    assert (len(shared) > 0) == lora
