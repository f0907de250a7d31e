"""Which algorithm cuDNN takes for a convolution.

For each kind of convolution (shapes, dtype, layout, alignment) cuDNN keeps, in every thread, the algorithm of the first
time: what heuristics name, or under `torch.backends.cudnn.benchmark` the fastest of ten that it then tries, in tens of
milliseconds. That pays where shapes stay the same.

- A kind first met without that flag keeps its algorithm. So passes that only try something are made `aside`.
- A kind has to be met before a CUDA graph is captured, since trying waits for the device. A graph's warm-up sees to it.
- Rollout and update meet the same kinds in one thread, so they have the same algorithms, and the ratio of a policy that
  has not moved stays 1. Another process may choose and round otherwise; what was found cannot be stored.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cudnn


@contextmanager
def searching(wanted: bool) -> Iterator[None]:
    """Lets cuDNN try algorithms, or not, for the kinds of convolutions that it first meets within the block."""
    before = cudnn.benchmark
    cudnn.benchmark = wanted
    try:
        yield
    finally:
        cudnn.benchmark = before


@contextmanager
def aside() -> Iterator[None]:
    """Computes the block without a search; kinds that are met within are met for the first time again outside.

    Within, cuDNN is asked for algorithms that repeat bit for bit, and it keeps those apart from the others.
    """
    before = cudnn.deterministic
    cudnn.deterministic = True
    try:
        with searching(False):
            yield
    finally:
        cudnn.deterministic = before
