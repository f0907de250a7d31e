"""Loading a detector's weights whole, or not at all."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastgrpo.models.sound import check_finite
from fastgrpo.system.errors import ConfigError, first_sentence

_UNREADABLE = (AttributeError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, pickle.UnpicklingError)


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
