"""Frozen weights that are in a GPU's memory only while they are used, and in the host's otherwise.

    offload(vae.parameters(), of=vae, device)       they leave the device
    with resident(vae):                             there again, until the block ends
        vae.decode(latents)

Nothing is ever copied back: the weights do not change. On the way there it is one copy, from pinned memory, of all that
belongs together. The allocator hands memory out again in the order of a stream's work, so a block may end while its
kernels are still waiting to run; it is to begin and end on the stream that uses the weights.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_ALIGNMENT = 256  # bytes, as of a tensor that CUDA's allocator makes


class _Offloaded:
    """Tensors whose data lie in one buffer of the host's memory, and in one on `device` while they are used."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._device, self._users, self._lock = device, 0, threading.Lock()
        self._starts, size = [], 0
        for tensor in self._tensors:
            self._starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        # Dense, and in each tensor's own order of dimensions.
        self._strides = [torch.empty_like(tensor, device="meta").stride() for tensor in self._tensors]
        pinned = device.type == "cuda" and torch.cuda.is_available()
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for tensor, view in zip(self._tensors, self._views(self._host), strict=True):
            view.copy_(tensor)
        self._put(self._host)

    @contextmanager
    def resident(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._put(self._host.to(self._device, non_blocking=True, copy=True))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._put(self._host)

    def _put(self, buffer: Tensor) -> None:
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)
            for tensor, start, strides in zip(self._tensors, self._starts, self._strides, strict=True)
        ]


_OFFLOADED: WeakKeyDictionary[nn.Module, _Offloaded] = WeakKeyDictionary()


@torch.no_grad()
def offload(tensors: Iterable[Tensor], of: nn.Module, device: torch.device) -> None:
    """Moves frozen tensors into the host's memory, from where `resident(of)` brings them to `device`, in place.

    tensors: parameters or buffers, of any dtype; each stays the same object. On a CPU nothing is moved.
    """
    if device.type != "cpu":
        _OFFLOADED[of] = _Offloaded(tensors, device)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """What was moved away by `offload(..., of=module)` is on its device within the block; such blocks may be nested.

    Nothing happens where nothing was.
    """
    offloaded = _OFFLOADED.get(module)
    if offloaded is None:
        yield
        return
    with offloaded.resident():
        yield
