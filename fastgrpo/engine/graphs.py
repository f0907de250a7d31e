"""Calls on fixed memory: on CUDA recorded once as a graph and replayed, elsewhere made anew each time.

A replay runs the recorded kernels on the recorded addresses, without Python and without a launch from the host for each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.cuda.memory import _cuda_endAllocateToPool

Inputs = Sequence[Tensor | None]

_WARM_UP = 3  # calls before a capture: libraries make their handles and workspaces, lazy work gets done


class StaticCall:
    """A function whose inputs are copied into memory of its own before every call.

    buffers: that memory, one tensor per input in the example's layout, or None; they may also be written directly.

    With `capture` the function is called a few times on a stream of its own, then once more while its kernels are
    recorded; what it returned then is what every call returns, filled anew. Rules for what may be captured:

    - What decides which kernels run, and all that Python computes, is as it was at the capture. Only the content of
      tensors may differ: numbers that change, such as a step or a weight, are inputs.
    - Nothing may wait for the device (`item`, `tolist`, `if tensor:`, copies to the host), draw random numbers or change
      shapes. Tensors from outside, such as weights, are read and written where they lay at the capture; they must stay
      there and be kept alive by the caller.
    - Gradient mode is that of the capture. `torch.autograd.grad` may be called, for a forward pass within the same function;
      `backward()` too, if every `.grad` already is the tensor to add to. Autocast must not keep its cache of weights.
    - Outputs are detached: one with a graph behind it would keep all its activations for good.
    - The warm-up really computes. A function that leaves something behind, such as a sum of gradients, gets an example
      for which it adds 0, or a `reset` that undoes it.

    Outputs hold until the next call of this or of any graph of the same pool, since the intermediate results of one may
    lie where the outputs of another are. For the same reason graphs of a pool never run at the same time. One thread at a
    time may call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Inputs,
        capture: bool,
        pool: tuple[int, int] | None = None,
        reset: Callable[[], object] | None = None,
    ):
        """inputs: an example, copied; a None stays None. pool: of `memory_pool`, to share with other graphs; None is its own.

        reset: called between warm-up and capture, which itself computes nothing.
        Raises ValueError where a graph is wanted of inputs that are not on one CUDA device, and whatever the function or
        the capture raises; the device can be used afterwards.
        """
        self._function = function
        self.buffers = tuple(None if tensor is None else tensor.detach().clone() for tensor in inputs)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None
        if capture:
            devices = {buffer.device for buffer in self.buffers if buffer is not None}
            if [device.type for device in devices] != ["cuda"]:
                names = sorted(map(str, devices))
                raise ValueError(f"a graph's inputs are on {names}; accepted is one CUDA device")
            device = devices.pop()
            with torch.cuda.device(device):
                self._capture(device, pool, reset)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """What the function returns for `inputs`, which are like the example's in shape, dtype, device and where they are None.

        Never waits for the device. Raises ValueError, naming the input, for others.
        """
        if len(inputs) != len(self.buffers):
            raise ValueError(f"{len(inputs)} inputs were given; accepted are {len(self.buffers)}")
        for position, (buffer, given) in enumerate(zip(self.buffers, inputs, strict=True)):
            if _kind(buffer) != _kind(given):
                raise ValueError(f"input {position} is {_describe(given)}; accepted is {_describe(buffer)}")
        with torch.no_grad():
            for buffer, given in zip(self.buffers, inputs, strict=True):
                if buffer is not None:
                    buffer.copy_(given, non_blocking=True)
        if self._graph is None:
            return self._function(*self.buffers)
        self._graph.replay()
        return self._outputs

    def _capture(self, device: torch.device, pool: tuple[int, int] | None, reset: Callable[[], object] | None) -> None:
        current, side = torch.cuda.current_stream(), _side_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._function(*self.buffers)
        current.wait_stream(side)
        if reset is not None:
            reset()
        graph, pool, failure = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle(), None
        # Other threads may use the device meanwhile, NCCL's for instance.
        recording = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(current), recording:  # the former restores the stream where the latter cannot end
                try:
                    self._outputs = self._function(*self.buffers)
                except BaseException as error:
                    failure = error
        except BaseException as error:
            # What went wrong within is the reason why a capture cannot end. PyTorch then leaves its allocator recording.
            failure = failure or error
            with suppress(RuntimeError):
                _cuda_endAllocateToPool(device.index, pool)
        if failure is not None:
            self._outputs = None
            raise failure
        self._graph = graph


def memory_pool(device: torch.device) -> tuple[int, int] | None:
    """Memory that several graphs on `device` can share, the rollout's and the update's for instance; None without CUDA."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


@contextmanager
def no_host_sync() -> Iterator[None]:
    """On CUDA a wait for the device within the block, where PyTorch knows of it, raises RuntimeError. Elsewhere nothing."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are captured: memory of a pool is shared between captures on one stream."""
    return torch.cuda.Stream(device)


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
