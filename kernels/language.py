"""Triton, or where it is not installed, as on macOS, a stand-in: on a CPU operators run in PyTorch, without kernels."""

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["VERSION", "tl", "triton"]


class _Kernel:
    """A kernel that has a signature and cannot be launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.arg_names = list(inspect.signature(function).parameters)

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError("Triton is not installed, and kernels on a GPU need it")


class _Absent:
    """Has what modules with kernels need of Triton to be imported; for anything else it says that Triton is missing."""

    JITFunction = jit = _Kernel

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    @staticmethod
    def cdiv(number: int, divisor: int) -> int:
        return -(-number // divisor)

    @staticmethod
    def next_power_of_2(number: int) -> int:
        return 1 << (number - 1).bit_length()

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"triton.{name}: Triton is not installed, and kernels on a GPU need it")


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()
    VERSION = ""
else:
    VERSION = triton.__version__
"""Triton's version; empty where it is not installed."""
