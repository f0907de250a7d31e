"""What each operator of a traced iteration does: how long it should take, what it leaves in memory, if it waits."""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generated import ATTENTION, Graph, Kernel, Speeds, operation, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
_FREE = (
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::lift_fresh",
    "aten::_reshape_alias",
)


class DeviceWait(RuntimeError):
    """An operator that the host would wait for the device in."""


@dataclass
class Total:
    """A part of a phase: launches, what they move and compute, predicted seconds without gaps, all and of attention."""

    launches: int = 0
    bytes: int = 0
    flop: float = 0.0
    seconds: float = 0.0
    attention: float = 0.0


class Watch(TorchDispatchMode):
    """Sees every operator: how long it should take, what it leaves in memory, and whether it waits.

    totals: by phase and part. peaks: phase -> the most bytes that storages had. waits: (operator, place) -> how often,
    where that is allowed.
    """

    def __init__(self, speeds: Speeds):
        super().__init__()
        self.totals: defaultdict[tuple[str, str], Total] = defaultdict(Total)
        self.peaks: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._speeds, self._phase, self._strict = speeds, "start", False
        self._live, self._known = 0, set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextmanager
    def phase(self, name: str, strict: bool = True) -> Iterator[None]:
        """strict: raise DeviceWait for what waits."""
        before = self._phase, self._strict
        self._phase, self._strict = name, strict
        self.peaks[name] = max(self.peaks[name], self._live)
        try:
            yield
        finally:
            self._phase, self._strict = before

    def ran(self, graph: Graph, part: str) -> None:
        """Compiled code is running."""
        for each in graph.kernels:
            self._add(part, each)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """These are there already, or now."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type != "cuda" or storage._cdata in self._known:
                continue
            self._known.add(storage._cdata)
            self._live += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peaks[self._phase] = max(self.peaks[self._phase], self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        if waits(func, args, kwargs, given):
            where = place()
            if self._strict:
                raise DeviceWait(f"{func} waits for the device in {self._phase}, called at {where}")
            self.waits[str(func), where] += 1
        out = func(*args, **kwargs)
        made = tensors(out)
        self.hold(made)
        if any(t.device.type == "cuda" for t in (*given, *made)) and _launches(func):
            part = "accumulation" if "accumulate" in func._schema.name else "the rest"
            self._add(part, operation(func, args, kwargs, out, self._speeds))
        return out

    def _add(self, part: str, each: Kernel) -> None:
        total = self.totals[self._phase, part]
        total.launches += 1
        total.bytes += each.bytes
        total.flop += each.flop
        total.seconds += each.seconds
        total.attention += each.seconds if each.kind == ATTENTION else 0.0

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def waits(func: Any, args: Any, kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> bool:
    """Whether the host would wait: for numbers, for shapes that follow from them, for a copy not `non_blocking`."""
    devices, name = {tensor.device.type for tensor in given}, func._schema.name
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):  # with a mask they count what is in it
        return any(mask is not None and mask.dtype == torch.bool and mask.device.type == "cuda" for mask in args[1])
    if name == "aten::copy_":
        return len(devices) > 1 and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        return {torch.device(kwargs["device"]).type, *devices} == {"cuda", "cpu"} and not kwargs.get("non_blocking")
    return "cuda" in devices and bool(
        {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    )


def place() -> str:
    """FILE:LINE of the project's own code that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts and Path(__file__) != file:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _launches(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in returned)
    return func.namespace != "prim" and not view and not func._schema.name.startswith(_FREE)
