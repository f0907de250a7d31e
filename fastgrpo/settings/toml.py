"""Reads a `TrainConfig` from TOML files and presets, and writes it; validation.py has what it may not say."""

import contextlib
import dataclasses
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union

from fastgrpo.settings.paths import expand_home, with_absolute_paths, with_homes
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import warn
from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.system.files import NoText, read_text

Command = TypeVar("Command")
_EXTENDS = "extends"
_REMOVED = ("eval.i2p.thresholds",)
"""Settings that there once were: a file that has one, such as an old run's config.toml, is read without it."""


def presets_folder() -> Path:
    """The folder that holds the presets."""
    return Path(__file__).parents[1] / "configs"


def find_preset(name: str) -> Path:
    """The TOML file of a preset's name, or of a path that ends in .toml."""
    if name.endswith(".toml"):
        path = Path(expand_home(name))
        if not path.is_file():
            raise ConfigError(f"{name}: there is no such file.")
        return path
    names = sorted(file.stem for file in presets_folder().glob("*.toml"))
    if name not in names:
        raise ConfigError(
            f"{name}: no such preset{nearest(name, names)}; there are {', '.join(names)}, or give a FILE.toml."
        )
    return presets_folder() / f"{name}.toml"


def load_toml(path: Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a config; the file that it extends, then the defaults, fill in. Raises ConfigError, which names the file.

    changes: GROUP.NAME -> a value that wins over the file's.
    """
    table: dict[str, Any] = {}
    for file, own in reversed(_chain(path)):
        try:
            _from_table(TrainConfig, own, "")
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        table = _merged(table, own)
    return with_homes(_from_table(TrainConfig, _changed(TrainConfig, table, changes), ""))


def from_settings(kind: type[Command], settings: Mapping[str, Any] | None, **given: Any) -> Command:
    """A command's flags, from Python. settings: GROUP.NAME -> value. given: fields that are not set in this way.

    Raises ConfigError for a name or a value that there is not.
    """
    for name in settings or {}:
        if name in given:
            raise ConfigError(f"settings: {name!r} is none of them; there it is an argument or is left out.")
    table = _changed(kind, {}, settings)
    return with_homes(kind(**_fields(kind, table, ""), **given))


def _changed(kind: type, table: dict[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """The table with some fields changed, each looked at first. changes: GROUP.NAME -> value. Raises ConfigError."""
    for name, value in (changes or {}).items():
        *groups, field = name.split(".")
        change = {field: list(value) if isinstance(value, tuple) else value}
        for group in reversed(groups):
            change = {group: change}
        _fields(kind, change, "")
        table = _merged(table, change)
    return table


def load_known(path: Path) -> tuple[TrainConfig, tuple[str, ...]]:
    """A config as far as this version knows its settings, and those it does not, by name: for reading old runs.

    The defaults stand in for these. Raises ConfigError where the file is no TOML.
    """
    table: dict[str, Any] = {}
    for _, own in reversed(_chain(path)):
        table = _merged(table, own)
    unknown = tuple(_take_out_unknown(TrainConfig, table, ""))
    return _from_table(TrainConfig, table, ""), unknown


def _take_out_unknown(kind: type, table: dict[str, Any], prefix: str) -> Iterator[str]:
    """Remove what is no setting of the dataclass `kind` any more, or not of its type, and name it."""
    kinds = typing.get_type_hints(kind)
    for key, value in list(table.items()):
        own = kinds.get(key)
        if isinstance(own, type) and dataclasses.is_dataclass(own) and isinstance(value, dict):
            yield from _take_out_unknown(own, value, f"{prefix}{key}.")
            continue
        try:
            if own is None:
                raise ConfigError(f"{prefix}{key}: no such field.")
            _from_toml(own, value, key)
        except ConfigError:
            del table[key]
            yield prefix + key


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A file and those that it extends, in order, each with its own settings. Raises ConfigError."""
    found: list[tuple[Path, dict[str, Any]]] = []
    while True:
        table = _read_toml(path)
        if gone := [name for name in _REMOVED if _taken_out(table, *name.split("."))]:
            warn(f"{path}: {', '.join(gone)}: no such setting any more, so it is ignored")
        parent = table.pop(_EXTENDS, None)
        found.append((path, table))
        if parent is None:
            return found
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends = {shown(parent)}: accepted is a preset's name or a FILE.toml.")
        try:
            # A file's name is relative to the file that says it.
            following = find_preset(str(path.parent / expand_home(parent)) if parent.endswith(".toml") else parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: extends = {shown(parent)}: {error}") from error
        if any(following.resolve() == file.resolve() for file, _ in found):
            raise ConfigError(
                f"{path}: extends = {shown(parent)}: a circle; accepted is a file that does not extend this one."
            )
        path = following


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except NoText as error:
        raise ConfigError(f"{path}: cannot be read as TOML: it {error}.") from error
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}.") from error


def _taken_out(table: dict[str, Any], name: str, *inner: str) -> bool:
    """Remove an entry of a table, or of a table in it, and say whether it was there."""
    if inner:
        return isinstance(table.get(name), dict) and _taken_out(table[name], *inner)
    return table.pop(name, None) is not None


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two tables in one, where `new` wins; groups are merged entry by entry."""
    both = {key: _merged(old[key], new[key]) for key in old.keys() & new.keys() if isinstance(new[key], dict)}
    return old | new | both


def _from_table(kind: type, table: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `kind` from a TOML table; `prefix` names the table in messages."""
    return kind(**_fields(kind, table, prefix))


def _fields(kind: type, table: dict[str, Any], prefix: str) -> dict[str, Any]:
    kinds = typing.get_type_hints(kind)
    for key in table:
        if key not in kinds:
            known = [*kinds, *([] if prefix else [_EXTENDS])]
            raise ConfigError(f"{prefix}{key}: no such field{nearest(key, known)}.")
    return {key: _from_toml(kinds[key], value, prefix + key) for key, value in table.items()}


def _from_toml(kind: Any, value: Any, name: str) -> Any:
    """One TOML value as the type of its field: a group, Literal, tuple[str, ...], str, int, float or bool.

    Commands, which Python sets, have fields of several types too, and paths.
    """
    if isinstance(kind, UnionType) or typing.get_origin(kind) is Union:
        for each in typing.get_args(kind):
            with contextlib.suppress(ConfigError):
                return _from_toml(each, value, name)
    if kind is NoneType and value is None:
        return value
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _from_table(kind, value, name + ".")
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        (item, _) = typing.get_args(kind)
        if all(type(each) is (int if item is int else str) for each in value):
            return tuple(value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise ConfigError(f"{name} = {shown(value)}: accepted is {type_name(kind)}.")


def type_name(kind: Any) -> str:
    """What a field of this type accepts, for a sentence."""
    if dataclasses.is_dataclass(kind):
        return "a table"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of whole numbers" if typing.get_args(kind)[0] is int else "a list of strings"
    if isinstance(kind, UnionType) or typing.get_origin(kind) is Union:
        return " or ".join(map(type_name, typing.get_args(kind)))
    return {
        NoneType: "None",
        Path: "a path",
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }[kind]


def dump_toml(config: TrainConfig) -> str:
    """The config as TOML, every field written; `load_toml` reads back an equal config."""
    return "\n".join(_toml_lines(config, "")) + "\n"


def run_config(config: TrainConfig) -> str:
    """What a run's config.toml holds: every setting, paths being such that the file may be read from anywhere.

    Without the run's own name: its folder may be moved, and the file may be the start of another run.
    """
    return dump_toml(with_absolute_paths(dataclasses.replace(config, run="")))


def _toml_lines(group: Any, name: str) -> list[str]:
    """A group's lines, plain fields first: in TOML what follows a table's heading belongs to that table."""
    fields = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    lines = ["", f"[{name}]"] if name else []
    lines += [f"{key} = {shown(value)}" for key, value in fields.items() if not dataclasses.is_dataclass(value)]
    for key, value in fields.items():
        if dataclasses.is_dataclass(value):
            lines += _toml_lines(value, f"{name}.{key}" if name else key)
    return lines


def shown(value: Any) -> str:
    """A value in TOML's notation. JSON's string escapes are TOML's too, but for DEL, which TOML wants escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
