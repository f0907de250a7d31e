"""What a pipeline is, from its configs and tensor shapes alone, and why some cannot be trained here."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.initialization import no_init_weights

from fastgrpo.config import ConfigError, ModelConfig
from fastgrpo.models.repository import Repository
from fastgrpo.models.single_file import SUFFIXES, UNET, check_shapes, safetensors_shapes, tensor_shapes

SHAPES_PIPELINE = Path(__file__).parents[1] / "shapes" / "weights" / "pipeline"
"""The pipeline that ships with fastgrpo, in diffusers' layout."""

CONFIG_FILES = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*",
)
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_ACCEPTED = "an SD 1.x / 2.x text-to-image StableDiffusionPipeline is accepted"

_TWO_ENCODERS = "it has two text encoders and added time conditions"
_FLOW = "it is a transformer trained with flow matching"
# What in a pipeline's class name tells why it is not for us; the first that fits.
_OTHER_PIPELINES = {
    "XL": _TWO_ENCODERS,
    "StableDiffusion3": _FLOW,
    "Flux": _FLOW,
    "Inpaint": "its UNet also takes a mask and the masked image",
    "Depth2Img": "its UNet also takes a depth map",
    "Upscale": "its UNet also takes the image to enlarge",
    "InstructPix2Pix": "its UNet also takes the image to edit",
}
_OTHER_CHANNELS = {
    5: "one that also takes a depth map",
    7: "an upscaler's, which also takes the image to enlarge",
    8: "InstructPix2Pix's, which also takes the image to edit",
    9: "an inpainting one, which also takes a mask and the masked image",
}
_OTHER_FILES = {
    "conditioner.embedders.": f"SDXL: {_TWO_ENCODERS}",
    "joint_blocks.": f"SD3: {_FLOW}",
    "double_blocks.": f"Flux: {_FLOW}",
    "lora_": "a LoRA: it holds changes to a model, not a model",
}
# Conditions of a UNet that nothing here would give it.
_CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
# How wide the text embeddings are that the first cross-attention takes tells SD 1.x from 2.x.
_WIDTH_KEY = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_BUNDLED = {768: "sd1", 1024: "sd2"}
# Parts of a UNet's config that do not change what it computes.
_NOT_ARCHITECTURE = ("sample_size", "upcast_attention")


@dataclass(frozen=True)
class Description:
    """A pipeline without its weights.

    unet, vae, text_encoder, scheduler: the components' config files. tokenizer: the folder of its files, or None where
    CLIP's own is meant.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: Path | None

    def empty_components(self) -> dict[str, nn.Module]:
        """`unet`, `vae` and `text_encoder` on the meta device: names and shapes, no memory."""
        # On meta too, drawing random weights takes longer than all the rest.
        with init_empty_weights(), no_init_weights():
            return {
                "unet": UNet2DConditionModel.from_config(dict(self.unet)),
                "vae": AutoencoderKL.from_config(dict(self.vae)),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(self.text_encoder))),
            }


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError, in one sentence with the reason, for what is no SD 1.x / 2.x text-to-image pipeline.

    Reads configs and the names and shapes of tensors; of a hub repository, it downloads its configs.
    """
    describe(model)


def describe(model: ModelConfig) -> Description:
    """What `model` names, checked as far as that is possible without its weights. Raises ConfigError."""
    if is_single_file(model.path):
        description = _describe_single_file(model)
    elif model.config:
        raise ConfigError(
            f"model.config is {model.config!r}, but model.path is {model.path!r}, which has configs of its own; "
            "with a .safetensors or .ckpt file it is accepted."
        )
    else:
        description = _describe_folder(model)
    if model.prediction_type != "auto":
        description = replace(
            description, scheduler={**description.scheduler, "prediction_type": model.prediction_type}
        )
    if model.unet:
        _check_other_unet(model, description)
    return description


def is_single_file(path: str) -> bool:
    """Whether `path` names a single file: one that exists, or one whose name says so."""
    return Path(path).is_file() or path.endswith(SUFFIXES)


def pipeline_repository(model: ModelConfig) -> Repository:
    """Where the pipeline of a `model` that is no single file lies."""
    return Repository("model.path", str(SHAPES_PIPELINE) if model.path == "shapes" else model.path, model.revision)


def unet_repository(spec: str) -> tuple[Repository, str]:
    """`FOLDER_OR_ID[:SUBFOLDER]` -> where it lies, and the subfolder as the beginning of its files' names."""
    if Path(spec).is_dir():
        return Repository("model.unet", spec), ""
    name, _, subfolder = spec.partition(":")
    subfolder = subfolder.strip("/")
    return Repository("model.unet", name), subfolder + "/" if subfolder else ""


def weight_files(files: Iterable[str], component: str, variant: str) -> list[str]:
    """Those of `files` that hold the component's weights: one safetensors file, or the numbered parts of one."""
    stem = f"{component}/{_STEMS[component]}"
    whole = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    return sorted(file for file in files if re.sub(r"-\d{5}-of-\d{5}", "", file) == whole)


def other_unet_files(model: ModelConfig, repository: Repository, prefix: str) -> list[str]:
    """The files in `repository` that hold the weights of model.unet. Raises ConfigError where there are none."""
    files = [file.removeprefix(prefix) for file in repository.files() if file.startswith(prefix)]
    inside = [f"unet/{file}" for file in files]
    weights = weight_files(inside, "unet", "") or (model.variant and weight_files(inside, "unet", model.variant))
    if not weights:
        raise ConfigError(
            f"model.unet is {model.unet!r}, where there is no {prefix}{_STEMS['unet']}.safetensors; "
            "FOLDER_OR_ID:SUBFOLDER of a UNet's safetensors weights is accepted."
        )
    return [prefix + file.removeprefix("unet/") for file in weights]


def check_other_unet_shapes(model: ModelConfig, files: Iterable[Path], unet: nn.Module) -> None:
    """Raise ConfigError for the first tensor in which the weights of model.unet differ from `unet` in name or shape."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= safetensors_shapes(file, "model.unet")
    needed = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    for key in [*needed, *found]:
        if found.get(key) != needed.get(key):
            raise ConfigError(
                f"model.unet is {model.unet!r}, of another architecture than the pipeline's UNet: "
                f"{key} is {_shown(found.get(key))}, and {_shown(needed.get(key))} in the pipeline."
            )


def _describe_folder(model: ModelConfig) -> Description:
    repository = pipeline_repository(model)
    folder = repository.fetch(["model_index.json", *CONFIG_FILES])
    index = _read_json(repository, folder, "model_index.json")
    _check_index(model.path, index)
    description = _read_configs(repository, folder)
    files = repository.files()
    for component in ("vae", "text_encoder") if model.unet else _CLASSES:
        _check_weights(model, folder, files, component)
    return description


def _describe_single_file(model: ModelConfig) -> Description:
    path = Path(model.path)
    if not path.is_file():
        raise ConfigError(f"model.path is {model.path!r}, but there is no such file.")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"model.path is {model.path!r}, a file; {' or '.join(SUFFIXES)} is accepted.")
    if path.stat().st_size == 0:
        raise ConfigError(f"model.path is {model.path!r}, an empty file; download it again.")
    shapes = tensor_shapes(path)
    _check_single_file_kind(model.path, shapes)
    if model.config:
        repository = Repository("model.config", model.config, model.revision)
        description = _read_configs(repository, repository.fetch(CONFIG_FILES))
    else:
        description = _bundled(model, shapes)
    check_shapes(path, shapes, description.empty_components())
    return description


def _bundled(model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Description:
    """The configs of SD 1.x or 2.x, whichever the file's cross-attention is as wide as."""
    width = shapes.get(_WIDTH_KEY, (0, 0))[1]
    if width not in _BUNDLED:
        raise ConfigError(
            f"model.path is {model.path!r}, whose text embeddings are {width} wide, neither SD 1.x (768) nor 2.x "
            "(1024); model.config, a diffusers folder or hub id with its configs, can describe it."
        )
    folder = Path(__file__).parent / _BUNDLED[width]
    description = _read_configs(Repository("model.path", str(folder)), folder)
    if width == 1024 and model.prediction_type == "v_prediction":
        # Stability AI trained SD 2.x on v at 768 x 768 pixels, on epsilon at 512 x 512.
        description = replace(description, unet={**description.unet, "sample_size": 96})
    return description


def _read_configs(repository: Repository, folder: Path) -> Description:
    description = Description(
        unet=_read_json(repository, folder, "unet/config.json"),
        vae=_read_json(repository, folder, "vae/config.json"),
        text_encoder=_read_json(repository, folder, "text_encoder/config.json"),
        scheduler=_read_json(repository, folder, "scheduler/scheduler_config.json"),
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").is_dir() else None,
    )
    _check_configs(repository, description)
    return description


def _read_json(repository: Repository, folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise ConfigError(f"{repository.field} is {repository.name!r}, where there is no {name}; {_ACCEPTED}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{repository.field} is {repository.name!r}, whose {name} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{repository.field} is {repository.name!r}, whose {name} is not a JSON object.")
    return content


def _check_index(path: str, index: Mapping[str, Any]) -> None:
    kind = str(index.get("_class_name"))
    if kind != "StableDiffusionPipeline":
        reason = next((why for part, why in _OTHER_PIPELINES.items() if part in kind), "it is of another kind")
        raise ConfigError(f"model.path is {path!r}, a {kind}: {reason}; {_ACCEPTED}.")
    for component, accepted in _CLASSES.items():
        found = (index.get(component) or [None, None])[1]
        if found != accepted:
            what = f"whose {component} is a {found}" if found else f"which has no {component}"
            raise ConfigError(f"model.path is {path!r}, {what}; {accepted} is accepted.")


def _check_configs(repository: Repository, description: Description) -> None:
    here = f"{repository.field} is {repository.name!r}"
    unet, text_encoder = description.unet, description.text_encoder
    _check_channels(here, unet.get("in_channels", 4))
    for condition in _CONDITIONS:
        if unet.get(condition) is not None:
            raise ConfigError(
                f"{here}, whose UNet has {condition} = {unet[condition]!r}, a condition besides time and text; {_ACCEPTED}."
            )
    kinds = text_encoder.get("architectures") or ["CLIPTextModel"]
    if kinds != ["CLIPTextModel"]:
        raise ConfigError(f"{here}, whose text encoder is a {kinds[0]}; CLIPTextModel is accepted.")
    if unet.get("cross_attention_dim") != text_encoder.get("hidden_size"):
        raise ConfigError(
            f"{here}, whose UNet takes text embeddings {unet.get('cross_attention_dim')} wide and whose text encoder "
            f"makes them {text_encoder.get('hidden_size')} wide; the same width is accepted."
        )


def _check_channels(here: str, channels: int) -> None:
    if channels != 4:
        kind = _OTHER_CHANNELS.get(channels, "one that takes more than latents")
        raise ConfigError(f"{here}, whose UNet is {kind} ({channels} channels); a text-to-image UNet takes 4.")


def _check_single_file_kind(path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for part, why in _OTHER_FILES.items():
        if any(part in key for key in shapes):
            raise ConfigError(f"model.path is {path!r}, a file of {why}; {_ACCEPTED}.")
    first = shapes.get(UNET + "input_blocks.0.0.weight")
    if first is None:
        raise ConfigError(
            f"model.path is {path!r}, a file without {UNET}input_blocks.0.0.weight, which all single files of "
            "SD 1.x / 2.x have; for other layouts, give the pipeline's diffusers folder."
        )
    _check_channels(f"model.path is {path!r}", first[1])


def _check_weights(model: ModelConfig, folder: Path, files: frozenset[str], component: str) -> None:
    weights = weight_files(files, component, model.variant)
    if not weights:
        if model.variant and weight_files(files, component, ""):
            raise ConfigError(
                f"model.variant is {model.variant!r}, which {model.path!r} does not have of its {component}; "
                "empty takes the plain weights."
            )
        if any(file.startswith(f"{component}/") and file.endswith(".bin") for file in files):
            raise ConfigError(
                f"model.path is {model.path!r}, whose {component} has its weights as .bin, which would have to be "
                "executed to be read; the same as .safetensors is accepted."
            )
        raise ConfigError(f"model.path is {model.path!r}, where the weights of {component} (.safetensors) are missing.")
    for file in weights:
        if (folder / file).is_file():  # those of a hub repository may not have been downloaded yet
            safetensors_shapes(folder / file, "model.path")


def _check_other_unet(model: ModelConfig, description: Description) -> None:
    repository, prefix = unet_repository(model.unet)
    weights = other_unet_files(model, repository, prefix)
    unet = description.empty_components()["unet"]
    if f"{prefix}config.json" in repository.files():
        config = _read_json(repository, repository.fetch([f"{prefix}config.json"]), f"{prefix}config.json")
        with init_empty_weights(), no_init_weights():
            theirs = UNet2DConditionModel.from_config(config).config
        for key, value in unet.config.items():
            if not key.startswith("_") and key not in _NOT_ARCHITECTURE and theirs.get(key) != value:
                raise ConfigError(
                    f"model.unet is {model.unet!r}, of another architecture than the pipeline's UNet: "
                    f"{key} is {theirs.get(key)!r}, and {value!r} in the pipeline."
                )
    if Path(repository.name).is_dir():
        check_other_unet_shapes(model, [Path(repository.name) / file for file in weights], unet)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
