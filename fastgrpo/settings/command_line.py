"""From the command line to a `TrainConfig` or another command's dataclass: flags beat the file, the file defaults."""

import contextlib
import dataclasses
import inspect
import io
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastgrpo._version import __version__
from fastgrpo.settings.paths import PathText, expand_home, with_homes
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.errors import ConfigError, flag, nearest

PROGRAM = "python -m fastgrpo.train"
DEFAULT_PRESET = "shapes"

# What a resumed run may have otherwise: none of it changes what is learned but by rounding.
_SIZES = ("iterations", "micro_batch", "rollout.batch", "rollout.decode_batch", "reward.batch")
_PRECISION = ("engine.device", "engine.dtype")  # `auto` makes the one depend on the other
_LATER = (
    "--iterations, --micro-batch, --rollout.batch, --rollout.decode-batch, --reward.batch, --engine.* (but device and "
    "dtype), --guard.* (but action adapt), --eval.* and --checkpoint.*"
)

# How Python says it, and what to say instead.
_NO_NUMBER = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}
_NO_TYPE = r"Error parsing (--\S+): no type matching (\S+) could be instantiated from \['(.*?)'\].*"


@dataclass(frozen=True)
class WithPreset:
    """The flags of a command that takes all settings of training."""

    preset: tyro.conf.Positional[str] = DEFAULT_PRESET
    """A preset's name or a FILE.toml, which may begin with `extends = "PRESET"`. It comes before the flags.
    Flags override it."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class _Start(WithPreset):
    """Train a Stable Diffusion online with group-relative policy optimization on positive and negative prompts."""

    resume: PathText = ""
    """Folder of a run to continue, exactly as if it had never stopped. Other flags must not change its result:
    --iterations, --micro-batch, --rollout.batch, --rollout.decode-batch, --reward.batch,
    --engine.* but for device and dtype, --guard.* but for action adapt, --eval.* and --checkpoint.*."""


@dataclass(frozen=True)
class _Resume:
    """Continue a run."""

    resume: PathText
    """Folder of the run."""


Command = TypeVar("Command")
Preset = TypeVar("Preset", bound=WithPreset)


def parse_command(argv: Sequence[str]) -> tuple[TrainConfig, str, Path | None]:
    """`[PRESET | FILE.toml] [--flags]` or `--resume RUN [--flags]` -> (config, preset's name, run to resume).

    Raises ConfigError; prints and exits on --help (0) and on flags tyro refuses (2).
    """
    if any(arg.split("=")[0] == "--resume" for arg in argv) and not {"-h", "--help", "--version"} & set(argv):
        config, folder = _parse_resume(argv)
        return config, folder.name, folder
    start = parse_with_preset(_Start, argv, PROGRAM)
    return start.config, Path(start.preset).stem, None


def parse_with_preset(kind: type[Preset], argv: Sequence[str], program: str) -> Preset:
    """`[PRESET | FILE.toml] [--flags]` -> an instance of `kind`, all fields of which have defaults.

    program: what --help calls the command. Raises ConfigError; prints and exits on --help (0).
    """
    preset = argv[0] if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    start = parse_flags(kind, argv, program, default=kind(preset=preset, config=load_toml(find_preset(preset))))
    if start.preset != preset:
        raise ConfigError(f"{start.preset}: a preset or FILE.toml comes before the flags.")
    return start


def parse_flags(kind: type[Command], argv: Sequence[str], program: str, default: Command | None = None) -> Command:
    """Flags -> an instance of `kind`. Raises ConfigError; prints and exits on --help and --version (0)."""
    known = [*flags_of(kind), "--help", "--version"]
    for arg in argv:
        name = arg.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise ConfigError(f"{name}: no such flag{nearest(name, known)}; --help lists them all.")
    return with_homes(_tyro(kind, argv, program, **({} if default is None else {"default": default})))


def _tyro(kind: type, argv: Sequence[str], program: str, **options: Any) -> Any:
    """Call tyro.cli, turn its complaints into one sentence, and answer --version, which every command has."""
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
        # Between rules, in a box where there is UTF-8: a title, the complaint, and advice that is not needed here.
        lines = " ".join(line.strip(" │╭╮╰╯") for line in complaint.getvalue().splitlines())
        text = re.split("[─-]{4,}", re.sub(r"\[/?bold\]", "", lines))[1]
        text = text.strip(" .╮").replace(". Expected", ", expected")
        text = re.sub(_NO_TYPE, _no_type, text)
        for failure, accepted in _NO_NUMBER.items():
            text = re.sub(f"Error parsing (.*?): {failure}: (.*)", rf"\1 \2: accepted is {accepted}", text)
        raise ConfigError(f"{text}; --help lists every flag.") from stop


def _no_type(found: re.Match[str]) -> str:
    """Of a flag that takes values of several kinds, such as INT|{latest,best}."""
    name, kinds, value = found.groups()
    words = re.findall(r"[^|{},]+", kinds)
    accepted = {"INT": "a whole number", "FLOAT": "a number"}
    return f"{name} {value}: accepted is {', '.join(accepted.get(word, word) for word in words)}"


def flags_of(kind: type, prefix: str = "") -> list[str]:
    """Names of the flags that a dataclass has on the command line, groups written as --group.name."""
    names: list[str] = []
    annotated = typing.get_type_hints(kind, include_extras=True)
    for name, field_kind in typing.get_type_hints(kind).items():
        for note in getattr(annotated[name], "__metadata__", ()):
            names += getattr(note, "aliases", None) or ()
        if field_kind is TrainConfig:
            names += flags_of(TrainConfig)  # not a group of its own
        elif dataclasses.is_dataclass(field_kind):
            names += flags_of(typing.cast(type, field_kind), f"{prefix}{name}.")
        else:
            names += [flag(f"{prefix}{no}{name}") for no in (("", "no_") if field_kind is bool else ("",))]
    return names


def _parse_resume(argv: Sequence[str]) -> tuple[TrainConfig, Path]:
    command, flags = _tyro(_Resume, argv, PROGRAM, return_unknown_args=True)
    folder = Path(expand_home(command.resume))
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume {folder}: there is no config.toml in it, so it is not a run that can go on.")
    own = load_toml(folder / "config.toml")
    asked = parse_flags(_Start, flags, PROGRAM, default=_Start(preset="", config=own))
    changed = [asked.preset] if asked.preset else []
    adapts = "adapt" in (own.guard.action, asked.config.guard.action)
    changed += [flag(name) for name in changed_fields(own, asked.config) if not _may_change(name, adapts)]
    if changed:
        raise ConfigError(
            f"{changed[0]}: a resumed run keeps what decides its result; with --resume {_LATER} are accepted."
        )
    if asked.config.iterations < own.iterations:
        accepted = f"a resumed run accepts {own.iterations}, its own, or more"
        raise ConfigError.of("iterations", asked.config.iterations, accepted)
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


def _may_change(name: str, adapts: bool) -> bool:
    """Whether a resumed run may have another value of the field. adapts: whether the guard changes what is learned."""
    groups = ("engine.", "eval.", "checkpoint.", *([] if adapts else ["guard."]))
    return name in _SIZES or (name.startswith(groups) and name not in _PRECISION)
