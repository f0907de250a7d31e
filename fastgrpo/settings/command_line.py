"""From the command line and TOML files to a `TrainConfig`, and back to TOML.

A flag beats the file, the file beats the dataclass's default. Nothing here loads a model or a prompt; what a config
may not say is in validation.py.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from fastgrpo._version import __version__
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.errors import ConfigError, flag, nearest
from fastgrpo.system.paths import PathText, expand_home, with_homes
from fastgrpo.system.text_files import NoText, read_text

Command = TypeVar("Command")

PROGRAM = "python -m fastgrpo.train"
DEFAULT_PRESET = "shapes"

# What a resumed run may have otherwise: none of it changes what is learned but by rounding.
_SIZES = ("iterations", "micro_batch", "rollout.batch", "rollout.decode_batch", "reward.batch")
_PRECISION = ("engine.device", "engine.dtype")  # `auto` makes the one depend on the other
_LATER = (
    "--iterations, --micro-batch, --rollout.batch, --rollout.decode-batch, --reward.batch, --engine.* (but device and "
    "dtype), --eval.* and --checkpoint.*"
)
_EXTENDS = "extends"

# How Python says it, and what to say instead.
_NO_NUMBER = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}


@dataclass(frozen=True)
class _Start:
    """Train a Stable Diffusion online with group-relative policy optimization on positive and negative prompts."""

    preset: tyro.conf.Positional[str] = DEFAULT_PRESET
    """A preset's name or a FILE.toml, which may begin with `extends = "PRESET"`; comes before the flags. Flags override it."""
    resume: PathText = ""
    """Folder of a run to continue, exactly as if it had never stopped. Only what cannot change its result may be given with it: --iterations, --micro-batch, --rollout.batch, --rollout.decode-batch, --reward.batch, --engine.* but for device and dtype, --eval.* and --checkpoint.*."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class _Resume:
    """Continue a run."""

    resume: PathText
    """Folder of the run."""


def parse_command(argv: Sequence[str]) -> tuple[TrainConfig, str, Path | None]:
    """`[PRESET | FILE.toml] [--flags]` or `--resume RUN [--flags]` -> (config, preset's name, run to resume).

    Raises ConfigError; prints and exits on --help (0) and on flags tyro refuses (2).
    """
    if any(arg.split("=")[0] == "--resume" for arg in argv) and not {"-h", "--help", "--version"} & set(argv):
        config, folder = _parse_resume(argv)
        return config, folder.name, folder
    start = parse_with_preset(_Start, argv, PROGRAM)
    return start.config, Path(start.preset).stem, None


def parse_with_preset(kind: type[Command], argv: Sequence[str], program: str) -> Command:
    """`[PRESET | FILE.toml] [--flags]` -> an instance of `kind`.

    kind: a frozen dataclass with the fields `preset` (tyro.conf.Positional[str]) and `config` (a TrainConfig whose
    fields are flags), and defaults for any others. program: what --help calls the command.
    Raises ConfigError; prints and exits on --help (0).
    """
    preset = argv[0] if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    start = parse_flags(kind, argv, program, default=kind(preset=preset, config=load_toml(find_preset(preset))))
    if start.preset != preset:
        raise ConfigError(f"{start.preset}: a preset or FILE.toml comes before the flags.")
    return start


def parse_flags(kind: type[Command], argv: Sequence[str], program: str, default: Command | None = None) -> Command:
    """Flags -> an instance of `kind`. Raises ConfigError; prints and exits on --help and --version (0)."""
    known = [*_flags(kind, ""), "--help", "--version"]
    for arg in argv:
        name = arg.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise ConfigError(f"{name}: no such flag{nearest(name, known)}; --help lists them all.")
    return with_homes(_tyro(kind, argv, program, **({} if default is None else {"default": default})))


def _tyro(kind: type, argv: Sequence[str], program: str, **options: Any) -> Any:
    """tyro.cli, its complaints made one sentence; and --version, which every command has."""
    if "--version" in argv:
        print(f"fastgrpo {__version__}")
        raise SystemExit(0)
    options["description"] = f"{inspect.getdoc(kind)}\n--version says which fastgrpo this is."
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=argv, prog=program, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # Between rules: a title, the complaint, and advice that the sentence does not need. UTF-8 has a box around them.
        lines = [line.strip(" │╭╮╰╯") for line in complaint.getvalue().splitlines()]
        text = (
            re.split("[─-]{4,}", re.sub(r"\[/?bold\]", "", " ".join(lines)))[1]
            .strip(" .╮")
            .replace(". Expected", ", expected")
        )
        for failure, accepted in _NO_NUMBER.items():
            text = re.sub(f"Error parsing (.*?): {failure}: (.*)", rf"\1 \2: accepted is {accepted}", text)
        raise ConfigError(f"{text}; --help lists every flag.") from stop


def _flags(kind: type, prefix: str) -> list[str]:
    """Names of the flags that a dataclass has on the command line, groups written as --group.name."""
    names = []
    annotated = typing.get_type_hints(kind, include_extras=True)
    for name, field_kind in typing.get_type_hints(kind).items():
        for note in getattr(annotated[name], "__metadata__", ()):
            names += getattr(note, "aliases", None) or ()
        if field_kind is TrainConfig:
            names += _flags(field_kind, "")  # not a group of its own
        elif dataclasses.is_dataclass(field_kind):
            names += _flags(field_kind, f"{prefix}{name}.".replace("_", "-"))
        else:
            names += [
                f"--{prefix}{no}{name}".replace("_", "-") for no in (("", "no-") if field_kind is bool else ("",))
            ]
    return names


def _parse_resume(argv: Sequence[str]) -> tuple[TrainConfig, Path]:
    command, flags = _tyro(_Resume, argv, PROGRAM, return_unknown_args=True)
    folder = Path(expand_home(command.resume))
    file = folder / "config.toml"
    if not file.is_file():
        raise ConfigError(f"--resume {folder}: there is no config.toml in it, so it is not a run that can go on.")
    own = load_toml(file)
    asked = parse_flags(_Start, flags, PROGRAM, default=_Start(preset="", config=own))
    changed = [asked.preset] if asked.preset else []
    changed += [flag(name) for name in changed_fields(own, asked.config) if not _may_change(name)]
    if changed:
        raise ConfigError(
            f"{changed[0]}: a resumed run keeps what decides its result; with --resume {_LATER} are accepted."
        )
    if asked.config.iterations < own.iterations:
        raise ConfigError(
            f"iterations = {asked.config.iterations}: a resumed run accepts {own.iterations}, its own, or more."
        )
    return dataclasses.replace(asked.config, run=str(folder)), folder


def changed_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Names of the fields, such as `eval.i2p.images`, in which two configs differ."""
    names = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            names += changed_fields(before, after, f"{prefix}{field.name}.")
        elif before != after:
            names.append(prefix + field.name)
    return names


def _may_change(name: str) -> bool:
    """Whether a resumed run may have another value of the field."""
    return name in _SIZES or (name.startswith(("engine.", "eval.", "checkpoint.")) and name not in _PRECISION)


def presets_folder() -> Path:
    """Where the presets lie."""
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


def load_toml(path: Path) -> TrainConfig:
    """Read a config; fields that the file leaves out keep the values of the one it extends, else the dataclass's defaults.

    Raises ConfigError, which names the file.
    """
    table: dict[str, Any] = {}
    for file, own in reversed(_chain(path)):
        try:
            _from_table(TrainConfig, own, "")
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        table = _merged(table, own)
    return with_homes(_from_table(TrainConfig, table, ""))


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file and those it extends, one after the other, each with its own settings. Raises ConfigError."""
    found: list[tuple[Path, dict[str, Any]]] = []
    while True:
        table = _read_toml(path)
        parent = table.pop(_EXTENDS, None)
        found.append((path, table))
        if parent is None:
            return found
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends = {_shown(parent)}: accepted is a preset's name or a FILE.toml.")
        try:
            # A file's name is relative to the file that says it.
            following = find_preset(str(path.parent / expand_home(parent)) if parent.endswith(".toml") else parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: extends = {_shown(parent)}: {error}") from error
        if any(following.resolve() == file.resolve() for file, _ in found):
            raise ConfigError(
                f"{path}: extends = {_shown(parent)}: a circle; accepted is a file that does not extend this one."
            )
        path = following


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except NoText as error:
        raise ConfigError(f"{path}: cannot be read as TOML: it {error}.") from error
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}.") from error


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A table's entries over another's, those of groups one by one."""
    both = {key: _merged(old[key], new[key]) for key in old.keys() & new.keys() if isinstance(new[key], dict)}
    return old | new | both


def _from_table(kind: type, table: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `kind` from a TOML table; `prefix` names the table in messages."""
    kinds = typing.get_type_hints(kind)
    for key in table:
        if key not in kinds:
            known = [*kinds, *([] if prefix else [_EXTENDS])]
            raise ConfigError(f"{prefix}{key}: no such field{nearest(key, known)}.")
    return kind(**{key: _from_toml(kinds[key], value, prefix + key) for key, value in table.items()})


def _from_toml(kind: Any, value: Any, name: str) -> Any:
    """One TOML value as the type of its field: a group, Literal, tuple[str, ...] or tuple[float, ...], str, int, float or bool."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _from_table(kind, value, name + ".")
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        with contextlib.suppress(ConfigError):
            return tuple(_from_toml(typing.get_args(kind)[0], item, name) for item in value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise ConfigError(f"{name} = {_shown(value)}: accepted is {_type_name(kind)}.")


def _type_name(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "a table"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {'strings' if typing.get_args(kind)[0] is str else 'numbers'}"
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}[kind]


def dump_toml(config: TrainConfig) -> str:
    """The config as TOML, every field written; `load_toml` reads back an equal config."""
    return "\n".join(_toml_lines(config, "")) + "\n"


def _toml_lines(group: Any, name: str) -> list[str]:
    """Plain fields first: in TOML what follows a table's heading belongs to that table."""
    fields = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    lines = ["", f"[{name}]"] if name else []
    lines += [f"{key} = {_shown(value)}" for key, value in fields.items() if not dataclasses.is_dataclass(value)]
    for key, value in fields.items():
        if dataclasses.is_dataclass(value):
            lines += _toml_lines(value, f"{name}.{key}" if name else key)
    return lines


def _shown(value: Any) -> str:
    """A value in TOML's notation. JSON's string escapes are TOML's too, but for DEL, which TOML wants escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
