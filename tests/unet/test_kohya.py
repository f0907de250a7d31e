"""Adapters in kohya's layout: what diffusers' converter makes of them, and names against a list written by hand."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import fastgrpo
from fastgrpo.models.single_file import unet_places
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.unet.kohya import save_kohya
from fastgrpo.unet.lora import Adapters, adapters_of, add_lora, merged_state_dict

CONFIGS = Path(fastgrpo.__file__).parent / "models"
RANK, ALPHA = 3, 6.0

# SD 1.x and 2.x: diffusers' name of a block, `_` for `.` -> its name in the original, by which A1111 knows the layers.
ATTENTIONS = {
    "down_blocks_0_attentions_0": "input_blocks_1_1",
    "down_blocks_0_attentions_1": "input_blocks_2_1",
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_attentions_1": "input_blocks_5_1",
    "down_blocks_2_attentions_0": "input_blocks_7_1",
    "down_blocks_2_attentions_1": "input_blocks_8_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_1_attentions_0": "output_blocks_3_1",
    "up_blocks_1_attentions_1": "output_blocks_4_1",
    "up_blocks_1_attentions_2": "output_blocks_5_1",
    "up_blocks_2_attentions_0": "output_blocks_6_1",
    "up_blocks_2_attentions_1": "output_blocks_7_1",
    "up_blocks_2_attentions_2": "output_blocks_8_1",
    "up_blocks_3_attentions_0": "output_blocks_9_1",
    "up_blocks_3_attentions_1": "output_blocks_10_1",
    "up_blocks_3_attentions_2": "output_blocks_11_1",
}
RESNETS = {
    "down_blocks_0_resnets_0": "input_blocks_1_0",
    "down_blocks_0_resnets_1": "input_blocks_2_0",
    "down_blocks_1_resnets_0": "input_blocks_4_0",
    "down_blocks_1_resnets_1": "input_blocks_5_0",
    "down_blocks_2_resnets_0": "input_blocks_7_0",
    "down_blocks_2_resnets_1": "input_blocks_8_0",
    "down_blocks_3_resnets_0": "input_blocks_10_0",
    "down_blocks_3_resnets_1": "input_blocks_11_0",
    "mid_block_resnets_0": "middle_block_0",
    "mid_block_resnets_1": "middle_block_2",
    "up_blocks_0_resnets_0": "output_blocks_0_0",
    "up_blocks_0_resnets_1": "output_blocks_1_0",
    "up_blocks_0_resnets_2": "output_blocks_2_0",
    "up_blocks_1_resnets_0": "output_blocks_3_0",
    "up_blocks_1_resnets_1": "output_blocks_4_0",
    "up_blocks_1_resnets_2": "output_blocks_5_0",
    "up_blocks_2_resnets_0": "output_blocks_6_0",
    "up_blocks_2_resnets_1": "output_blocks_7_0",
    "up_blocks_2_resnets_2": "output_blocks_8_0",
    "up_blocks_3_resnets_0": "output_blocks_9_0",
    "up_blocks_3_resnets_1": "output_blocks_10_0",
    "up_blocks_3_resnets_2": "output_blocks_11_0",
}
# Where a block's input has another number of channels than its output, which on the way up is everywhere.
WITH_SHORTCUT = {"down_blocks_1_resnets_0", "down_blocks_2_resnets_0", *(name for name in RESNETS if "up" in name)}
IN_ATTENTION = [
    "proj_in",
    "proj_out",
    "transformer_blocks_0_ff_net_0_proj",
    "transformer_blocks_0_ff_net_2",
    *(f"transformer_blocks_0_attn{i}_to_{end}" for i, end in product((1, 2), ("q", "k", "v", "out_0"))),
]
IN_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
OTHERS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_downsamplers_0_conv": "input_blocks_6_0_op",
    "down_blocks_2_downsamplers_0_conv": "input_blocks_9_0_op",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_1_conv",
    "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
    "up_blocks_2_upsamplers_0_conv": "output_blocks_8_2_conv",
}


def by_hand() -> dict[str, str]:
    """Every layer of SD 1.x's UNet that adapters fit: its name in kohya's files, and in the original layout."""
    names = {f"{ours}_{layer}": f"{theirs}_{layer}" for ours, theirs in ATTENTIONS.items() for layer in IN_ATTENTION}
    for ours, theirs in RESNETS.items():
        names |= {f"{ours}_{a}": f"{theirs}_{b}" for a, b in IN_RESNET.items()}
    names |= {f"{name}_conv_shortcut": f"{RESNETS[name]}_skip_connection" for name in WITH_SHORTCUT}
    return {f"lora_unet_{ours}": theirs for ours, theirs in (names | OTHERS).items()}


def layers(unet: UNet2DConditionModel) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize(("version", "named", "marked"), [("sd1", "sd_v1", "False"), ("sd2", "sd_v2", "True")])
def test_every_layer_has_the_name_by_which_it_is_looked_up(
    version: str, named: str, marked: str, tmp_path: Path
) -> None:
    config = json.loads((CONFIGS / version / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    names = [f"{layer}.lora_{letter}.default.weight" for layer in layers(unet) for letter in "AB"]
    adapters = Adapters({name: torch.zeros(1, 1) for name in names}, 1, 1.0, ("to_q",))
    save_kohya(tmp_path / "a.safetensors", "a", adapters, unet.config, torch.float16)
    written = load_file(tmp_path / "a.safetensors")

    expected = by_hand()
    assert len(expected) == 16 * 12 + 22 * 3 + 14 + 10
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert written.keys() == {f"{layer}.{end}" for layer in expected for end in ends}
    original = {name.removesuffix(".weight"): place for name, place in unet_places(unet).items()}
    for layer in layers(unet):
        place = original[layer].removesuffix(".weight").replace(".", "_")
        assert expected["lora_unet_" + layer.replace(".", "_")] == place
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (named, marked)
    assert metadata["ss_network_module"] == "networks.lora"


@pytest.fixture(scope="module")
def adapted(tiny_pipeline: Path) -> UNet2DConditionModel:
    """With adapters of random B in every layer that has weights; alpha is not the rank."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet", torch_dtype=torch.float32)
    targets = tuple(sorted({name.split(".", 2)[-1] for name in layers(unet)}))
    add_lora(unet, ModelConfig(lora_rank=RANK, lora_alpha=ALPHA, lora_targets=targets), 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return unet


@torch.no_grad()
def outputs(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 32, generator=generator)
    return unet.to(memory_format=torch.channels_last)(latents, torch.tensor([3, 700]), embeds).sample


def by_diffusers(tiny_pipeline: Path, file: Path) -> tuple[StableDiffusionPipeline, dict[str, torch.Tensor]]:
    """The pipeline with the adapters that diffusers makes of a file, and their tensors by our names."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float32)
    pipe.load_lora_weights(file)
    (name,) = pipe.get_list_adapters()["unet"]
    return pipe, {n.replace(f".{name}.", ".default."): p for n, p in pipe.unet.named_parameters() if ".lora_" in n}


def test_diffusers_converter_gives_back_our_adapters_in_every_layer(
    adapted: UNet2DConditionModel, tiny_pipeline: Path, tmp_path: Path
) -> None:
    file, adapters = tmp_path / "a.safetensors", adapters_of(adapted)
    save_kohya(file, "mine", adapters, adapted.config, torch.float32)
    pipe, theirs = by_diffusers(tiny_pipeline, file)
    assert theirs.keys() == adapters.tensors.keys()
    assert all(torch.equal(theirs[n], tensor) for n, tensor in adapters.tensors.items())
    assert torch.equal(outputs(pipe.unet), outputs(adapted))  # and with the same scale
    plain = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet", torch_dtype=torch.float32)
    change = (outputs(pipe.unet) - outputs(plain)).abs().max()
    assert change > 0.05

    # Merged by diffusers and by us: some roundings of each weight, in each of some dozen layers.
    pipe.fuse_lora()
    plain.load_state_dict(merged_state_dict(adapted))
    torch.testing.assert_close(outputs(pipe.unet), outputs(plain), atol=1e-4, rtol=1e-4)
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_output_name"]) == ("3", "6.0", "mine")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "6.0"}
    assert "ss_base_model_version" not in said  # it is no SD 1.x
    again = tmp_path / "b.safetensors"
    save_kohya(again, "mine", adapters, adapted.config, torch.float32)
    assert again.read_bytes() == file.read_bytes()


def test_half_precision_rounds_what_is_written_once(
    adapted: UNet2DConditionModel, tiny_pipeline: Path, tmp_path: Path
) -> None:
    file, adapters = tmp_path / "a.safetensors", adapters_of(adapted)
    save_kohya(file, "mine", adapters, adapted.config, torch.float16)
    for name, tensor in by_diffusers(tiny_pipeline, file)[1].items():
        assert torch.equal(tensor, adapters.tensors[name].half().float())
    assert load_file(file)["lora_unet_conv_in.alpha"].item() == ALPHA
