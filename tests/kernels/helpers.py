"""What the tests of all operations need."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

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


def ulp(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number."""
    return torch.finfo(dtype).eps
