"""What the operators share: the dtypes they take, and that they launch on the device of their tensors."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
"""What activations, gradients and the UNet's output may be."""


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the first tensor among the arguments current, as Triton launches there; not on the CPU."""

    @functools.wraps(launch)
    def launched(*arguments: Any, **options: Any) -> Any:
        first = next(value for value in (*arguments, *options.values()) if isinstance(value, Tensor))
        with torch.cuda.device_of(first):
            return launch(*arguments, **options)

    return launched
