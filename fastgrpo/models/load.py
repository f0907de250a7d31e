"""Loading a pipeline's components from a diffusers folder, the Hugging Face hub or a single file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fastgrpo.config import ConfigError, ModelConfig
from fastgrpo.models.check import (
    CONFIG_FILES,
    Description,
    check_other_unet_shapes,
    describe,
    is_single_file,
    other_unet_files,
    pipeline_repository,
    unet_repository,
    weight_files,
)
from fastgrpo.models.single_file import read_single_file
from fastgrpo.models.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Components:
    """What a text-to-image Stable Diffusion is made of, on the CPU.

    unet: float32. vae, text_encoder: in the precision asked for. tokenizer: the text encoder's.
    scheduler_config: its scheduler_config.json, with the prediction type of model.prediction_type.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]


def load_components(model: ModelConfig, dtype: torch.dtype) -> Components:
    """Load what `model` names, from safetensors or plain torch files; no code of a model is run.

    dtype: of the VAE and the text encoder.
    model.revision is for model.path, and for model.config where the path is a single file; model.unet is taken from its
    repository's main branch, in model.variant where there are no plain weights.
    Raises ConfigError as `check_model` does, and for weights that lack a tensor.
    """
    description = describe(model)
    tokenizer = _tokenizer(model, description)
    modules = _read_single_file(model, description, dtype) if is_single_file(model.path) else _read_folder(model, dtype)
    if model.unet:
        modules["unet"] = _read_other_unet(model, description)
    return Components(**modules, tokenizer=tokenizer, scheduler_config=description.scheduler)


def _read_single_file(model: ModelConfig, description: Description, dtype: torch.dtype) -> dict[str, nn.Module]:
    modules = description.empty_components()
    for name, state in read_single_file(Path(model.path), **modules).items():
        _fill(modules[name], state, torch.float32 if name == "unet" else dtype)
    return modules


def _read_folder(model: ModelConfig, dtype: torch.dtype) -> dict[str, nn.Module]:
    """`vae`, `text_encoder` and, unless it comes from elsewhere, `unet`."""
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    if model.unet:
        del classes["unet"]
    repository = pipeline_repository(model)
    files = repository.files()
    weights = [file for component in classes for file in weight_files(files, component, model.variant)]
    folder = repository.fetch([*CONFIG_FILES, *weights, "*.safetensors.index*.json"])
    modules = {}
    for component, kind in classes.items():
        try:
            modules[component], info = kind.from_pretrained(
                folder,
                subfolder=component,
                variant=model.variant or None,
                use_safetensors=True,
                dtype=torch.float32 if component == "unet" else dtype,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"model.path is {model.path!r}, whose {component} cannot be loaded: {_first_sentence(error)}."
            ) from error
        # They would be random, with no more than a warning.
        if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ConfigError(
                f"model.path is {model.path!r}, whose {component} weights lack {lacking[0]} in the shape of its config."
            )
    return modules


def _read_other_unet(model: ModelConfig, description: Description) -> UNet2DConditionModel:
    """The UNet of model.unet, whose weights need not come with a config: the pipeline's is its own."""
    repository, prefix = unet_repository(model.unet)
    weights = other_unet_files(model, repository, prefix)
    folder = repository.fetch(weights)
    unet = description.empty_components()["unet"]
    files = [folder / name for name in weights]
    check_other_unet_shapes(model, files, unet)
    state = {key: tensor for file in files for key, tensor in load_file(file).items()}
    return _fill(unet, state, torch.float32)


def _fill(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device its tensors."""
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return module.eval()


def _tokenizer(model: ModelConfig, description: Description) -> CLIPTokenizer:
    """The pipeline's own, or CLIP's, padded as for SD 1.x or, where the text encoder has OpenCLIP's gelu, 2.x."""
    if description.tokenizer is not None:
        try:
            return CLIPTokenizer.from_pretrained(description.tokenizer)
        except Exception as error:  # a file that is missing or broken fails in every way
            raise ConfigError(
                f"{'model.config' if model.config else 'model.path'} is {(model.config or model.path)!r}, whose tokenizer "
                f"cannot be loaded: {_first_sentence(error)}."
            ) from error
    return build_tokenizer("!" if description.text_encoder.get("hidden_act") == "gelu" else "<|endoftext|>")


def _first_sentence(error: Exception) -> str:
    """The others are advice for those who write programs."""
    return " ".join(str(error).split()).split(". ")[0][:300].rstrip(".")
