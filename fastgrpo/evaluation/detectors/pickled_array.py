"""Reads one numpy array out of a pickle without running anything in it: Q16's prompts.p is such a file.

Unpickling calls whatever a file names. Here a file's calls only leave a description of what it would have called, and
the array is made where that description matches an array's in every part.
"""

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fastgrpo.system.errors import ConfigError

LARGEST = 1 << 20  # bytes of the largest file that is read; Q16's prompts take 3,231


@dataclass(eq=False)
class _Call:
    """What a file would have called with which arguments, and the state it would then have set."""

    function: "_Name"
    arguments: tuple
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name(NamedTuple):
    """What a file calls `module.name`; only the name, never the thing."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self, arguments)


_NDARRAY, _DTYPE, _ENCODE = _Name("numpy", "ndarray"), _Name("numpy", "dtype"), _Name("_codecs", "encode")
# numpy 2 renamed numpy.core; protocol 5 has another constructor.
_RECONSTRUCT = {_Name(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")}
_FROMBUFFER = {_Name(module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")}
_NAMES = {_NDARRAY, _DTYPE, _ENCODE, *_RECONSTRUCT, *_FROMBUFFER}
_CODES = ("f2", "f4", "f8")


class _Reader(pickle._Unpickler):
    """Puts a name in the place of whatever a file names: what it calls, builds or sets the state of is then inert.

    pickle's own in Python: the one in C takes memory for as many places as a file claims.
    """

    def find_class(self, module: str, name: str) -> _Name:
        if _Name(module, name) not in _NAMES:
            raise ValueError(f"it names {module[:60]}.{name[:60]}")
        return _Name(module, name)


def read_pickled_array(path: Path, field: str = "q16.prompts") -> np.ndarray:
    """The array of floats that a pickle of protocol 0 to 5 holds, in memory of its own.

    field: what messages call the setting. Raises ConfigError for a file of more than LARGEST bytes, and for one that
    cannot be read or holds anything else; nothing of it has run then.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        return _array(_Reader(io.BytesIO(data)).load())
    except Exception as error:  # a damaged pickle fails in every way, and few of these errors tell how
        known = isinstance(error, ValueError | OSError)
        reason = " ".join(str(error).split())[:200] if known else "it is damaged"
        raise ConfigError(
            f"{field}: {str(path)!r} is not a pickled numpy array of floats and nothing else: {reason}; nothing in it "
            "was run."
        ) from error


def _array(described: Any) -> np.ndarray:
    match described:
        # numpy._core.multiarray._reconstruct(ndarray, (0,), b"b"), then state: version, shape, dtype, order, bytes
        case _Call(_Name() as made, (kind, (0,), code), (1, shape, dtype, fortran, content)) if made in _RECONSTRUCT:
            if kind == _NDARRAY and _bytes(code) == b"b" and isinstance(fortran, int):
                return _filled(_bytes(content), _dtype(dtype), shape, "F" if fortran else "C")
        # numpy._core.numeric._frombuffer(bytes, dtype, shape, order)
        case _Call(_Name() as made, (content, dtype, shape, ("C" | "F") as order), None) if made in _FROMBUFFER:
            return _filled(_bytes(content), _dtype(dtype), shape, order)
    raise ValueError("it describes something else")


def _bytes(value: Any) -> bytes:
    """Bytes as they are, or as protocols 0 to 2 have them: _codecs.encode(text, "latin1")."""
    match value:
        case bytes() | bytearray():
            return bytes(value)
        case _Call(function, (str() as text, "latin1"), None) if function == _ENCODE:
            return text.encode("latin1")
    raise ValueError("its content is not bytes")


def _dtype(value: Any) -> np.dtype:
    """dtype("f2", False, True) with the state (3, "<", ...); older versions of numpy wrote 0 and 1 for the two."""
    match value:
        case _Call(function, (str() as code, 0, 1), (3, ("<" | ">") as order, None, None, None, -1, -1, 0)):
            # That is: no subarray, no fields, default size and alignment, no flags.
            if function == _DTYPE and code in _CODES:
                return np.dtype(order + code)
    raise ValueError("its elements are not plain floats")


def _filled(content: bytes, dtype: np.dtype, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(side) is int and side > 0 for side in shape):
        raise ValueError("its shape is not up to eight whole numbers above 0")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"it has {len(content)} bytes for the shape {shape}")
    # In the machine's byte order, since torch knows no other.
    return np.frombuffer(content, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="), order="C")
