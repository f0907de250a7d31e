"""On which GPU kernels run: on that of their tensors, whichever is the current one."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with the device of the first tensor among its arguments made the current one while it runs.

    Triton launches on the current device and its current stream, wherever the tensors are. On the CPU nothing changes.
    """

    @functools.wraps(launch)
    def launched(*arguments: Any, **options: Any) -> Any:
        first = next(value for value in (*arguments, *options.values()) if isinstance(value, Tensor))
        with torch.cuda.device_of(first):
            return launch(*arguments, **options)

    return launched
