"""What a pipeline is, from its configs and tensor shapes alone, and why some cannot be trained here."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from transformers.initialization import no_init_weights

from fastgrpo.models.configs import ACCEPTED, CLASSES, Description, as_in_pipelines, check_channels, check_configs
from fastgrpo.models.declared import EPSILON, V_PREDICTION, Declared, read_declared
from fastgrpo.models.other_unet import UnetTensors, find_in_file, find_in_folder, unet_file, unet_repository
from fastgrpo.models.repository import Repository
from fastgrpo.models.single_file import SUFFIXES, UNET, check_shapes, single_file_shapes
from fastgrpo.models.tensor_file import tensor_shapes
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError

SHAPES_PIPELINE = Path(__file__).parents[1] / "shapes" / "weights" / "pipeline"
"""The pipeline that ships with fastgrpo, in diffusers' layout."""

CONFIG_FILES = (*(f"{name}/config.json" for name in CLASSES), "scheduler/scheduler_config.json", "tokenizer/*")
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

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
_OTHER_FILES = {
    "conditioner.embedders.": f"SDXL: {_TWO_ENCODERS}",
    "joint_blocks.": f"SD3: {_FLOW}",
    "double_blocks.": f"Flux: {_FLOW}",
    "lora_": "a LoRA: it holds changes to a model, not a model",
    "motion_modules.": "AnimateDiff: it draws videos",
    "control_model.": "a ControlNet: it is also given a picture",
}
# How wide the text embeddings are that the first cross-attention takes tells SD 1.x from 2.x.
_WIDTH_KEY = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_BUNDLED = {768: "sd1", 1024: "sd2"}
_NAMES = {768: "SD 1.x", 1024: "SD 2.x"}
# Parts of a UNet's config that do not change what it computes.
_NOT_ARCHITECTURE = ("sample_size", "upcast_attention")


def describe(model: ModelConfig) -> Description:
    """Describe what `model` names, and check it as far as that is possible without its weights.

    Reads configs and the names and shapes of tensors; of a hub repository, it downloads the configs.
    Raises ConfigError, in one sentence with the reason, for what is no SD 1.x / 2.x text-to-image pipeline.
    """
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
        scheduler = {**description.scheduler, "prediction_type": model.prediction_type}
        description = replace(description, scheduler=scheduler)
    if model.unet:
        tensors = find_other_unet(model, description)
        if tensors and not tensors.whole:
            total = len(description.empty_components()["unet"].state_dict())
            note = f"model     {len(tensors.places)} of the UNet's {total} tensors are {model.unet}'s, "
            description = replace(description, notes=(*description.notes, f"{note}the others {model.path}'s"))
    return description


def is_single_file(path: str) -> bool:
    """Whether `path` names a single file: one that exists, or one whose name says so."""
    return Path(path).is_file() or path.endswith(SUFFIXES)


def pipeline_repository(model: ModelConfig) -> Repository:
    """Where the pipeline of a `model` that is no single file lies."""
    return Repository("model.path", str(SHAPES_PIPELINE) if model.path == "shapes" else model.path, model.revision)


def wanted_components(model: ModelConfig) -> tuple[str, ...]:
    """The components whose weights are the pipeline's: all, or all but the UNet where model.unet is a whole one."""
    partly = model.unet and unet_file(model.unet)
    return tuple(name for name in CLASSES if name != "unet" or partly or not model.unet)


def weight_files(files: Iterable[str], component: str, variant: str) -> list[str]:
    """The `files` that hold the component's weights: one safetensors file, or the numbered parts of one."""
    stem = f"{component}/{_STEMS[component]}"
    whole = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    return sorted(file for file in files if re.sub(r"-\d{5}-of-\d{5}", "", file) == whole)


def find_other_unet(model: ModelConfig, description: Description, fetch: bool = False) -> UnetTensors | None:
    """Find the tensors of model.unet, and check them against the pipeline's `description`.

    fetch: download what is on the hub; without it, None for what is there and not a folder here.
    Raises ConfigError where there are none, or they are of another architecture than the pipeline's UNet.
    """
    unet = description.empty_components()["unet"]
    if file := unet_file(model.unet):
        declared = read_declared(file, "model.unet", decided=model.prediction_type != "auto")
        pipelines = description.scheduler.get("prediction_type", EPSILON)
        _check_prediction(model, f"model.unet is {model.unet!r}", declared, pipelines, f"the pipeline {pipelines}")
        return find_in_file(file, unet)
    repository, prefix = unet_repository(model.unet)
    weights = other_unet_files(model, repository, prefix)
    if f"{prefix}config.json" in repository.files():
        config = _read_json(repository, repository.fetch([f"{prefix}config.json"]), f"{prefix}config.json")
        _check_same_architecture(model, config, unet)
    if not (fetch or Path(repository.name).is_dir()):
        return None
    return find_in_folder("model.unet", model.unet, repository.fetch(weights), weights, unet)


def other_unet_files(model: ModelConfig, repository: Repository, prefix: str) -> list[str]:
    """The files in `repository` that hold the weights of model.unet. Raises ConfigError where there are none."""
    files = [file.removeprefix(prefix) for file in repository.files() if file.startswith(prefix)]
    inside = [f"unet/{file}" for file in files]
    weights = weight_files(inside, "unet", "") or (model.variant and weight_files(inside, "unet", model.variant))
    if not weights:
        raise ConfigError(
            f"model.unet is {model.unet!r}, where there is no {prefix}{_STEMS['unet']}.safetensors; "
            "FOLDER_OR_ID:SUBFOLDER of a UNet's safetensors weights, or a file of them, is accepted."
        )
    return [prefix + file.removeprefix("unet/") for file in weights]


def _check_same_architecture(model: ModelConfig, config: Mapping[str, Any], unet: UNet2DConditionModel) -> None:
    theirs = _build_unet(f"model.unet is {model.unet!r}", config).config
    for key, value in unet.config.items():
        if not key.startswith("_") and key not in _NOT_ARCHITECTURE and theirs.get(key) != value:
            raise ConfigError(
                f"model.unet is {model.unet!r}, of another architecture than the pipeline's UNet: "
                f"{key} is {theirs.get(key)!r}, and {value!r} in the pipeline."
            )


def _check_prediction(model: ModelConfig, here: str, declared: Declared, configured: str, whose: str) -> None:
    """Refuse weights that say they predict otherwise than is configured, unless model.prediction_type decides.

    here: begins the sentence. configured: what the configs say. whose: that, in words.
    """
    if declared.prediction not in ("", configured) and model.prediction_type == "auto":
        raise ConfigError(
            f"{here}, which predicts {declared.prediction} by its {', '.join(declared.by)}, and {whose}; "
            "model.prediction_type decides."
        )


def _describe_folder(model: ModelConfig) -> Description:
    repository = pipeline_repository(model)
    folder = repository.fetch(["model_index.json", *CONFIG_FILES])
    _check_index(model.path, _read_json(repository, folder, "model_index.json"))
    description = _read_configs(repository, folder)
    files = repository.files()
    for component in wanted_components(model):
        _check_weights(model, folder, files, component)
    here = f"model.path is {model.path!r}"
    unet, weights = _build_unet(here, description.unet), weight_files(files, "unet", model.variant)
    if "unet" in wanted_components(model) and all((folder / file).is_file() for file in weights):
        find_in_folder("model.path", model.path, folder, weights, unet)
    return replace(description, scheduler=as_in_pipelines(description.scheduler))


def _describe_single_file(model: ModelConfig) -> Description:
    path = Path(model.path)
    if not path.is_file():
        raise ConfigError(f"model.path is {model.path!r}, but there is no such file.")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"model.path is {model.path!r}, a file; {' or '.join(SUFFIXES)} is accepted.")
    if model.variant:
        raise ConfigError(
            f"model.variant is {model.variant!r}, but model.path is a file; with a folder or hub id it is accepted."
        )
    shapes = single_file_shapes(path)
    _check_single_file_kind(model.path, shapes)
    declared = read_declared(path, "model.path", decided=model.prediction_type != "auto")
    if model.config:
        repository = Repository("model.config", model.config, model.revision)
        description = _read_configs(repository, repository.fetch(CONFIG_FILES))
        configured = description.scheduler.get("prediction_type", EPSILON)
        _check_prediction(model, f"model.path is {model.path!r}", declared, configured, f"{configured} by model.config")
    else:
        description = _bundled(model, shapes, declared)
    check_shapes(path, shapes, description.empty_components())
    if declared.zero_snr:
        description = _zero_snr(model, description)
    return replace(
        description, scheduler=as_in_pipelines(description.scheduler), notes=_declared_lines(model, declared)
    )


def _bundled(model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], declared: Declared) -> Description:
    """The configs of SD 1.x or 2.x, by the width of the file's cross-attention, with what the file says of itself."""
    text_width = shapes.get(_WIDTH_KEY, (0, 0))[1]
    if text_width not in _BUNDLED:
        raise ConfigError(
            f"model.path is {model.path!r}, whose text embeddings are {text_width} wide, neither SD 1.x (768) nor 2.x "
            "(1024); model.config, a diffusers folder or hub id with its configs, can describe it."
        )
    prediction = declared.prediction if model.prediction_type == "auto" else model.prediction_type
    if not prediction and (text_width == 1024 or declared.zero_snr):
        raise ConfigError(
            f"model.path is {model.path!r}, a file of {_NAMES[text_width]} that does not say what its UNet predicts; "
            "model.prediction_type (evaluate: --prediction-type) epsilon, as Stability AI's at 512 pixels, or "
            "v_prediction, as theirs at 768, is accepted."
        )
    folder = Path(__file__).parent / _BUNDLED[text_width]
    description = _read_configs(Repository("model.path", str(folder)), folder)
    # Stability AI trained SD 2.x on v at 768 x 768 pixels, on epsilon at 512 x 512.
    side = 768 if text_width == 1024 and prediction == V_PREDICTION else 512
    height, width = declared.size or (side, side)
    if height % 8 or width % 8 or not height * width:
        raise ConfigError(
            f"model.path is {model.path!r}, which says of itself that its images are {width} x {height} pixels; "
            "multiples of 8 are accepted (model.config, a diffusers folder or hub id with its configs, can describe "
            "it)."
        )
    size = height // 8 if height == width else [height // 8, width // 8]
    return replace(
        description,
        unet={**description.unet, "sample_size": size},
        scheduler={**description.scheduler, "prediction_type": prediction or EPSILON},
    )


def _zero_snr(model: ModelConfig, description: Description) -> Description:
    """With the scheduler of a model trained to begin with nothing but noise, as it then must (arXiv 2305.08891)."""
    prediction = model.prediction_type if model.prediction_type != "auto" else description.scheduler["prediction_type"]
    if prediction == EPSILON:
        raise ConfigError(
            f"model.path is {model.path!r}, which says of itself that it was trained with zero terminal SNR, where "
            "epsilon says nothing of the image; model.prediction_type v_prediction is accepted."
        )
    return replace(
        description, scheduler={**description.scheduler, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    )


def _declared_lines(model: ModelConfig, declared: Declared) -> tuple[str, ...]:
    said = [f"predicts {declared.prediction}"] if declared.prediction else []
    if declared.size and not model.config:
        said.append(f"{declared.size[1]} x {declared.size[0]} pixels")
    said += ["zero terminal SNR"] if declared.zero_snr else []
    return (f"model     {model.path} says: {', '.join(said)} ({', '.join(declared.by)})",) if said else ()


def _read_configs(repository: Repository, folder: Path) -> Description:
    description = Description(
        unet=_read_json(repository, folder, "unet/config.json"),
        vae=_read_json(repository, folder, "vae/config.json"),
        text_encoder=_read_json(repository, folder, "text_encoder/config.json"),
        scheduler=_read_json(repository, folder, "scheduler/scheduler_config.json"),
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").is_dir() else None,
    )
    check_configs(f"{repository.field} is {repository.name!r}", description)
    return description


def _read_json(repository: Repository, folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise ConfigError(f"{repository.field} is {repository.name!r}, where there is no {name}; {ACCEPTED}.")
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
        raise ConfigError(f"model.path is {path!r}, a {kind}: {reason}; {ACCEPTED}.")
    for component, accepted in CLASSES.items():
        found = (index.get(component) or [None, None])[1]
        if found != accepted:
            what = f"whose {component} is a {found}" if found else f"which has no {component}"
            raise ConfigError(f"model.path is {path!r}, {what}; {accepted} is accepted.")


def _check_single_file_kind(path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for part, why in _OTHER_FILES.items():
        if any(part in key for key in shapes):
            raise ConfigError(f"model.path is {path!r}, a file of {why}; {ACCEPTED}.")
    first = shapes.get(UNET + "input_blocks.0.0.weight")
    if first is None:
        raise ConfigError(
            f"model.path is {path!r}, a file without {UNET}input_blocks.0.0.weight, which all single files of "
            "SD 1.x / 2.x have; for other layouts, give the pipeline's diffusers folder."
        )
    check_channels(f"model.path is {path!r}", first[1])


def _check_weights(model: ModelConfig, folder: Path, files: frozenset[str], component: str) -> None:
    weights = weight_files(files, component, model.variant)
    if not weights:
        if model.variant and weight_files(files, component, ""):
            raise ConfigError(
                f"model.variant is {model.variant!r}, which {model.path!r} does not have of its {component}; "
                "empty takes the plain weights."
            )
        named = re.compile(rf"{component}/{_STEMS[component]}\.(\w+)(-\d{{5}}-of-\d{{5}})?\.safetensors")
        if variant := min((found[1] for file in files if (found := named.fullmatch(file))), default=""):
            raise ConfigError(
                f"model.path is {model.path!r}, which has only the variant {variant} of its {component}; model.variant "
                f"{variant} is accepted."
            )
        if any(file.startswith(f"{component}/") and file.endswith(".bin") for file in files):
            raise ConfigError(
                f"model.path is {model.path!r}, whose {component} has its weights as .bin, which would have to be "
                "executed to be read; the same as .safetensors is accepted."
            )
        raise ConfigError(f"model.path is {model.path!r}, where the weights of {component} (.safetensors) are missing.")
    for file in weights:
        if (folder / file).is_file():  # those of a hub repository may not have been downloaded yet
            tensor_shapes(folder / file, "model.path")


def _build_unet(here: str, config: Mapping[str, Any]) -> UNet2DConditionModel:
    """On the meta device, to be read only. here: begins the ConfigError for a config that describes none."""
    try:
        return _empty_unet(json.dumps(dict(config)))
    except Exception as error:  # diffusers raises everything over numbers that do not fit together
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{here}, whose unet/config.json describes no UNet2DConditionModel: {reason}.") from error


@lru_cache(maxsize=4)  # a training describes its model several times
def _empty_unet(config: str) -> UNet2DConditionModel:
    with init_empty_weights(), no_init_weights():
        return UNet2DConditionModel.from_config(json.loads(config))
