"""Calls on fixed memory: on CUDA recorded once as a graph and replayed, elsewhere made anew each time.

A replay runs the recorded kernels on the recorded addresses, without Python and without launching each from the host.

Memory: what a capture allocates stays with its graph, in a pool that graphs may share but plain calls may not. A
function is first called plainly, which takes as much memory again. So everything is called plainly before the first
capture, and that memory is given back. Graphs that share a pool then need what the largest of them needs, once.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.cuda.memory import _cuda_endAllocateToPool, _cuda_releasePool

Inputs = Sequence[Tensor | None]
Pool = Any
"""PyTorch's name of a memory pool: a pair of numbers."""

_WARM_UP = 3  # calls before a capture, in which libraries make their handles and workspaces


class StaticCall:
    """A function whose inputs are copied into memory of its own before every call.

    buffers: that memory, one tensor per input in the example's layout, or None; they may also be written directly.

    Until it is captured, a call runs the function. For a capture the function is called a few times on a stream of its
    own, then once more while its kernels are recorded. Later calls fill and return the outputs of that last call.
    Rules for what may be captured:

    - Only the content of tensors may change after the capture, not which kernels run nor what Python computes. Numbers
      that change, such as a step or a weight, are inputs.
    - Nothing may wait for the device (`item`, `tolist`, `if tensor:`, copies to the host), draw random numbers or
      change shapes. Tensors from outside, such as weights, must stay where they lay; the caller keeps them alive.
    - Gradient mode is that of the capture. `torch.autograd.grad` may be called for a forward pass of the same function;
      `backward()` too, if every `.grad` already is the tensor to add to. Autocast must not cache weights.
    - Outputs are detached: one with an autograd graph would keep all its activations for good.
    - The warm-up really computes. A function that sums gradients, say, gets an example for which it adds 0.

    Outputs hold until the next call of this or any graph of the same pool, whose intermediate results may lie there.
    So graphs of a pool never run at the same time. One thread at a time may call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Inputs,
        capture: bool,
        pool: Pool | None = None,
        pack: Callable[..., Any] | None = None,
    ):
        """inputs: an example, copied; a None stays None. capture: at once, as `capture_all` does, raising what it does.

        pool: of `memory_pool`, shared with other graphs; None is its own. pack: turns the inputs into one object, which
        the function gets instead.
        """
        self._function, self._pool = function, pool
        self.buffers = tuple(None if tensor is None else tensor.detach().clone() for tensor in inputs)
        self._given = (pack(*self.buffers),) if pack else self.buffers
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm, self._outputs = False, None
        if capture:
            capture_all([self])

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def warm_up(self) -> None:
        """Call the function on the buffers to make it ready for a capture; a second call does nothing.

        Raises ValueError where the inputs are not on one CUDA device, RuntimeError where the function waits for the
        device, and whatever it raises itself.
        """
        if self._warm:
            return
        device = _cuda_device(self.buffers)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        warm_up(lambda: self._function(*self._given), device, self._pool)
        self._warm = True

    def __call__(self, *inputs: Tensor | None) -> Any:
        """What the function returns for `inputs`; never waits for the device.

        Raises ValueError, naming the input, where one differs from the example's in shape, dtype, device or being None.
        """
        if len(inputs) != len(self.buffers):
            raise ValueError(f"{len(inputs)} inputs were given; accepted are {len(self.buffers)}")
        for position, (buffer, given) in enumerate(zip(self.buffers, inputs, strict=True)):
            if _kind(buffer) != _kind(given):
                raise ValueError(f"input {position} is {_describe(given)}; accepted is {_describe(buffer)}")
        with torch.no_grad():
            for buffer, given in zip(self.buffers, inputs, strict=True):
                if buffer is not None and given is not None:
                    buffer.copy_(given, non_blocking=True)
        if self._graph is None:
            return self._function(*self._given)
        self._graph.replay()
        return self._outputs

    def _record(self) -> None:
        device = _cuda_device(self.buffers)
        assert self._pool is not None, "a capture comes after the warm-up"
        self._graph, self._outputs = record(lambda: self._function(*self._given), device, self._pool)


def capture_all(calls: Sequence[StaticCall]) -> None:
    """Record the calls that are not graphs yet, after warming all of them up.

    calls: the largest first, so that the others fit into its memory in a shared pool. Raises ValueError where a call's
    inputs are not on one CUDA device, and whatever a function or a capture raises; the device can be used afterwards.
    """
    waiting = [call for call in calls if not call.captured]
    for call in waiting:
        call.warm_up()
    gc.collect()
    torch.cuda.empty_cache()
    for call in waiting:
        call._record()


def warm_up(function: Callable[[], object], device: torch.device, pool: Pool) -> None:
    """Call the function a few times on the stream where `record` will record it.

    Raises RuntimeError where the last call waits for the device: some versions of PyTorch never recover from a capture
    that this breaks.
    """
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), _side_stream(device, pool)
        torch.cuda.empty_cache()  # what the allocator keeps for one stream serves no other
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP - 1):
                    function()
                with no_host_sync():
                    function()
        finally:
            current.wait_stream(side)


def record(function: Callable[[], Any], device: torch.device, pool: Pool) -> tuple[torch.cuda.CUDAGraph, Any]:
    """After `warm_up`: a graph of the kernels that one call of the function starts, and what the call returned.

    Raises whatever the function or the capture raises. The device can then still be used, but the pool takes no more.
    """
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), _side_stream(device, pool)
        graph, outputs, failure = torch.cuda.CUDAGraph(), None, None
        # Other threads may use the device meanwhile, NCCL's for instance.
        recording = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(current), recording:  # the former restores the stream where the latter cannot end
                try:
                    outputs = function()
                except BaseException as error:
                    failure = error
        except BaseException as error:
            failure = failure or error  # what went wrong within is the reason why a capture cannot end
            _stop_recording(graph, pool)
        if failure is not None:
            try:
                raise failure
            finally:
                failure = outputs = None  # else it would keep itself alive, and with it all that the function had
    return graph, outputs


_ABANDONED: list[torch.cuda.CUDAGraph] = []


def _stop_recording(graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
    """Clean up after a capture that could not end: PyTorch 2.11 leaves the generator and both allocators recording.

    The allocator of pinned memory cannot be stopped. During every later capture it asks the graph whether the capture
    is its own, and gets a no. So the graph is kept alive, and nothing may be captured into its pool again. Newer
    versions stop all three.
    """
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # the same numbers follow
    try:
        _cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it was ended
    _ABANDONED.append(graph)
    with suppress(RuntimeError):
        _cuda_releasePool(device, pool)  # else what the capture allocated is kept for good


def memory_pool(device: torch.device) -> Pool | None:
    """Memory that several graphs on `device` can share, such as the rollout's and the update's; None without CUDA."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises RuntimeError within the block if the host would wait for a CUDA device, as far as PyTorch can tell."""
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
def _side_stream(device: torch.device, pool: Pool) -> torch.cuda.Stream:
    """The stream where graphs of a pool are captured: they share its memory only on one stream.

    Each pool has its own: PyTorch 2.14 frees a stream's cuBLAS workspace when any graph captured there is freed.
    """
    return torch.cuda.Stream(device)


def _cuda_device(buffers: Inputs) -> torch.device:
    """Raises ValueError unless all are on one CUDA device."""
    devices = {buffer.device for buffer in buffers if buffer is not None}
    if [device.type for device in devices] != ["cuda"]:
        raise ValueError(f"a graph's inputs are on {sorted(map(str, devices))}; accepted is one CUDA device")
    return devices.pop()


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
