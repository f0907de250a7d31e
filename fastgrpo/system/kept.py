"""Tensors that are made once and kept: STEM.safetensors beside STEM.json, which says what they were made by.

STEM.json is an object with `sha256`, of STEM.safetensors; `made_by`, all that decides the tensors; and what else the
maker notes. It is written last: with other tensors beside it than its own, a kill in between, it is found out.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fastgrpo.system.files import write_all_atomically


@dataclass(frozen=True)
class Kept:
    """Tensors by name, on the CPU, and the notes beside them: all of the JSON file."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def kept_files(stem: Path) -> tuple[Path, Path]:
    """STEM.safetensors and STEM.json."""
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def read_kept(stem: Path) -> Kept | None:
    """What is kept there, None where nothing is. Raises ValueError for files that are damaged."""
    file, notes_file = kept_files(stem)
    try:
        notes, data = json.loads(notes_file.read_bytes()), file.read_bytes()
    except FileNotFoundError:
        return None
    if not isinstance(notes, dict) or notes.get("sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{notes_file} is not of the tensors in {file.name}")
    return Kept(load(data), notes)


def reusable(stem: Path, made_by: Mapping[str, Any], what: str, say: Callable[[str], object]) -> Kept | None:
    """What is kept there if it was made by the same, JSON-able; else None, and where there is a reason it is said.

    what: the tensors in words, for that sentence.
    """
    try:
        kept = read_kept(stem)
    except ValueError as error:
        say(f"warning: {what}: damaged ({error}), so made anew")
        return None
    if kept is None:
        return None
    before = kept.notes.get("made_by")
    before = before if isinstance(before, dict) else {}
    if changed := [name for name, value in made_by.items() if before.get(name) != value]:
        say(f"{what}: made anew, since this is not as before: {', '.join(changed)}")
        return None
    return kept


def keep(stem: Path, made_by: Mapping[str, Any], tensors: Mapping[str, Tensor], **notes: Any) -> Kept:
    """Write both files and return what they hold. Raises OSError where they cannot be written."""
    file, notes_file = kept_files(stem)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    written = {"sha256": hashlib.sha256(data).hexdigest(), "made_by": dict(made_by), **notes}
    text = json.dumps(written, indent=1, ensure_ascii=False)
    write_all_atomically({file: data, notes_file: f"{text}\n".encode()})
    return Kept(load(data), written)
