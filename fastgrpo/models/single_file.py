"""The original layout of SD 1.x / 2.x: one file with UNet, VAE and text encoder, as Stability AI publishes it.

diffusers numbers blocks by level and layer, the original numbers all of them in a row: level l, layer j of the UNet's
way down is `input_blocks.(1 + l * (layers + 1) + j)`, its downsampler the one after its layers. `places` derives from
the configs where every diffusers tensor lies, so that it serves pipelines of any width and depth, and both reading and
writing. Three things differ in more than their name: the VAE's attention projections are 1x1 convolutions
[C, C, 1, 1]; SD 2.x's text encoder (OpenCLIP) has query, key and value in one matrix [3E, E]; and its file has a last
layer that diffusers leaves out, since the UNet is given what the last but one returns.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from fastgrpo.models.save import save_tensors
from fastgrpo.models.tensor_file import read_tensors, tensor_shapes
from fastgrpo.system.errors import ConfigError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
SUFFIXES = (".safetensors", ".ckpt")

_TEXT = "cond_stage_model."
_PROJECTION = re.compile(r"\.mid_block\.attentions\.0\.to_.*\.weight$")  # of the VAE's attention
# In the name of a tensor that a plain UNet or text encoder does not have -> whose it is; in either layout.
_EXTRAS = {
    "label_emb.": "a model that is also given a class or an image, such as SD 2.1 unCLIP",
    "class_embedding.": "a model that is also given a class or an image, such as SD 2.1 unCLIP",
    "cond_proj.": "a consistency model (LCM), which is also given the guidance scale",
    **dict.fromkeys(("position_net.", ".fuser."), "GLIGEN, which is also given boxes"),
    **dict.fromkeys(("motion_modules.", "temporal_transformer."), "AnimateDiff, which draws videos"),
    "time_stack.": "a model that draws videos",
    "add_embedding.": "a model that is given more than time and text, such as SDXL",
    **dict.fromkeys(("encoder_hid_proj.", "_ip."), "an IP-Adapter, which is also given an image"),
    "lora": "adapters (LoRA)",
}
_CLIP_UNUSED = "position_ids|logit_scale|text_projection|attn_mask|vision_model|visual"

_UNET_NAMES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_UNET_BLOCK = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_RESNET_NAMES = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_NAMES = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\b", r"\1"),
    (r"to_out\.0", "proj_out"),
)
_OPEN_CLIP_NAMES = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


@dataclass(frozen=True)
class Place:
    """Where the original layout keeps one diffusers tensor.

    key: its name there. third: which third of the rows is it, 0 query, 1 key, 2 value, or None where it is all of them.
    pointwise: a matrix [C, C] here, a 1x1 convolution [C, C, 1, 1] there.
    """

    key: str
    third: int | None = None
    pointwise: bool = False


def places(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> dict[str, dict[str, Place]]:
    """Component (`unet`, `vae`, `text_encoder`) -> name in its state_dict -> where the original layout keeps it.

    Reads only the components' configs and tensor names: they may be on the meta device.
    """
    levels = len(vae.config["block_out_channels"])
    return {
        "unet": {name: Place(UNET + original) for name, original in unet_places(unet).items()},
        "vae": {
            name: Place(VAE + _vae_name(name, levels), pointwise=bool(_PROJECTION.search(name)))
            for name in vae.state_dict()
        },
        "text_encoder": {name: _text_place(name, text_encoder) for name in text_encoder.state_dict()},
    }


def unet_places(unet: UNet2DConditionModel) -> dict[str, str]:
    """Name in the UNet's state_dict -> the original name, without `UNET` before it. It may be on the meta device."""
    return {name: _unet_name(name, unet.config) for name in unet.state_dict()}


def single_file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name, as newer files have it, -> shape of every tensor in a file. Raises ConfigError as `tensor_shapes`."""
    return {_modern(name): shape for name, shape in tensor_shapes(path, "model.path").items()}


def check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], components: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError for the first tensor that the components need and the file lacks or has in another shape.

    And for the first that they leave over: it belongs to a model that does more than theirs.
    shapes: as `single_file_shapes`. components: `unet`, `vae` and `text_encoder`, which may be on the meta device.
    """
    wanted = places(**components)
    for component, names in wanted.items():
        state = components[component].state_dict()
        needed = {place.key: _original_shape(state[name].shape, place) for name, place in names.items()}
        if not any(key in shapes for key in needed):
            prefix = {"unet": UNET, "vae": VAE, "text_encoder": _TEXT}[component]
            raise ConfigError(
                f"model.path is {str(path)!r}, a file without the {component} ({prefix}*) that its config describes; "
                "one with UNet, VAE and text encoder is accepted."
            )
        for key, accepted in needed.items():
            if shapes.get(key) not in accepted:
                found = f"has shape {list(shapes[key])}" if key in shapes else "is missing"
                raise ConfigError(
                    f"model.path is {str(path)!r}, where {key} {found}; its config needs {list(accepted[0])} "
                    "(model.config names another)."
                )
    used = {place.key for names in wanted.values() for place in names.values()}
    unused = _unused(components["text_encoder"])
    for key in shapes:
        if key not in used and key.startswith((UNET, VAE, _TEXT)) and not unused.match(key):
            raise ConfigError(f"model.path is {str(path)!r}, where {left_over(key)}.")


def left_over(key: str) -> str:
    """Words for a tensor that a model has no use for, and whose it is."""
    kind = next((f", of {whose}," for part, whose in _EXTRAS.items() if part in key), "")
    return f"{key}{kind} is more than a plain SD 1.x / 2.x has; one with nothing besides is accepted"


def read_single_file(
    path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> dict[str, dict[str, Tensor]]:
    """Component (`unet`, `vae`, `text_encoder`) -> the state_dict that the file holds for it, in the file's precision.

    The modules say what to look for; they may be on the meta device and are not changed. Of a file with two sets of
    UNet weights, the plain ones and an average (`model_ema.`), the plain ones are read.
    Raises ConfigError as `check_shapes`.
    """
    components = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    shapes = tensor_shapes(path, "model.path")
    check_shapes(path, {_modern(key): shape for key, shape in shapes.items()}, components)
    wanted = places(**components)
    needed = {place.key for names in wanted.values() for place in names.values()}
    read = read_tensors(path, "model.path", [key for key in shapes if _modern(key) in needed])
    tensors = {_modern(key): tensor for key, tensor in read.items()}
    states = {}
    for component, names in wanted.items():
        state = components[component].state_dict()
        states[component] = {
            name: _take(tensors[place.key], place).reshape(state[name].shape) for name, place in names.items()
        }
    return states


def write_single_file(
    path: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    dtype: torch.dtype,
    scheduler_config: Mapping[str, Any] | None = None,
) -> None:
    """Write the components as one .safetensors file in the original layout, all tensors in `dtype`.

    scheduler_config: what it says of the prediction and of a zero terminal SNR, the file says too, in the metadata of
        Stability AI's model spec and by the names `v_pred` and `ztsnr`, which other programs look for.
    The text encoder is written as SD 1.x has it where it has quick_gelu, as OpenCLIP (SD 2.x) where it has gelu; there,
    the last layer and the projection, which no pipeline uses and diffusers does not keep, are left out.
    """
    components = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for component, names in places(**components).items():
        state = components[component].state_dict()
        for name, place in names.items():
            tensor = state[name].detach().to("cpu", dtype).contiguous()
            if place.third is not None:
                thirds.setdefault(place.key, {})[place.third] = tensor
            else:
                tensors[place.key] = tensor[..., None, None] if place.pointwise else tensor
    tensors |= {key: torch.cat([parts[third] for third in range(3)]) for key, parts in thirds.items()}
    if not _is_open_clip(text_encoder):
        # A constant, but what other programs recognise SD 1.x by.
        tensors[CLIP + "embeddings.position_ids"] = torch.arange(text_encoder.config.max_position_embeddings)[None]
    metadata, scheduler = {"format": "pt"}, scheduler_config or {}
    if prediction := scheduler.get("prediction_type"):
        metadata["modelspec.prediction_type"] = {"v_prediction": "v"}.get(prediction, prediction)
    for key, holds in (("v_pred", prediction == "v_prediction"), ("ztsnr", scheduler.get("rescale_betas_zero_snr"))):
        tensors |= {key: torch.zeros(0)} if holds else {}
    save_tensors(path, tensors, metadata)


def _unet_name(name: str, config: Mapping[str, Any]) -> str:
    found = _UNET_BLOCK.fullmatch(name)
    if not found:
        return _renamed(name, _UNET_NAMES)
    way, level, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    layers = config["layers_per_block"]
    counts = [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)
    slot = int(kind == "attentions")  # in its block
    if way == "mid":
        block = f"middle_block.{slot or 2 * number}"
    elif way == "down":
        place = counts[level] if kind == "downsamplers" else number
        block = f"input_blocks.{1 + sum(counts[:level]) + level + place}.{slot}"
    else:
        counts = [count + 1 for count in reversed(counts)]
        place = number
        if kind == "upsamplers":  # the last of the level's last block
            place, slot = counts[level] - 1, 2 if "Attn" in config["up_block_types"][level] else 1
        block = f"output_blocks.{sum(counts[:level]) + place}.{slot}"
    if kind == "resnets":
        return f"{block}.{_renamed(rest, _RESNET_NAMES)}"
    return f"{block}.{rest.replace('conv', 'op', 1) if kind == 'downsamplers' else rest}"


def _vae_name(name: str, levels: int) -> str:
    original = re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)
    for ours, theirs in _VAE_NAMES:
        original = re.sub(ours, theirs, original)
    return _renamed(name, {}) if "_block" in original else original


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Replace the beginning of `name` that is in `names`. Raises ConfigError where none is."""
    for ours, theirs in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ConfigError(f"model.path: the original single-file layout of SD 1.x / 2.x has no place for {name}.")


def _is_open_clip(text_encoder: CLIPTextModel) -> bool:
    return text_encoder.config.hidden_act == "gelu"


def _text_place(name: str, text_encoder: CLIPTextModel) -> Place:
    if not _is_open_clip(text_encoder):
        return Place(CLIP + name)
    whole = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    if name in whole:
        return Place(OPEN_CLIP + whole[name])
    number, _, rest = name.removeprefix("encoder.layers.").partition(".")
    layer = f"{OPEN_CLIP}transformer.resblocks.{number}."
    for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if rest.startswith(f"self_attn.{projection}."):
            return Place(f"{layer}attn.in_proj_{rest.rpartition('.')[2]}", third=third)
    return Place(layer + _renamed(rest, _OPEN_CLIP_NAMES))


def _original_shape(shape: Iterable[int], place: Place) -> list[tuple[int, ...]]:
    """The shapes the original may have, the usual one first: some programs write the VAE's projections as matrices."""
    shape = tuple(shape)
    if place.third is not None:
        return [(3 * shape[0], *shape[1:])]
    return [(*shape, 1, 1), shape] if place.pointwise else [shape]


def _take(tensor: Tensor, place: Place) -> Tensor:
    # A copy, so that no two parameters share memory.
    return tensor if place.third is None else tensor.chunk(3)[place.third].clone()


def _modern(key: str) -> str:
    """Some files leave `text_model.` out of SD 1.x's text encoder; the name as it is with it."""
    outer = CLIP.removesuffix("text_model.")
    return key.replace(outer, CLIP) if key.startswith(outer) and not key.startswith(CLIP) else key


def _unused(text_encoder: CLIPTextModel) -> re.Pattern[str]:
    """The tensors of a published file that no pipeline uses: what CLIP's loss needs, and OpenCLIP's last layer."""
    clip = rf"cond_stage_model\.(transformer|model)\..*({_CLIP_UNUSED})"
    last = rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.{text_encoder.config.num_hidden_layers}\."
    return re.compile(rf"{clip}|{last}|{re.escape(VAE)}(loss|model_ema)\.")
