"""Global state of the process, kept apart: what the user's code sets of it holds for that code alone.

A reward's file may turn gradients off, change the default dtype, seed every generator or move to another folder, on import or
in a call, and the next import or call finds all that as it was left; training, whose numbers depend on it, never does.
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
from typing import Any

import numpy as np
import torch
from torch import backends


@dataclass(frozen=True)
class _State:
    """One piece of it. read: its value, which can be compared by ==. write: sets such a value.

    theirs: whether the user's code finds it as it left it; else it is only put back.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    theirs: bool = True


class Apart:
    """Call it for a block around code of the user's own; one object for all that shares a state."""

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
                    self._put_back(name, state, ours[name])

    def _put_back(self, name: str, state: _State, ours: Any) -> None:
        found = state.read()
        self._theirs.pop(name, None)
        if found != ours:
            if state.theirs:
                self._theirs[name] = found
            state.write(ours)


def _attributes(owner: Any, *names: str) -> _State:
    """Attributes that are read and set as such."""

    def write(values: tuple) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(owner, name, value)

    return _State(lambda: tuple(getattr(owner, name) for name in names), write)


def _set_default_device(device: torch.device) -> None:
    # With none set it is the CPU, and setting that would slow every call down.
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _read_autocast() -> tuple:
    each = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return (*each, torch.is_autocast_cache_enabled())


def _write_autocast(value: tuple) -> None:
    *each, cached = value
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), each, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(cached)


def _precisions() -> list[Any]:
    """What has an `fp32_precision`, the general before the special, which follow where they are not set themselves."""
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    return [backends, matmul, cudnn, cudnn.conv, cudnn.rnn, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _read_precision() -> tuple:
    """PyTorch has an old and a new way to say it; where the new one was used, it may refuse to read the old one."""
    old = []
    for read in (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32):
        try:
            old.append(read())
        except RuntimeError:
            old.append(None)
    return (*old, *(each.fp32_precision for each in _precisions()))


def _write_precision(value: tuple) -> None:
    matmul, tf32, *each = value
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if tf32 is not None:
        backends.cudnn.allow_tf32 = tf32
    for owner, precision in zip(_precisions(), each, strict=True):
        owner.fp32_precision = precision


def _read_attention() -> tuple[bool, ...]:
    sdp = backends.cuda
    return sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled()


def _write_attention(value: tuple[bool, ...]) -> None:
    sdp = backends.cuda
    for enable, enabled in zip(
        (sdp.enable_flash_sdp, sdp.enable_mem_efficient_sdp, sdp.enable_math_sdp, sdp.enable_cudnn_sdp),
        value,
        strict=True,
    ):
        enable(enabled)


def _flushes_denormals() -> bool:
    """PyTorch does not tell, but such a number does."""
    return (torch.full((1,), 1e-310, dtype=torch.float64, device="cpu") * 1).item() == 0


def _read_generators() -> tuple:
    """torch's, numpy's and Python's, as bytes and plain numbers."""
    cuda = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b""
    numpy = np.random.get_state()  # noqa: NPY002 (what rewards may draw from)
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
    try:
        return os.getcwd()
    except OSError:
        return ""  # it is gone


def _set_folder(path: str) -> None:
    if path:
        with suppress(OSError):
            os.chdir(path)


def _write_warnings(value: tuple) -> None:
    filters, show = value
    warnings.resetwarnings()
    warnings.filters.extend(filters)
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


_STATES: dict[str, _State] = {
    "gradients": _State(torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": _State(torch.get_default_dtype, torch.set_default_dtype),
    "default device": _State(torch.get_default_device, _set_default_device),
    "threads": _State(torch.get_num_threads, torch.set_num_threads),
    "determinism": _State(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "anomalies": _State(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.autograd.set_detect_anomaly(*value),
    ),
    "autocast": _State(_read_autocast, _write_autocast),
    "precision": _State(_read_precision, _write_precision),
    "cudnn": _attributes(backends.cudnn, "enabled", "benchmark", "deterministic"),
    "matmul": _attributes(
        backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ),
    "attention": _State(_read_attention, _write_attention),
    "mkldnn": _attributes(backends.mkldnn, "enabled", "deterministic"),
    "denormals": _State(_flushes_denormals, torch.set_flush_denormal),
    "generators": _State(_read_generators, _write_generators),
    "folder": _State(_folder, _set_folder),
    "streams": _attributes(sys, "stdout", "stderr"),
    "warnings": _State(lambda: (list(warnings.filters), warnings.showwarning), _write_warnings),
    # A Ctrl-C in their code is to end the training as anywhere else.
    "signals": _State(lambda: [signal.getsignal(number) for number in _SIGNALS], _write_signals, theirs=False),
}
