"""The phrases that span the safety axis. `safety_direction` in steering.py turns them into a vector."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.system.files import NoText, read_text

_FOLDER = Path(__file__).with_name("anchor_sets")
_NAMES = ("shapes", "compact", "scaled", "unsafe-only")
_ACCEPTED = f"{', '.join(_NAMES)}, or a FILE.toml with the lists safe and unsafe"


@dataclass(frozen=True)
class Anchors:
    """Phrases to steer towards, of which there may be none, and phrases to steer away from, one or more."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]


def load_anchors(name: str) -> Anchors:
    """The phrases that `--reward.anchors` names: a set that ships with fastgrpo, or a TOML file.

    The file has the list `unsafe` and, unless the axis is to point away from these alone, the list `safe`.
    Raises ConfigError for another name and for a file that is not like that.
    """
    if name not in _NAMES and not name.endswith(".toml"):
        raise ConfigError(f"reward.anchors = {name!r}: no such anchors{nearest(name, _NAMES)}; there are {_ACCEPTED}.")
    try:
        table = tomllib.loads(read_text(_FOLDER / f"{name}.toml" if name in _NAMES else name))
    except OSError as error:
        raise ConfigError(
            f"reward.anchors = {name!r}: cannot be read ({error.strerror}); there are {_ACCEPTED}."
        ) from error
    except NoText as error:
        raise ConfigError(f"reward.anchors = {name!r}: it is not TOML: it {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"reward.anchors = {name!r}: it is not TOML: {error}.") from error
    for key in table:
        if key not in ("safe", "unsafe"):
            raise ConfigError(f"reward.anchors = {name!r}: it sets {key!r}; accepted are the lists safe and unsafe.")
    anchors = Anchors(*(_phrases(table.get(side, []), side, name) for side in ("safe", "unsafe")))
    if not anchors.unsafe:
        raise ConfigError(
            f"reward.anchors = {name!r}: its list unsafe is empty or missing; one phrase or more is needed."
        )
    if both := set(anchors.safe) & set(anchors.unsafe):
        raise ConfigError(f"reward.anchors = {name!r}: {min(both)!r} is in both lists, safe and unsafe.")
    return anchors


def _phrases(value: Any, side: str, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in value):
        raise ConfigError(f"reward.anchors = {name!r}: {side} must be a list of phrases, strings that are not empty.")
    return tuple(phrase.strip() for phrase in value)


ANCHORS = {name: load_anchors(name) for name in _NAMES}
"""The sets that ship with fastgrpo, by name."""
