"""The CUDA C++ of csrc/: built on first use by nvcc into a cache folder, loaded by ctypes, called with raw pointers.

Without PyTorch's headers a build takes seconds and outlives PyTorch's versions. A CUDA runtime is linked in, so that no
library of nvcc's version has to be found at run time. Its current device is its own, so every call names the device.

The library's name in the cache folder is made of the sources, nvcc's options, which say for which devices, and nvcc's
version. It appears by an atomic rename: processes that build it at the same time end with the same file.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ARCHITECTURES = (80, 90)
"""Compute capabilities, times ten, that the sources are tested for; any 8.x does."""


class BuildError(RuntimeError):
    """The library cannot be built; the message is one line that says why."""


class LaunchError(RuntimeError):
    """A kernel was not launched."""


def sources() -> list[Path]:
    """Returns the .cu files: of the package in a wheel, of csrc/ beside kernels/ in a checkout."""
    return sorted((Path(__file__).resolve().parent.parent / "csrc").glob("*.cu"))


def architectures() -> tuple[int, ...]:
    """Returns what to build for: the compute capabilities of the devices here that csrc is for, or `ARCHITECTURES`."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(sorted(10 * major + minor for major, minor in found if _is_for(major, minor))) or ARCHITECTURES


def options() -> list[str]:
    """Returns what nvcc is told beside the files' names."""
    codes = [word for a in architectures() for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    return ["-shared", "-cudart", "static", "-Xcompiler", "-fPIC", "-O3", "-std=c++17", *codes]


@functools.cache
def available() -> str | None:
    """Loads the library, built if need be. Returns None if it is for this machine's GPU, else why not, in a line."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if not _is_for(major, minor):
        return f"csrc is for compute capability 8.x and 9.0, this device has {major}.{minor}"
    try:
        _library()
    except (BuildError, OSError) as error:
        return str(error)
    return None


def build() -> Path:
    """Returns the shared library's path, after building it unless it is there. Raises BuildError."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc is not on the PATH")
    if not sources():
        raise BuildError("csrc is not installed")
    library = cache_folder() / f"{_name(nvcc)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # In the cache folder itself: a rename is atomic within a file system.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [nvcc, *options(), "-o", str(made), *map(str, sources())]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                lines = (done.stderr + done.stdout).strip().splitlines()
                message = next((line for line in lines if "error" in line), f"exit status {done.returncode}")
                raise BuildError(f"nvcc failed: {message}")
            os.replace(made, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"csrc could not be built in {library.parent}: {error}") from error
    return library


def cache_folder() -> Path:
    """Returns $FASTGRPO_CACHE, or `fastgrpo` in $XDG_CACHE_HOME or ~/.cache. RuntimeError: no home folder."""
    if own := os.environ.get("FASTGRPO_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgrpo"


def call(function: str, device: torch.device, *arguments: Tensor | int | float | None) -> None:
    """Calls an `extern "C"` function with these arguments, the device's index, and the device's current stream.

    Tensors go as pointers, None as a null pointer, bool and int as int64, float as float. Raises LaunchError unless the
    function returns 0, a CUDA error code otherwise.
    """
    library = _library()
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        code = getattr(library, function)(*map(as_c, (*arguments, device.index)), stream)
    if code != 0:
        raise LaunchError(f"{function} failed with CUDA error {code}: {library.fastgrpo_error(code).decode()}")


def as_c(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    """Returns an argument as a C function takes it."""
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    library.fastgrpo_error.restype = ctypes.c_char_p
    return library


def _is_for(major: int, minor: int) -> bool:
    return major == 8 or (major, minor) == (9, 0)


def _name(nvcc: str) -> str:
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [repr(options()).encode(), *(source.read_bytes() for source in sources()), version.encode()]
    return f"fastgrpo-sm{'-'.join(map(str, architectures()))}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
