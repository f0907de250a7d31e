"""Loading weights whole, or not at all, and without running what is in a file."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgrpo.models.sound import check_finite
from fastgrpo.models.tensor_file import SAFETENSORS, wrong_content
from fastgrpo.system.errors import ConfigError, first_sentence

_UNREADABLE = (AttributeError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, pickle.UnpicklingError)


def read_weights(file: Path, what: str, accepted: str) -> Any:
    """Read what a .safetensors or torch file holds, tensors by name as a rule; nothing in it is run.

    what: begins messages, such as "q16.prompts: 'x.pt'". accepted: ends them.
    Raises ConfigError where it cannot be read.
    """
    if wrong := wrong_content(file):
        raise ConfigError(f"{what} is {wrong}; {accepted}.")
    try:
        return load_file(file) if file.suffix == SAFETENSORS else torch.load(file, "cpu", weights_only=True)
    except (*_UNREADABLE, EOFError, KeyError) as error:
        raise ConfigError(f"{what} cannot be read as tensors ({type(error).__name__}); {accepted}.") from error


def load_whole(kind: Any, folder: Path, what: str, safe: bool = True) -> Any:
    """Load a float32 model of class `kind`, from transformers or diffusers, from a folder; no code in it is run.

    what: begins messages, such as "q16.encoder is 'x', which". safe: whether the weights are safetensors.
    Raises ConfigError where they cannot be read, are not finite, or lack a parameter.
    """
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=safe, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except _UNREADABLE as error:
        raise ConfigError(f"{what} cannot be loaded: {first_sentence(error)}.") from error
    # They would be random, with no more than a warning. Buffers are computed and need not be in the file.
    parameters = {name for name, _ in model.named_parameters()}
    if lacking := [*sorted(parameters.intersection(info["missing_keys"])), *info["mismatched_keys"]]:
        raise ConfigError(f"{what} lacks {lacking[0]} in the shape of its config.")
    check_finite(model, what)
    return model
