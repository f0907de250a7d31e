"""Refuses weights that are not finite where they are loaded: a single NaN makes every picture nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgrpo.system.errors import ConfigError


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first tensor with a number that is NaN or infinite; empty where all are finite."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # Least and greatest are NaN where one number is. isfinite() would write as many flags as there are numbers.
        if not torch.stack(tensor.detach().aminmax()).isfinite().all():
            return name
    return ""


def check_finite(weights: nn.Module | Mapping[str, Tensor], what: str) -> None:
    """Raise ConfigError, which begins with `what` ("model.path is 'x'"), for weights that are not all finite."""
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if name := first_not_finite(tensors.items()):
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        raise ConfigError(
            f"{what} has numbers that are not finite in {name} ({dtype}); such weights are damaged, have diverged or "
            "do not fit into this precision, and none are accepted."
        )


def load_finite(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of a run. Raises ConfigError for weights that are not all finite."""
    tensors = load_file(file)
    check_finite(tensors, str(file))
    return tensors
