"""Records how kernels are launched and compiles them before they are: fills Triton's cache without a device.

Triton compiles a kernel when it is first launched with arguments of a kind: their types, which integers are 1 or
multiples of 16, which pointers are aligned, constants and options. `recording` takes down how kernels are launched, of
tensors on any device, the meta device among them, and launches nothing. `compile_launches` asks Triton itself for what
such a launch needs, so the launch that comes later looks for the very file that was written.
"""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from fastgrpo.kernels.group_norm_silu import BACKENDS

_ALIGNED = 16  # bytes; what Triton tells apart


@dataclass(frozen=True)
class Pointer:
    """A tensor, as far as Triton compiles for it. aligned: its first element's address is a multiple of 16."""

    dtype: torch.dtype
    aligned: bool

    def mock(self) -> MockTensor:
        mock = MockTensor(self.dtype)
        if not self.aligned:
            mock.data_ptr = lambda: 1
        return mock


@dataclass(frozen=True)
class KernelLaunch:
    """How a kernel is launched. arguments: in its order, tensors as `Pointer`, also those in tuples. options: by name,
    constants among them.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def compile(self) -> Any:
        """Compile it for the active driver's device, or find it in the cache. Raises whatever Triton raises."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        given = _each(self.arguments, Pointer, Pointer.mock)
        return kernel.warmup(*given, grid=(1,), **dict(self.options))


class _Operators(TorchDispatchMode):
    """Has every operator of ours do on any tensors what it does on a GPU's, besides what it does."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "fastgrpo":
            function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[dict[tuple, KernelLaunch]]:
    """Writes down what kernels the block would launch, in their order: kind -> the first launch of that kind.

    Operators compute nothing real: the block is meant for tensors on the meta device, where shapes are all there is.
    """
    found: dict[tuple, KernelLaunch] = {}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        arguments = _each(args, torch.Tensor, _pointer)
        launch = KernelLaunch(kernel.fn.__module__, kernel.fn.__name__, arguments, tuple(sorted(options.items())))
        found.setdefault(_kind(kernel, launch), launch)

    launching = JITFunction.run
    JITFunction.run = run
    BACKENDS.set("triton")
    try:
        with _Operators():
            yield found
    finally:
        JITFunction.run = launching
        BACKENDS.set("auto")


def compile_launches(
    launches: Sequence[KernelLaunch], architecture: int, processes: int = 0
) -> Iterator[tuple[KernelLaunch, str]]:
    """(launch, why it did not compile, or ""), as they are done, on `processes` cores, 0 being all.

    architecture: 90 for compute capability 9.0.
    """
    cores = processes or len(os.sched_getaffinity(0))
    # Forked, so that workers have what is imported here.
    with multiprocessing.get_context("fork").Pool(cores, _pretend, (architecture,)) as pool:
        yield from pool.imap_unordered(_compile, launches)


class PretendedDriver:
    """What Triton asks of a GPU's driver before it compiles; nothing can be launched with it."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _pretend(architecture: int) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(PretendedDriver(architecture))


def _compile(launch: KernelLaunch) -> tuple[KernelLaunch, str]:
    try:
        launch.compile()
    except Exception as error:  # of Triton, LLVM or ptxas: one kernel must not hide the others
        return launch, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return launch, ""


def _each(values: tuple, kind: type, change: Callable[[Any], Any]) -> tuple:
    """The values, those of a kind changed, in tuples within too."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return change(value) if isinstance(value, kind) else value

    return changed(values)


def _pointer(tensor: torch.Tensor) -> Pointer:
    """PyTorch aligns what it allocates, so a view's offset says it all."""
    return Pointer(tensor.dtype, tensor.storage_offset() * tensor.element_size() % _ALIGNED == 0)


def _kind(kernel: JITFunction, launch: KernelLaunch) -> tuple:
    """Launches of the same kind share what is compiled for them."""
    plain = [
        argument if parameter.is_constexpr else _specialised(argument)
        for parameter, argument in zip(kernel.params, launch.arguments, strict=False)
    ]
    return (launch.module, launch.name, *plain, *launch.options)


def _specialised(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_specialised, value))
    if type(value) is int:
        return "int", value == 1, value % _ALIGNED == 0, value.bit_length() > 31
    return "float" if type(value) is float else value
