"""From the command line to a `TrainConfig` or another command's dataclass: flags beat the file, the file defaults."""

import contextlib
import dataclasses
import inspect
import io
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from fastgrpo._version import __version__
from fastgrpo.settings.common import COMMON, only_common
from fastgrpo.settings.paths import PathText, expand_home, with_homes
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.errors import ConfigError, flag, nearest
from fastgrpo.system.shared_run import PREFIX, fetch_run

PROGRAM = "python -m fastgrpo.train"
DEFAULT_PRESET = "shapes"

# What a resumed run may have otherwise: none of it changes what is learned but by rounding.
_SIZES = ("iterations", "micro_batch", "rollout.batch", "rollout.decode_batch", "reward.batch")
_PLACES = ("reward.service.",)  # a server that is gone may be another one then
_PRECISION = ("engine.device", "engine.dtype")  # `auto` makes the one depend on the other
_LATER = (
    "--iterations, --micro-batch, --rollout.batch, --rollout.decode-batch, --reward.batch, --reward.service.*, "
    "--engine.* (but device and dtype), --guard.* (but action adapt), --eval.*, --checkpoint.* and --log.*"
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

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")] = DEFAULT_PRESET
    """A preset's name or a FILE.toml, which may begin with `extends = "PRESET"`. It comes before the flags.
    Flags override it."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Start(WithPreset):
    """Train a Stable Diffusion online with group-relative policy optimization on positive and negative prompts."""

    resume: PathText = ""
    """Folder of a run to continue, exactly as if it had never stopped, or `hf:OWNER/NAME`, where export has pushed one:
    it is downloaded to runs/NAME. Other flags must not change its result:
    --iterations, --micro-batch, --rollout.batch, --rollout.decode-batch, --reward.batch, --reward.service.*,
    --engine.* but for device and dtype, --guard.* but for action adapt, --eval.*, --checkpoint.* and --log.*."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Load and check everything, say what would be drawn and learned and what memory it takes, and stop there.
    Nothing is trained, and the run's folder is not made."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print all settings as they would apply, as TOML that can be given back as FILE.toml, and do nothing else."""


@dataclass(frozen=True)
class _Resume:
    """Continue a run."""

    resume: PathText
    """Folder of the run, or `hf:OWNER/NAME`."""


class Asked(NamedTuple):
    """What a command line asks training for. preset: its name. resumed: the folder of the run to go on with.

    instead: what is to be done in place of training.
    """

    config: TrainConfig
    preset: str
    resumed: Path | None
    instead: Literal["", "dry-run", "print-config"]


_HELP, _HELP_ALL, _VERSION = {"-h", "--help"}, "--help-all", "--version"
Command = TypeVar("Command")
Preset = TypeVar("Preset", bound=WithPreset)


def parse_command(argv: Sequence[str], program: str = PROGRAM) -> Asked:
    """`[PRESET | FILE.toml] [--flags]` or `--resume RUN [--flags]`, as training takes them.

    program: what --help calls the command. Raises ConfigError; prints and exits on --help and --version (0).
    """
    if any(arg.split("=")[0] == "--resume" for arg in argv) and not {*_HELP, _HELP_ALL, _VERSION} & set(argv):
        start, folder = _parse_resume(argv, program)
        return Asked(start.config, folder.name, folder, _instead(start))
    start = parse_with_preset(Start, argv, program)
    return Asked(start.config, Path(start.preset).stem, None, _instead(start))


def _instead(start: Start) -> Literal["", "dry-run", "print-config"]:
    if start.dry_run and start.print_config:
        raise ConfigError("--print-config: it does nothing else; accepted is it or --dry-run, one at a time.")
    return "dry-run" if start.dry_run else "print-config" if start.print_config else ""


def parse_with_preset(kind: type[Preset], argv: Sequence[str], program: str) -> Preset:
    """`[PRESET | FILE.toml] [--flags]` -> an instance of `kind`, all fields of which have defaults.

    program: what --help calls the command. Raises ConfigError; prints and exits on --help and --version (0).
    """
    preset = argv[0] if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    start = parse_flags(kind, argv, program, default=kind(preset=preset, config=load_toml(find_preset(preset))))
    if start.preset != preset:
        raise ConfigError(f"{start.preset}: a preset or FILE.toml comes before the flags.")
    return start


def parse_flags(kind: type[Command], argv: Sequence[str], program: str, default: Command | None = None) -> Command:
    """Flags -> an instance of `kind`. Raises ConfigError; prints and exits on --help and --version (0)."""
    known = [*flags_of(kind), "--help", _VERSION, *([_HELP_ALL] if issubclass(kind, WithPreset) else [])]
    for arg in argv:
        name = arg.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise ConfigError(f"{name}: no such flag{nearest(name, known)}; --help lists them all.")
    return with_homes(_tyro(kind, argv, program, default))


def _tyro(kind: type, argv: Sequence[str], program: str, default: Any = None, **options: Any) -> Any:
    """Call tyro.cli, turn its complaints into one sentence, and answer --version, which every command has.

    --help explains the settings of training that people set most, and --help-all all of them.
    """
    if _VERSION in argv:
        print(f"fastgrpo {__version__}")
        raise SystemExit(0)
    more, described = f"{_VERSION} says which fastgrpo this is.", inspect.getdoc(kind)
    if issubclass(kind, WithPreset) and _HELP_ALL in argv:
        argv = ["--help"]
    elif issubclass(kind, WithPreset) and _HELP & set(argv):
        few, all_of_them = len(COMMON), len(list(_fields_of(TrainConfig)))
        more = f"{few} of {all_of_them} settings are listed here; {_HELP_ALL} lists them all. {more}"
        default = only_common(default)
        kind = type(default)
    options |= {"description": f"{described}\n{more}"} | ({} if default is None else {"default": default})
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
    for name, field_kind, notes in _fields_of(kind, prefix):
        for note in notes:
            names += getattr(note, "aliases", None) or ()
        group, dot, field = name.rpartition(".")
        pair = field_kind is bool and tyro.conf.FlagCreatePairsOff not in notes
        names += [flag(f"{group}{dot}{no}{field}") for no in (("", "no_") if pair else ("",))]
    return names


def _fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name as in group.name, type, what annotates it) of each field of a dataclass and of its groups."""
    annotated = typing.get_type_hints(kind, include_extras=True)
    for name, field_kind in typing.get_type_hints(kind).items():
        if field_kind is TrainConfig:
            yield from _fields_of(TrainConfig)  # not a group of its own
        elif dataclasses.is_dataclass(field_kind):
            yield from _fields_of(typing.cast(type, field_kind), f"{prefix}{name}.")
        else:
            yield prefix + name, field_kind, getattr(annotated[name], "__metadata__", ())


def _parse_resume(argv: Sequence[str], program: str) -> tuple[Start, Path]:
    command, flags = _tyro(_Resume, argv, program, return_unknown_args=True)
    shared = command.resume.startswith(PREFIX)
    folder = fetch_run(command.resume, "--resume ") if shared else Path(expand_home(command.resume))
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume {folder}: there is no config.toml in it, so it is not a run that can go on.")
    own = load_toml(folder / "config.toml")
    if shared and (called := [each for each in own.reward.terms if ":" in each and not each.startswith("safety:")]):
        # Python on this machine, or a server, that somebody else has chosen: not without its user's word.
        raise ConfigError(
            f"--resume {command.resume}: its reward calls {', '.join(called)}; read {folder / 'config.toml'}, then "
            f"--resume {folder} goes on."
        )
    asked = parse_flags(Start, flags, program, default=Start(preset="", config=own))
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
    return dataclasses.replace(asked, config=dataclasses.replace(asked.config, run=str(folder))), folder


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
    groups = ("engine.", "eval.", "checkpoint.", "log.", *_PLACES, *([] if adapts else ["guard."]))
    return name in _SIZES or (name.startswith(groups) and name not in _PRECISION)
