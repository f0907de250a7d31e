"""Settings that may name files, and the home folder in them.

A shell makes a path of `~/model` where it stands alone, but neither in `--run=~/runs/a` and `ViT-H-14:~/hps.pt` nor, of
course, in a TOML file. So whatever is read from a command line or a file is read with `with_homes`.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

Settings = TypeVar("Settings")
Change = Callable[[str], str]

_MAY_NAME_A_FILE = "may name a file"
PathText = Annotated[str, _MAY_NAME_A_FILE]
"""A path, or a notation with one first or after a colon: ARCHITECTURE:FILE, FILE.py:FUNCTION, local-dir:FOLDER,
transformers:FOLDER."""
PathTexts = Annotated[tuple[str, ...], _MAY_NAME_A_FILE]
"""Several of them."""

NAMES = frozenset(("shapes", "shapes-held-out", "geneval", "unsafe", "hpsv2", "compact", "scaled", "unsafe-only"))
"""Values of such a setting that name no file, whatever lies in the working directory."""
_HUB, _FOLDER, _TRANSFORMERS = ("hf:", "hf-hub:"), "local-dir:", "transformers:"


def expand_home(text: str) -> str:
    """Replace `~` or `~user`, at the beginning or after a colon, by the home folder, where there is such a user."""
    return re.sub(r"(?:^|(?<=:))~[\w.-]*(?=[/:]|$)", lambda found: os.path.expanduser(found[0]), text)


def absolute(text: str) -> str:
    """Make a name of something on this machine a path that holds from any folder; leave other names alone."""
    if text in NAMES or text.startswith(_HUB):
        return text
    if text.startswith(_FOLDER):
        return _FOLDER + os.path.abspath(text.removeprefix(_FOLDER))
    if text.startswith(_TRANSFORMERS):
        return _TRANSFORMERS + absolute(text.removeprefix(_TRANSFORMERS))
    if os.path.exists(text):
        return os.path.abspath(text)
    head, colon, tail = text.partition(":")
    if ("." in tail or "/" in tail) and os.path.isfile(tail):  # ARCHITECTURE:FILE; a word alone is a tag of it
        return f"{head}:{os.path.abspath(tail)}"
    return f"{os.path.abspath(head)}:{tail}" if colon and os.path.exists(head) else text


def absolute_place(text: str) -> str:
    """The same for FILE.py:FUNCTION, where a word before the colon names a module and no folder."""
    file, _, function = text.rpartition(":")
    return f"{os.path.abspath(file)}:{function}" if file.endswith(".py") else text


def without_folder(text: str) -> str:
    """Leave of a path its last part, also after a colon; leave other names alone. For what others are to read."""
    return re.sub(r"(?:^|(?<=[:=]))[~/][^:]*?([^/:]+)/*(?=:|$)", r"\1", text)


def with_homes(settings: Settings) -> Settings:
    """The same dataclass with `expand_home` applied to all Path, PathText and PathTexts in it and in its groups."""
    return _with(settings, expand_home, expand_home)


def with_absolute_paths(settings: Settings) -> Settings:
    """The same with `absolute`, and `absolute_place` for PathTexts: a file that holds them may be read elsewhere."""
    return _with(settings, absolute, absolute_place)


def without_folders(settings: Settings) -> Settings:
    """The same with `without_folder`."""
    return _with(settings, without_folder, without_folder)


def _with(settings: Settings, text: Change, texts: Change) -> Settings:
    """Apply `text` to every Path and PathText, and `texts` to each of the PathTexts."""
    kinds = typing.get_type_hints(type(settings), include_extras=True)
    values = {}
    for name, kind in kinds.items():
        may_name_a_file = _MAY_NAME_A_FILE in getattr(kind, "__metadata__", ())
        values[name] = _changed(getattr(settings, name), may_name_a_file, text, texts)
    changed = dataclasses.replace(cast(Any, settings), **values)  # any frozen dataclass: Python has no type
    return cast(Settings, changed)


def _changed(value: Any, may_name_a_file: bool, text: Change, texts: Change) -> Any:
    if dataclasses.is_dataclass(value):
        return _with(value, text, texts)
    if isinstance(value, tuple):
        return tuple(_changed(each, may_name_a_file, texts, texts) for each in value)
    if isinstance(value, Path):
        return Path(text(str(value)))
    return text(value) if may_name_a_file and isinstance(value, str) else value
