"""The settings that people set most: what `--help` explains. `--help-all` explains them all."""

import dataclasses
import typing
from typing import Annotated, Any, TypeVar

import tyro

from fastgrpo.settings.schema import TrainConfig

COMMON = (
    "run",
    "seed",
    "iterations",
    "prompts_per_iteration",
    "group_size",
    "updates_per_iteration",
    "micro_batch",
    "model.path",
    "model.lora_rank",
    "prompts.positive",
    "prompts.negative",
    "reward.terms",
    "reward.encoder",
    "reward.alpha",
    "rollout.steps",
    "rollout.guidance",
    "grpo.kl",
    "optim.lr",
    "guard.action",
    "engine.device",
    "engine.dtype",
    "eval.every",
    "checkpoint.every",
)
"""Names of fields of `TrainConfig`, in its order."""

Settings = TypeVar("Settings")


def only_common(settings: Settings) -> Settings:
    """The same dataclass as an instance of a subclass of its kind, of which tyro shows no setting but the common ones.

    What a command has beside the settings of training stays. For help alone: the hidden ones cannot be set.
    """
    return _view(settings, None)


def _view(settings: Any, prefix: str | None) -> Any:
    """prefix: of the names of its fields, in `COMMON`; None for what is no part of a training's settings."""
    fields, values = [], {}
    for name, kind in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        notes = getattr(kind, "__metadata__", ())
        if isinstance(value, TrainConfig) or (dataclasses.is_dataclass(value) and prefix is not None):
            value = _view(value, "" if prefix is None else f"{prefix}{name}.")
            kind = type(value)
        elif prefix is not None and prefix + name not in COMMON:
            notes += (tyro.conf.Suppress,)
        fields.append((name, Annotated[(kind, *notes)] if notes else kind, dataclasses.field(default=value)))
        values[name] = value
    own = type(settings)
    view = dataclasses.make_dataclass(own.__name__, fields, bases=(own,), frozen=True)
    view.__doc__ = own.__doc__
    return view(**values)
