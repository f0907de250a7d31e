"""Threads for several CPU cores, each with a share of the batch.

A small UNet's operations are too short to split: on two cores, two OpenMP threads ran the `shapes` UNet no faster than
one, and two Python threads with half the batch each nearly twice as fast (torch frees the interpreter lock). So on a
CPU every core takes whole micro-batches, with one OpenMP thread; on a GPU there is one worker, which is a plain loop.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def threads_kept() -> Iterator[None]:
    """Leave torch's number of threads as it was: a program that calls us has its own use for them."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """Runs independent calls side by side, `count` at once, results in the order of the items."""

    def __init__(self, count: int):
        self.count = count
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None

    def map(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterable[Result]:
        """Like the built-in map; the first exception is raised. Gradient mode is the caller's in every worker."""
        if self._pool is None:
            return map(call, items)
        return self._pool.map(torch.set_grad_enabled(torch.is_grad_enabled())(call), items)


def shares(items: int, most: int, workers: int) -> list[slice]:
    """Nearly equal shares of at most `most` items, at least one for each worker."""
    count = min(items, max(-(-items // most), workers))
    bounds = [items * i // count for i in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
