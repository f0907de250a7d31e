"""Finished chunks are decoded and scored while the next ones are drawn.

Chunk i is finished once all steps of chunk i + 1 have been handed to the device, so the device is busy while the host
waits, for instance to check a reward's numbers. Only the clock changes, no number. Images and scores are complete when
the block ends.

Decoding is not a graph. Its kernels, some 150 for 16 images of 512 x 512 pixels, take a GPU about 0.1 s by count and an
idle host some milliseconds to launch; a graph would keep 6 GB in a pool of its own for good.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


class Pipeline:
    """Runs `finish` for every chunk that was drawn, one chunk later, on a stream of its own. Made by `pipeline`."""

    def __init__(self, finish: Callable[[slice], object], device: torch.device):
        self._finish = finish
        self._cuda = device.type == "cuda"
        self._side = _side_stream(device) if self._cuda else None
        self._waiting: tuple[slice, torch.cuda.Event | None] | None = None

    def drawn(self, part: slice) -> None:
        """All steps of these samples are on their way."""
        event = torch.cuda.current_stream().record_event() if self._cuda else None
        self.flush()
        self._waiting = part, event

    def flush(self) -> None:
        """Finish what is waiting."""
        if self._waiting is None:
            return
        (part, event), self._waiting = self._waiting, None
        if self._side is None or event is None:
            self._finish(part)
            return
        self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            self._finish(part)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: what the allocator keeps for a stream serves no other, and the VAE needs gigabytes for each.

    Of high priority: PyTorch hands out the streams of a priority in turn, and this one must not be one that graphs were
    captured on, whose replays run at the same time and use that stream's cuBLAS workspace.
    """
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def pipeline(finish: Callable[[slice], object], device: torch.device) -> Iterator[Pipeline]:
    """finish: given a chunk's samples; on CUDA it must free what it allocates before it returns, or keep it."""
    made = Pipeline(finish, device)
    yield made
    made.flush()
    if made._side is not None:
        torch.cuda.current_stream().wait_stream(made._side)
