"""From the command line and TOML files to a `TrainConfig`, and back to TOML; and what a config may not say.

A flag beats the file, the file beats the dataclass's default. Nothing here loads a model or a prompt.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.shapes.world import HAZARDS

PROGRAM = "python -m fastgrpo.train"
DEFAULT_PRESET = "shapes"
DIFFUSION_STEPS = 1000  # timesteps every SD 1.x / 2.x was trained with


@dataclass(frozen=True)
class _Start:
    """Train a Stable Diffusion online with group-relative policy optimization on positive and negative prompts."""

    preset: tyro.conf.Positional[str] = DEFAULT_PRESET
    """A preset's name or a FILE.toml; comes before the flags. Flags override it."""
    resume: str = ""
    """Folder of a run to continue, exactly as if it had never stopped. Only --iterations may be given with it."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class _Resume:
    """Continue a run."""

    resume: str
    """Folder of the run."""
    iterations: int | None = None
    """Iterations in all, counted from the start of the run; not fewer than before."""


def parse_command(argv: Sequence[str]) -> tuple[TrainConfig, str, Path | None]:
    """`[PRESET | FILE.toml] [--flags]` or `--resume RUN [--iterations N]` -> (config, preset's name, run to resume).

    The config is validated. Raises ConfigError; prints and exits on --help (0) and on flags tyro refuses (2).
    """
    if any(arg.split("=")[0] == "--resume" for arg in argv) and not {"-h", "--help"} & set(argv):
        config, folder = _parse_resume(argv)
        validate(config)
        return config, folder.name, folder
    preset = argv[0] if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    file = find_preset(preset)
    start = tyro.cli(_Start, default=_Start(preset=preset, config=load_toml(file)), args=argv, prog=PROGRAM)
    if start.preset != preset:
        raise ConfigError(f"{start.preset}: a preset or FILE.toml comes before the flags.")
    validate(start.config)
    return start.config, file.stem, None


def _parse_resume(argv: Sequence[str]) -> tuple[TrainConfig, Path]:
    command, others = tyro.cli(_Resume, args=argv, prog=PROGRAM, return_unknown_args=True)
    if others:
        raise ConfigError(
            f"{others[0]}: a resumed run keeps its settings; only --iterations may be given with --resume."
        )
    folder = Path(command.resume)
    file = folder / "config.toml"
    if not file.is_file():
        raise ConfigError(f"--resume {folder}: there is no config.toml in it, so it is not a run that can go on.")
    config = load_toml(file)
    iterations = config.iterations if command.iterations is None else command.iterations
    if iterations < config.iterations:
        raise ConfigError(f"iterations = {iterations}: a resumed run accepts {config.iterations}, its own, or more.")
    return dataclasses.replace(config, run=str(folder), iterations=iterations), folder


def presets_folder() -> Path:
    """Where the presets lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_preset(name: str) -> Path:
    """The TOML file of a preset's name, or of a path that ends in .toml."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ConfigError(f"{name}: there is no such file.")
        return Path(name)
    names = sorted(file.stem for file in presets_folder().glob("*.toml"))
    if name not in names:
        raise ConfigError(
            f"{name}: no such preset{_nearest(name, names)}; there are {', '.join(names)}, or give a FILE.toml."
        )
    return presets_folder() / f"{name}.toml"


def load_toml(path: Path) -> TrainConfig:
    """Read a config; fields that the file leaves out keep the dataclass's defaults. Raises ConfigError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}.") from error
    try:
        return _from_table(TrainConfig, table, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _from_table(kind: type, table: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `kind` from a TOML table; `prefix` names the table in messages."""
    kinds = typing.get_type_hints(kind)
    for key in table:
        if key not in kinds:
            raise ConfigError(f"{prefix}{key}: no such field{_nearest(key, list(kinds))}.")
    return kind(**{key: _from_toml(kinds[key], value, prefix + key) for key, value in table.items()})


def _from_toml(kind: Any, value: Any, name: str) -> Any:
    """One TOML value as the type of its field: a group, Literal, tuple[str, ...], str, int or float."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _from_table(kind, value, name + ".")
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
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
        return "a list of strings"
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}[kind]


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def dump_toml(config: TrainConfig) -> str:
    """The config as TOML, every field written; `load_toml` reads back an equal config."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lines = [f"{name} = {_shown(value)}" for name, value in fields.items() if not dataclasses.is_dataclass(value)]
    for name, group in fields.items():
        if dataclasses.is_dataclass(group):
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_shown(value)}" for key, value in dataclasses.asdict(group).items()]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    """A value in TOML's notation. JSON's string escapes are TOML's too, but for DEL, which TOML wants escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def validate(config: TrainConfig) -> None:
    """Refuse impossible values: raises ConfigError with the first one's field, value and what is accepted."""
    _validate_sizes(config)
    _validate_prompts(config)
    _validate_algorithm(config)
    _validate_surroundings(config)


def _validate_sizes(config: TrainConfig) -> None:
    _require(0 <= config.seed < 2**63, "seed", config.seed, "0 to 2^63 - 1")
    _at_least(1, "iterations", config.iterations)
    _at_least(1, "prompts_per_iteration", config.prompts_per_iteration)
    _at_least(2, "group_size", config.group_size, ", since a group's images are compared with each other")
    _at_least(1, "micro_batch", config.micro_batch)
    steps, dropped = config.rollout.steps, config.grpo.drop_last_steps
    _require(1 <= steps <= DIFFUSION_STEPS, "rollout.steps", steps, f"1 to {DIFFUSION_STEPS}")
    _require(0 <= dropped < steps, "grpo.drop_last_steps", dropped, f"0 to {steps - 1}, below rollout.steps")
    samples = config.prompts_per_iteration * config.group_size
    pairs = samples * (steps - dropped)
    _require(
        1 <= config.updates_per_iteration <= pairs,
        "updates_per_iteration",
        config.updates_per_iteration,
        f"1 to {pairs}, the (sample, step) pairs of an iteration",
    )
    _at_least(0, "rollout.batch", config.rollout.batch)
    _at_least(1, "reward.batch", config.reward.batch)


def _validate_prompts(config: TrainConfig) -> None:
    prompts = config.prompts
    fraction = prompts.negative_fraction
    _require(0 <= fraction <= 1, "prompts.negative_fraction", fraction, "0 to 1")
    if prompts.negative == "shapes":
        _require(bool(prompts.categories), "prompts.categories", prompts.categories, "at least one hazard category")
        for category in prompts.categories:
            _require(category in HAZARDS, "prompts.categories", category, f"any of {', '.join(HAZARDS)}")


def _validate_algorithm(config: TrainConfig) -> None:
    rollout, grpo, optim = config.rollout, config.grpo, config.optim
    anchors, alpha = config.reward.anchors, config.reward.alpha
    _require(anchors in ANCHORS, "reward.anchors", anchors, f"any of {', '.join(ANCHORS)}")
    _require(math.isfinite(alpha), "reward.alpha", alpha, "a finite number")
    # Above 1 the noise could exceed the variance that is left: sqrt(1 - a_p - sigma^2) would not be real.
    _require(0 < rollout.eta <= 1, "rollout.eta", rollout.eta, "above 0 (a sure step has no probability) and at most 1")
    _at_least(1, "rollout.guidance", rollout.guidance)
    _above_zero("grpo.std_floor", grpo.std_floor)
    _above_zero("grpo.advantage_clamp", grpo.advantage_clamp)
    _at_least(0, "grpo.clip_low", grpo.clip_low)
    _at_least(0, "grpo.clip_high", grpo.clip_high)
    _at_least(0, "grpo.kl", grpo.kl)
    _at_least(0, "optim.lr", optim.lr)
    _require(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "0 or more and below 1")
    _require(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "0 or more and below 1")
    _above_zero("optim.eps", optim.eps)
    _at_least(0, "optim.weight_decay", optim.weight_decay)
    _above_zero("optim.max_grad_norm", optim.max_grad_norm)


def _validate_surroundings(config: TrainConfig) -> None:
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = 'cuda': there is no CUDA device here; accepted are auto and cpu.")
    _at_least(0, "engine.threads", config.engine.threads)
    _at_least(0, "eval.every", config.eval.every)
    _at_least(1, "eval.unsafe_per_category", config.eval.unsafe_per_category)
    _at_least(1, "eval.composition_per_task", config.eval.composition_per_task)
    fraction, steps = config.eval.quick_fraction, config.eval.steps
    _require(0 < fraction <= 1, "eval.quick_fraction", fraction, "above 0 and at most 1")
    _require(0 <= config.eval.seed < 2**63, "eval.seed", config.eval.seed, "0 to 2^63 - 1")
    _require(0 <= steps <= DIFFUSION_STEPS, "eval.steps", steps, f"0 (as rollout.steps) to {DIFFUSION_STEPS}")
    _at_least(1, "checkpoint.every", config.checkpoint.every)
    _at_least(0, "checkpoint.keep", config.checkpoint.keep)


def _require(holds: bool, field: str, value: Any, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{field} = {value!r}: accepted is {accepted}.")


def _at_least(low: float, field: str, value: float, reason: str = "") -> None:
    _require(low <= value < math.inf, field, value, f"{low} or more{reason}")


def _above_zero(field: str, value: float) -> None:
    _require(0 < value < math.inf, field, value, "a number above 0")
