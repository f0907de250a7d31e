"""Files of weights: safetensors, and torch's own read with weights_only, so that nothing in them is executed.

A file is read as what its name says. Where its first bytes say otherwise it is refused for what it is: a download often
leaves a web page or a Git LFS pointer in the place of weights, and the readers' own errors do not say so.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgrpo.system.errors import ConfigError

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

_PAGE = "a web page, not weights; download the file itself"
# How files begin that are no weights, whatever their name, and what they are.
_NOT_WEIGHTS = {
    **dict.fromkeys((b"<!doctype", b"<html", b"<?xml", b"<head"), _PAGE),
    **dict.fromkeys((b"{", b"["), "a text in JSON, not weights; download the file itself"),
    b"\x1f\x8b": "an archive (gzip); unpack it",
    b"Rar!": "an archive (RAR); unpack it",
    b"7z\xbc\xaf": "an archive (7-Zip); unpack it",
    b"\xfd7zXZ": "an archive (xz); unpack it",
    b"GGUF": "a GGUF file; safetensors are accepted",
}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library


def wrong_content(path: Path) -> str:
    """What a file is instead of the weights its name promises, and what to do; empty for weights. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file; download it again"
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= _LARGEST_HEADER:
        right = path.suffix == SAFETENSORS
        return "" if right else f"a safetensors file under another name; name it {path.stem}{SAFETENSORS}"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"\nsize (\d+)", start)
        stands = f" of {int(size[1]):,} bytes" if size else ""
        return f"the Git LFS pointer to a file{stands}, not the file; `git lfs pull` fetches it"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in _NOT_WEIGHTS.items():
        if start.startswith(beginning) or text.startswith(beginning):
            return what
    if path.suffix == SAFETENSORS and start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            "a torch file (a pickle) under the name of safetensors; convert it, or name it .ckpt where that is accepted"
        )
    return ""


def check_content(path: Path, field: str) -> None:
    """Raise ConfigError for a file with `wrong_content`, or none. field: the setting that names it."""
    try:
        wrong = wrong_content(path)
    except OSError as error:
        raise ConfigError(f"{field} is {str(path)!r}, which cannot be read ({error.strerror}).") from error
    if wrong:
        raise ConfigError(f"{field} is {str(path)!r}, {wrong}.")


def tensor_shapes(path: Path, field: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a file, without reading their contents.

    field: the setting that names it. Raises ConfigError for a file that cannot be read without executing what is in it.
    """
    if path.suffix != SAFETENSORS:
        return {name: tuple(tensor.shape) for name, tensor in torch_tensors(torch_content(path, field)).items()}
    with _opened(path, field) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensors(path: Path, field: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors with these names, in the file's precision. Raises ConfigError as `tensor_shapes`."""
    if path.suffix != SAFETENSORS:
        tensors = torch_tensors(torch_content(path, field))
        return {name: tensors[name] for name in names}
    with _opened(path, field) as file:
        return {name: file.get_tensor(name) for name in names}


def read_metadata(path: Path, field: str) -> dict[str, str]:
    """The metadata of a safetensors file; none for other files. Raises ConfigError as `tensor_shapes`."""
    if path.suffix != SAFETENSORS:
        return {}
    with _opened(path, field) as file:
        return dict(file.metadata() or {})


def torch_content(path: Path, field: str) -> Any:
    """Load what a torch file holds. Where the format allows, tensors are mapped into memory and read when used.

    Raises ConfigError for a file that cannot be read without executing what is in it.
    """
    check_content(path, field)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what then fails
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what is no torch file fails in every way
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error):
            raise ConfigError(
                f"{field} is {str(path)!r}, which holds more than tensors and would have to be executed to be read; "
                "the same model as .safetensors is accepted."
            ) from error
        # Of an UnpicklingError torch only says how to execute it all the same.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({' '.join(str(error).split())[:200]})"
        raise ConfigError(
            f"{field} is {str(path)!r}, which is not a whole torch file{reason}; download or write it again."
        ) from error


def torch_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a torch file by name: its own, or those of its `state_dict`, `unet` or `model`."""
    if not isinstance(content, Mapping):
        return {}
    for name in ("state_dict", "unet", "model"):
        if isinstance(content.get(name), Mapping):
            return torch_tensors(content[name])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _opened(path: Path, field: str) -> Any:
    check_content(path, field)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{field} is {str(path)!r}, which is not a whole safetensors file ({error}); download or write it again."
        ) from error
