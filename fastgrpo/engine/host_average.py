"""The moving average of trained weights in the host's memory, where the device's is short (engine.offload)."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements, 16 MiB, that are on the device at a time: large enough for a copy at full speed


class HostAverage:
    """average <- average + (1 - decay) * (weights - average), streamed through the device part by part.

    values: [n] float32, in pinned memory beside CUDA; complete whenever a method has returned. As the optimizer's own
    kernel has it, but for rounding on a GPU.
    """

    def __init__(self, weights: Tensor, decay: float):
        """weights: [n] float32, where the average begins. decay: from 0 to 1."""
        pinned = weights.device.type == "cuda" and torch.cuda.is_available()
        self.values = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=pinned)
        self.values.copy_(weights)
        self._decay = decay

    @torch.no_grad()
    def follow(self, weights: Tensor, left_out: Tensor) -> None:
        """Take one step towards `weights`, [n] float32. left_out: [1] float32 beside them; at 1 nothing changes."""
        share = ((1 - self._decay) * (1 - left_out)).expand(1)
        for mine, theirs in self._parts(weights):
            staged = mine.to(weights.device, copy=True, non_blocking=True)
            mine.copy_(staged.lerp_(theirs, share), non_blocking=True)
        _wait(weights.device)

    @torch.no_grad()
    def exchange(self, weights: Tensor) -> None:
        """Average and `weights` take each other's place, bit for bit."""
        for mine, theirs in self._parts(weights):
            staged = mine.to(weights.device, copy=True, non_blocking=True)
            mine.copy_(theirs, non_blocking=True)
            theirs.copy_(staged)
        _wait(weights.device)

    def _parts(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.values.split(_CHUNK), weights.split(_CHUNK), strict=True)


def _wait(device: torch.device) -> None:
    """Until the host has what was copied to it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
