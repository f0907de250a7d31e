"""What the tests of all operations need."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

# A test that launches Triton's kernels on CPU tensors, where its interpreter takes them.
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here: the GPU tests run them"
)
# A test that launches them on a device. The marker alone does not do where only tests/kernels/ is collected.
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
# The same test on either: interpreted on CPU tensors, compiled on CUDA's.
on_kernels = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted, id="interpreted"), pytest.param("cuda", marks=on_gpu, id="gpu")]
)

# Channels a group of every group norm of SD 1.x and 2.x (from 10), of the shipped UNet (2 to 8), and up to the largest
# that group_norm_silu is made for.
GROUP_CHANNELS = (2, 4, 6, 8, 10, 20, 30, 40, 60, 80, 120)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch.empty and its relatives hand out is NaN, or the largest integer: what is not written shows."""

    def poison(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor.fill_(True)

        return wrapped

    with mock.patch.multiple(
        torch, empty=poison(torch.empty), empty_like=poison(torch.empty_like), empty_strided=poison(torch.empty_strided)
    ):
        yield


def on_device(tensor: Tensor, device: str) -> Tensor:
    """The tensor there, with the strides it has: a copy by `to` would give it those of contiguous memory."""
    if tensor.device.type == device:
        return tensor
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def ulp(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number."""
    return torch.finfo(dtype).eps


class Recorder:
    """In a kernel's place: remembers the keyword arguments of its last launch, as `options`."""

    options: dict[str, object]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: object, **options: object) -> None:
            self.options = options

        return launch
