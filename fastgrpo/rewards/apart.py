"""Keeps the process's global state apart: what the user's code sets of it holds for that code alone.

A reward's file may turn gradients off, change the default dtype, seed every generator or move to another folder, on
import or in a call. Its next call finds all that as it was left; training, whose numbers depend on it, never does.
"""

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import backends


@dataclass(frozen=True)
class _State:
    """One piece of the process's global state.

    read: returns its value, which can be compared by ==. write: sets such a value.
    theirs: whether the user's code finds it as it left it; else it is only put back.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    theirs: bool = True


class Apart:
    """Call it for a block around code of the user's own. Files that share state share the object."""

    def __init__(self) -> None:
        self._theirs: dict[str, Any] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        ours = {name: state.read() for name, state in _STATES.items()}
        # Only this can close an inference mode that is left open; opening it turns gradients on.
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(ours["gradients"])
            try:
                for name, value in self._theirs.items():
                    _STATES[name].write(value)
                yield
            finally:
                for name, state in _STATES.items():
                    found = state.read()
                    self._theirs.pop(name, None)
                    if found != ours[name]:
                        if state.theirs:
                            self._theirs[name] = found
                        state.write(ours[name])


def _together(*states: tuple[Callable[[], Any], Callable[[Any], object]]) -> _State:
    """Several values as one, written in their order. states: how each is read and written."""

    def write(values: tuple) -> None:
        for (_, write_one), value in zip(states, values, strict=True):
            write_one(value)

    return _State(lambda: tuple(read() for read, _ in states), write)


def _attributes(owner: Any, *names: str) -> _State:
    """Attributes that are read and set as such."""
    return _together(*((partial(getattr, owner, name), partial(setattr, owner, name)) for name in names))


def _precision() -> _State:
    """PyTorch's precision of float32 products, in an old notation and a new one.

    Where the new one was used, PyTorch may refuse to read the old one, which is then left alone. In the new one the
    general comes before the special, which follows it where it is not set itself.
    """
    cuda: Any = backends.cuda
    cudnn: Any = backends.cudnn
    mkldnn: Any = backends.mkldnn
    new = [backends, cuda.matmul, cudnn, cudnn.conv, cudnn.rnn, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]

    def old(
        read: Callable[[], Any], write: Callable[[Any], object]
    ) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        def readable() -> Any:
            with suppress(RuntimeError):
                return read()

        return readable, lambda value: None if value is None else write(value)

    return _together(
        old(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        old(lambda: cudnn.allow_tf32, partial(setattr, cudnn, "allow_tf32")),
        *((partial(getattr, each, "fp32_precision"), partial(setattr, each, "fp32_precision")) for each in new),
    )


def _flushes_denormals() -> bool:
    """Whether numbers below the normal ones are 0: PyTorch does not tell, but such a number does."""
    return (torch.full((1,), 1e-310, dtype=torch.float64, device="cpu") * 1).item() == 0


def _read_generators() -> tuple:
    """torch's, numpy's and Python's, as bytes and plain numbers."""
    cuda = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b""
    numpy: Any = np.random.get_state()  # noqa: NPY002 (what rewards may draw from)
    return torch.get_rng_state().numpy().tobytes(), cuda, (numpy[0], numpy[1].tobytes(), *numpy[2:]), random.getstate()


def _write_generators(value: tuple) -> None:
    cpu, cuda, numpy, python = value
    with torch.device("cpu"):
        torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
        if cuda:
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(cuda), dtype=torch.uint8))
    np.random.set_state((numpy[0], np.frombuffer(numpy[1], np.uint32), *numpy[2:]))  # noqa: NPY002
    random.setstate(python)


def _folder() -> str:
    with suppress(OSError):
        return os.getcwd()
    return ""  # it is gone


def _set_folder(path: str) -> None:
    with suppress(OSError):
        os.chdir(path)


def _write_warnings(value: tuple) -> None:
    filters, show = value
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]  # a list, whatever its stub says
    warnings.showwarning = show


_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


def _write_signals(handlers: list) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets no other thread change them, so nobody has
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        if handler is not None:  # one that was not installed from Python
            signal.signal(number, handler)


_KINDS = ("cpu", "cuda")  # of devices, as autocast knows them
_STATES: dict[str, _State] = {
    "gradients": _State(torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": _State(torch.get_default_dtype, torch.set_default_dtype),
    "default device": _State(
        torch.get_default_device,
        # With none set it is the CPU, and setting that would slow every call down.
        lambda device: torch.set_default_device(None if device == torch.device("cpu") else device),
    ),
    "threads": _State(torch.get_num_threads, torch.set_num_threads),
    "determinism": _State(
        torch.get_deterministic_debug_mode,
        lambda mode: torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1),
    ),
    "anomalies": _State(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.autograd.set_detect_anomaly(*value),
    ),
    "autocast": _together(
        *((partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind)) for kind in _KINDS),
        *((partial(torch.get_autocast_dtype, kind), partial(torch.set_autocast_dtype, kind)) for kind in _KINDS),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    ),
    "precision": _precision(),
    "cudnn": _attributes(backends.cudnn, "enabled", "benchmark", "deterministic"),
    "matmul": _attributes(
        backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ),
    "attention": _together(
        *(
            (getattr(backends.cuda, f"{kind}_sdp_enabled"), getattr(backends.cuda, f"enable_{kind}_sdp"))
            for kind in ("flash", "mem_efficient", "math", "cudnn")
        )
    ),
    "mkldnn": _attributes(backends.mkldnn, "enabled", "deterministic"),
    "denormals": _State(_flushes_denormals, torch.set_flush_denormal),
    "generators": _State(_read_generators, _write_generators),
    "folder": _State(_folder, _set_folder),
    "streams": _attributes(sys, "stdout", "stderr"),
    "warnings": _State(lambda: (list(warnings.filters), warnings.showwarning), _write_warnings),
    # A Ctrl-C in their code is to end the training as anywhere else.
    "signals": _State(lambda: [signal.getsignal(number) for number in _SIGNALS], _write_signals, theirs=False),
}
