"""How long the device takes for a call."""

import statistics
from collections.abc import Callable

import torch

_WARMUP = 3
_CALLS = 7
# 10 to 20 ms: Python launches the calls in less, so that the device never waits for it, as in the engine's CUDA graphs.
_HEAD_START_CYCLES = 20_000_000


def device_milliseconds(call: Callable[[], object]) -> float:
    """Returns the median of seven calls, each between two CUDA events: the device's time without Python's."""
    for _ in range(_WARMUP):
        call()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_CALLS)]
    torch.cuda._sleep(_HEAD_START_CYCLES)
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
