"""What the tests of all operations need."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


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
