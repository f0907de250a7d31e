"""Work that is done in smaller parts where a GPU's memory runs out.

Passes of the UNet that train have `engine.passes.Attempt`, which also begins their sums again, tells the other
processes, and keeps the size for a resumed run. Here is what needs none of that.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def halve_until_it_fits(run: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """Call `run` with `size`, and again with half of it where memory runs out, which a warning says.

    size: how many are worked on at once, 1 or more. what: of the warning, such as "latents are decoded".
    Returns what `run` returned and the size that fitted. Raises OutOfMemoryError where not even one fits.
    """
    while True:
        try:
            return run(size), size
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
        # Only here: until the exception is gone, it holds what the failed pass computed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: {size // 2} {what} at once instead of {size}", stacklevel=3)
        size //= 2
