"""Settings that may name files, and the home folder in them.

A shell makes a path of `~/model` where it stands alone, but neither in `--run=~/runs/a` and `ViT-H-14:~/hps.pt` nor, of
course, in a TOML file. So whatever is read from a command line or a file is read with `with_homes`.
"""

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

Settings = TypeVar("Settings")

_MAY_NAME_A_FILE = "may name a file"
PathText = Annotated[str, _MAY_NAME_A_FILE]
"""A path, or a notation with one at its beginning or after a colon: ARCHITECTURE:FILE, FILE.py:FUNCTION, local-dir:FOLDER."""
PathTexts = Annotated[tuple[str, ...], _MAY_NAME_A_FILE]
"""Several of them."""


def expand_home(text: str) -> str:
    """`~` or `~user`, at the beginning or after a colon, as that home folder; as it is where there is no such user."""
    return re.sub(r"(?:^|(?<=:))~[\w.-]*(?=[/:]|$)", lambda found: os.path.expanduser(found[0]), text)


def with_homes(settings: Settings) -> Settings:
    """The same dataclass, `expand_home` applied to its fields of type Path, PathText and PathTexts and those of its groups."""
    kinds = typing.get_type_hints(type(settings), include_extras=True)
    return dataclasses.replace(
        settings,
        **{name: _expanded(getattr(settings, name), _may_name_a_file(kind)) for name, kind in kinds.items()},
    )


def _expanded(value: Any, may_name_a_file: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return with_homes(value)
    if isinstance(value, tuple):
        return tuple(_expanded(each, may_name_a_file) for each in value)
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return expand_home(value) if may_name_a_file and isinstance(value, str) else value


def _may_name_a_file(kind: Any) -> bool:
    return _MAY_NAME_A_FILE in getattr(kind, "__metadata__", ())
