"""Loading a pipeline's components from a diffusers folder, the Hugging Face hub or a single file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastgrpo.models.check import (
    CONFIG_FILES,
    describe,
    find_other_unet,
    is_single_file,
    pipeline_repository,
    wanted_components,
    weight_files,
)
from fastgrpo.models.configs import Components, Description
from fastgrpo.models.single_file import left_over, read_single_file
from fastgrpo.models.sound import check_finite
from fastgrpo.models.tokenizer import build_tokenizer
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError, first_sentence

# How names of tensors end that a text encoder's file may hold besides: a constant, and what only CLIP's loss needs.
_UNUSED = ("position_ids", "text_projection.weight", "logit_scale")


def load_components(model: ModelConfig, dtype: torch.dtype) -> Components:
    """Load what `model` names, from safetensors or plain torch files; no code of a model is run.

    dtype: of the VAE and the text encoder.
    model.revision is for model.path, and for model.config where the path is a single file; model.unet is taken from its
    repository's main branch, in model.variant where there are no plain weights.
    Raises ConfigError as `describe` does, and for weights that lack a tensor.
    """
    description = describe(model)
    tokenizer = _tokenizer(model, description)
    modules: dict[str, nn.Module]
    if is_single_file(model.path):
        modules = description.empty_components()
        for name, state in read_single_file(Path(model.path), **modules).items():
            _fill(modules[name], state, torch.float32 if name == "unet" else dtype)
    else:
        modules = _read_folder(model, dtype)
    if model.unet:
        _read_other_unet(model, description, modules)
    for component, module in modules.items():
        field, name = ("model.unet", model.unet) if component == "unet" and model.unet else ("model.path", model.path)
        check_finite(module, f"{field} is {name!r}, whose {component}")
    return Components(**modules, tokenizer=tokenizer, scheduler_config=description.scheduler)


def _read_folder(model: ModelConfig, dtype: torch.dtype) -> dict[str, nn.Module]:
    """`vae`, `text_encoder` and, unless all of it comes from elsewhere, `unet`."""
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    components = wanted_components(model)
    repository = pipeline_repository(model)
    files = repository.files()
    weights = [file for component in components for file in weight_files(files, component, model.variant)]
    folder = repository.fetch([*CONFIG_FILES, *weights, "*.safetensors.index*.json"])
    modules = {}
    for component in components:
        try:
            modules[component], info = classes[component].from_pretrained(
                folder,
                subfolder=component,
                variant=model.variant or None,
                use_safetensors=True,
                dtype=torch.float32 if component == "unet" else dtype,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"model.path is {model.path!r}, whose {component} cannot be loaded: {first_sentence(error)}."
            ) from error
        # They would be random, with no more than a warning.
        if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ConfigError(
                f"model.path is {model.path!r}, whose {component} weights lack {lacking[0]} in the shape of its config."
            )
        if unused := [key for key in info["unexpected_keys"] if not key.endswith(_UNUSED)]:
            raise ConfigError(f"model.path is {model.path!r}, in whose {component} {left_over(unused[0])}.")
    return modules


def _read_other_unet(model: ModelConfig, description: Description, modules: dict[str, nn.Module]) -> None:
    """Put the UNet of model.unet in the place of the pipeline's, or the tensors that it has over the pipeline's."""
    tensors = find_other_unet(model, description, fetch=True)
    assert tensors is not None  # they are fetched
    state = tensors.read("model.unet")
    if tensors.whole:
        modules["unet"] = _fill(description.empty_components()["unet"], state, torch.float32)
    else:
        modules["unet"].load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)


def _fill(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device its tensors."""
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return module.eval()


def _tokenizer(model: ModelConfig, description: Description) -> CLIPTokenizer:
    """The pipeline's own, or CLIP's, padded as for SD 1.x or, where the text encoder has OpenCLIP's gelu, 2.x.

    Texts are as long as the tokenizer and the text encoder both take. Raises ConfigError for a tokenizer that cannot be
    loaded, or with a token for which the text encoder has no embedding.
    """
    encoder = CLIPTextConfig.from_dict(dict(description.text_encoder))
    here = f"{'model.config' if model.config else 'model.path'} is {(model.config or model.path)!r}"
    if description.tokenizer is None:
        tokenizer = build_tokenizer("!" if encoder.hidden_act == "gelu" else "<|endoftext|>")
    else:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(description.tokenizer)
        except Exception as error:  # a file that is missing or broken fails in every way
            raise ConfigError(f"{here}, whose tokenizer cannot be loaded: {first_sentence(error)}.") from error
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= encoder.vocab_size:
        raise ConfigError(
            f"{here}, whose tokenizer has the token {token!r} with the number {number}, and whose text encoder has "
            f"embeddings for {encoder.vocab_size} tokens, from 0; a tokenizer whose tokens all have one is accepted."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.max_position_embeddings)
    return tokenizer
