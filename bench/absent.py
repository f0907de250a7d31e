"""A CUDA device that is not there: tensors have shapes, layouts and a device, but no memory, and nothing is computed.

Inside `absent_device()` code for CUDA can be called and traced, forward and backward, and inductor generates what it
would generate for that device. Nothing is compiled for it or launched. Works with PyTorch's builds for the CPU too.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._triton import has_triton

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150_110_011_392,
    L2_cache_size=50 * 2**20,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    warp_size=32,
    gcnArchName="",
)
"""What inductor asks of a device's properties."""

_ASKED = torch.ops.prim.device.default
_DISPATCH = FakeTensor.__dict__["__torch_dispatch__"].__func__
_ANSWER = fake_tensor._DISPATCH_META_HANDLERS[_ASKED]


@contextmanager
def absent_device(properties: SimpleNamespace = H200) -> Iterator[FakeTensorMode]:
    """Yields the mode in which tensors are made; it is entered."""
    with ExitStack() as stack:
        for patch in (*_properties(properties), *_device_of_autograd(), *_conv_backend()):
            stack.enter_context(patch)
        # What C++ makes for a tensor, such as a number to choose, is where that says it is.
        stack.enter_context(torch._functorch.config.patch(fake_tensor_prefer_device_type="cuda"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # Answers about the real machine that were kept from before, and those about this device for what comes after.
        has_triton.cache_clear()
        for answer in (has_triton, DeviceProperties.create):
            stack.callback(answer.cache_clear)
        yield stack.enter_context(FakeTensorMode())


def _properties(properties: SimpleNamespace) -> Iterator[Any]:
    """What inductor asks before it generates code."""

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    capability = properties.major, properties.minor
    yield mock.patch.multiple(
        torch.cuda,
        get_device_properties=always(properties),
        get_device_capability=always(capability),
        current_device=always(0),
        graph_pool_handle=always((0, 0)),
        current_stream=always(mock.MagicMock(cuda_stream=0)),
    )
    yield mock.patch.multiple(
        CudaInterface,
        get_device_properties=staticmethod(always(properties)),
        current_device=staticmethod(always(0)),
        is_available=staticmethod(always(True)),
        is_bf16_supported=staticmethod(always(True)),
        get_compute_capability=staticmethod(always(10 * capability[0] + capability[1])),
        is_triton_capable=staticmethod(always(True)),
        raise_if_triton_unavailable=staticmethod(always(None)),
    )
    yield mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(always(properties)))
    yield mock.patch("torch.utils._triton.triton_hash_with_backend", always("absent"))


def _device_of_autograd() -> Iterator[Any]:
    """Autograd asks for streams of the device that its tensors have in C++. There they say `meta`, which has none."""
    answer = torch.device("meta")

    def answering(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return answer if func is _ASKED else _DISPATCH(cls, func, types, args, kwargs)

    yield mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(answering))
    yield mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {_ASKED: lambda args: answer})


@contextmanager
def without_autograd() -> Iterator[None]:
    """Within `absent_device()` tensors are on CUDA in C++ too: `is_cuda` holds, but nothing can go backward."""
    with (
        mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(_DISPATCH)),
        mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {_ASKED: _ANSWER}),
    ):
        yield


def _conv_backend() -> Iterator[Any]:
    """cuDNN for every convolution, which keeps channels_last.

    What is asked for otherwise is whether cuDNN can be loaded.
    """

    def layout(x: Any, weight: Any, backend: Any) -> torch.memory_format:
        last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if last and x.ndim == 4 else torch.contiguous_format

    # No mock, which would keep what it was called with, and that is large.
    def backend(*args: Any, **kwargs: Any) -> Any:
        return torch._C._ConvBackend.Cudnn

    yield mock.patch.object(torch._C, "_select_conv_backend", backend)
    yield mock.patch.object(torch._C, "_conv_determine_backend_memory_format", layout)


def on_device(tensor: torch.Tensor, requires_grad: bool | None = None) -> torch.Tensor:
    """One like it, strides and all, on the device; inside of `absent_device()`. A parameter stays one."""
    if isinstance(tensor, FakeTensor):
        return tensor
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    wanted = tensor.requires_grad if requires_grad is None else requires_grad
    return torch.nn.Parameter(made, wanted) if isinstance(tensor, torch.nn.Parameter) else made.requires_grad_(wanted)


def module_on_device(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters and buffers are such tensors."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(weight): on_device(weight) for weight in weights})
