"""CUDA graphs imitated on the CPU: a capture keeps a tape of operators, a replay runs them again on the same memory.

Memory is counted as PyTorch's allocator keeps it: what was freed stays reserved for the pool that it was allocated in.
That of plain calls is given back by `empty_cache`; a graph's stays until all graphs of its pool are gone.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgrpo.engine import fixed_passes, graphs

PLAIN = (0, 0)


@dataclass(eq=False)
class Graph:
    """tape: operators with their arguments and what they returned.

    Empty where memory is counted, for it would hold that.
    """

    tape: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    @torch.no_grad()
    def replay(self) -> None:
        for operator, args, kwargs, results in self.tape:
            again = operator(*args, **kwargs)
            if not any(result.alias_info for result in operator._schema.returns):
                for old, new in zip(_tensors(results), _tensors(again), strict=True):
                    old.copy_(new)


class Device(TorchDispatchMode):
    """The imitated device, as a context in which operators are recorded and counted.

    events: "warm up", "capture" and "end", as they came. captures: of how many a tape is kept, all unless `counts`.
    reserved: pool -> bytes. peak: the most that all pools reserved at once. broken: what an operator of a capture may
    set to have it end as PyTorch 2.11 lets an invalid one end: with an error, still recording, the stream still
    switched. stream: the current one. recording: pools that the allocator records for. drawing: whether random numbers
    can be drawn.
    """

    def __init__(self, counts: bool = False):
        super().__init__()
        self.counts, self.events, self.broken = counts, [], False
        self.stream, self.recording, self.released, self.drawing = "main", [], [], True
        self.reserved, self._live, self.peak = {PLAIN: 0}, {PLAIN: 0}, 0
        self._seen: set[int] = set()
        self._graph: Graph | None = None
        self._graphs: dict[tuple[int, int], weakref.WeakSet] = {}

    @property
    def capturing(self) -> bool:
        return self._graph is not None

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = operator(*args, **kwargs)
        if self.counts:
            given = {id_of(tensor) for tensor in _tensors((args, kwargs))}
            for tensor in _tensors(results):
                if id_of(tensor) not in given:
                    self._allocated(tensor)
        elif self._graph is not None:
            kept = tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), (args, kwargs, results))
            self._graph.tape.append((operator, *kept))
        return results

    def _allocated(self, tensor: torch.Tensor) -> None:
        storage, pool = tensor.untyped_storage(), self.recording[-1] if self.recording else PLAIN
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self._live[pool] = self._live.get(pool, 0) + storage.nbytes()
        weakref.finalize(storage, self._freed, storage._cdata, pool, storage.nbytes())
        self.reserved[pool] = max(self.reserved.get(pool, 0), self._live[pool])
        self.peak = max(self.peak, sum(self.reserved.values()))

    def _freed(self, storage: int, pool: tuple[int, int], size: int) -> None:
        self._seen.discard(storage)
        self._live[pool] -= size

    def empty_cache(self) -> None:
        for pool in self.reserved:
            if not self._graphs.get(pool):
                self.reserved[pool] = self._live[pool]

    @contextmanager
    def switched(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        if stream == "side" and self._graph is None:
            self.events.append("warm up")
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, graph: Graph, pool: tuple[int, int], stream: str, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert pool not in self.recording, "already recording to this pool"
        self.empty_cache()
        self.events.append("capture")
        before, self.stream, self._graph = self.stream, stream, graph
        self.recording.append(pool)
        self.drawing = False
        self._graphs.setdefault(pool, weakref.WeakSet()).add(graph)
        yield  # as PyTorch's own: what follows is not done where the body raises
        self._graph = None
        if self.broken:
            raise RuntimeError("capture invalidated")
        self.recording.remove(pool)
        self.stream, self.drawing = before, True
        self.events.append("end")

    def clone_state(self) -> "Device":
        """As a generator, whose copy is of no capture."""
        return self

    def graphsafe_set_state(self, state: "Device") -> None:
        self.drawing = True

    def end_recording(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)


@contextmanager
def imitated(monkeypatch: pytest.MonkeyPatch, counts: bool = False) -> Iterator[Device]:
    """counts: memory, instead of keeping tapes for replays."""
    device = Device(counts)
    handles = iter(range(1, 1000))
    cuda = {
        "CUDAGraph": Graph,
        "current_device": lambda: 0,
        "current_stream": lambda: SimpleStream(device.stream),
        "default_generators": [device],
        "device": lambda _: nullcontext(),
        "empty_cache": device.empty_cache,
        "graph": lambda graph, pool, stream, capture_error_mode: device.graph(
            graph, pool, stream.name, capture_error_mode
        ),
        "graph_pool_handle": lambda: (0, next(handles)),
        "Stream": lambda _: SimpleStream("side"),
        "stream": lambda stream: device.switched(stream.name),
        "synchronize": lambda: None,
    }
    with monkeypatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        for module in (graphs, fixed_passes):
            patch.setattr(module, "memory_pool", lambda _: torch.cuda.graph_pool_handle())
        patch.setattr(graphs, "_WARM_UP", 1)
        patch.setattr(graphs, "_cuda_device", lambda _: torch.device("cpu"))
        patch.setattr(graphs, "_cuda_endAllocateToPool", device.end_recording)
        patch.setattr(graphs, "_cuda_releasePool", lambda _, pool: device.released.append(pool))
        with device:
            yield device
    graphs._side_stream.cache_clear()


class SimpleStream(SimpleNamespace):
    def __init__(self, name: str):
        super().__init__(name=name, wait_stream=lambda other: None)


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
