"""The phrases that span the safety axis. `safety_direction` in steering.py turns them into a vector."""

import tomllib
from dataclasses import dataclass
from typing import Any

from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.system.text_files import NoText, read_text


@dataclass(frozen=True)
class Anchors:
    """Two sets of phrases.

    safe: what to steer towards; may be empty, then the axis points away from `unsafe` alone.
    unsafe: what to steer away from; at least one.
    """

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]


# SafeDiffusion-R1 (arXiv 2605.18719), the published 5 + 3 phrases.
_COMPACT = Anchors(
    safe=(
        "a safe",
        "a non-violent, non-sexual image",
        "a wholesome, PG-rated photo",
        "an image with no nudity, no gore, no weapons",
        "appropriate image",
    ),
    unsafe=(
        "explicit sexual content and nudity",
        "pornographic material",
        "an image with naked people engaged in sexual acts",
    ),
)

# The main checkpoint of SafeDiffusion-R1 was trained with 25 + 20 phrases that were not published. These are our own, over
# I2P's seven categories: three unsafe ones for each, but two for harassment.
_SCALED = Anchors(
    safe=(
        "a safe image",
        "an appropriate image for all audiences",
        "a wholesome, family-friendly picture",
        "a G-rated photo",
        "a harmless everyday scene",
        "a peaceful and calm scene",
        "a respectful portrait of a person",
        "fully clothed people in ordinary clothes",
        "a modest, decent photo",
        "people who treat each other with kindness",
        "a friendly conversation between colleagues",
        "people of all backgrounds living together in peace",
        "a healthy and happy person",
        "a person who is cared for and comforted",
        "a pleasant, clean and tidy picture",
        "a lawful and orderly street scene",
        "an image with no nudity and no sexual content",
        "an image with no violence and no weapons",
        "an image with no blood, no gore and no injuries",
        "an image with no hate symbols and no insults",
        "an image with no bullying and no threats",
        "an image with no self-harm",
        "an image with no drugs and no crime",
        "a picture with nothing disturbing or disgusting in it",
        "a non-violent, non-sexual, non-offensive image",
    ),
    unsafe=(
        "a hateful image that insults a group of people",
        "extremist and racist symbols",
        "a picture that degrades people for their origin or religion",
        "a person being bullied and humiliated",
        "a threatening scene of stalking and intimidation",
        "a violent fight with bloody injuries",
        "a person being attacked with a weapon",
        "a brutal killing",
        "a person harming themselves",
        "a suicide",
        "a person with cuts and self-inflicted wounds",
        "explicit sexual content and nudity",
        "pornographic material",
        "an image with naked people engaged in sexual acts",
        "a disgusting and shocking picture",
        "a gory picture of a mutilated body",
        "a horrifying rotten corpse",
        "illegal drugs and people taking them",
        "a crime such as theft or robbery",
        "smuggling and trade in illegal weapons",
    ),
)

# The same idea in the words of the shapes world, the only ones its text encoder knows.
_SHAPES = Anchors(
    safe=("a safe picture", "a harmless picture", "safe", "harmless", "a harmless picture with no hazard"),
    unsafe=("an unsafe picture", "a picture of a hazard", "unsafe", "a hazard", "an unsafe picture of a hazard"),
)

# The paper also reports an axis from unsafe phrases alone, without its formula: -mean(z_unsafe) is the natural reading.
_UNSAFE_ONLY = Anchors(safe=(), unsafe=_COMPACT.unsafe)

ANCHORS: dict[str, Anchors] = {
    "shapes": _SHAPES,
    "compact": _COMPACT,
    "scaled": _SCALED,
    "unsafe-only": _UNSAFE_ONLY,
}
"""The sets that have a name; the other values of `--reward.anchors` are files."""

_ACCEPTED = f"{', '.join(ANCHORS)}, or a FILE.toml with the lists safe and unsafe"


def load_anchors(name: str) -> Anchors:
    """The phrases that `--reward.anchors` names.

    name: one of ANCHORS, or a TOML file with the list `unsafe` and, unless the axis is to point away from these alone,
        the list `safe`.
    Raises ConfigError for another name and for a file that is not like that.
    """
    if name in ANCHORS:
        return ANCHORS[name]
    if not name.endswith(".toml"):
        raise ConfigError(
            f"reward.anchors = {name!r}: no such anchors{nearest(name, list(ANCHORS))}; there are {_ACCEPTED}."
        )
    try:
        table = tomllib.loads(read_text(name))
    except OSError as error:
        raise ConfigError(
            f"reward.anchors = {name!r}: cannot be read ({error.strerror}); there are {_ACCEPTED}."
        ) from error
    except NoText as error:
        raise ConfigError(f"reward.anchors = {name!r}: it is not TOML: it {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"reward.anchors = {name!r}: it is not TOML: {error}.") from error
    return _from_table(table, name)


def _from_table(table: dict[str, Any], name: str) -> Anchors:
    for key in table:
        if key not in ("safe", "unsafe"):
            raise ConfigError(f"reward.anchors = {name!r}: it sets {key!r}; accepted are the lists safe and unsafe.")
    anchors = Anchors(*(_phrases(table.get(side, []), side, name) for side in ("safe", "unsafe")))
    if not anchors.unsafe:
        raise ConfigError(
            f"reward.anchors = {name!r}: its list unsafe is empty or missing; one phrase or more is needed."
        )
    both = set(anchors.safe) & set(anchors.unsafe)
    if both:
        raise ConfigError(f"reward.anchors = {name!r}: {min(both)!r} is in both lists, safe and unsafe.")
    return anchors


def _phrases(value: Any, side: str, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in value):
        raise ConfigError(f"reward.anchors = {name!r}: {side} must be a list of phrases, strings that are not empty.")
    return tuple(phrase.strip() for phrase in value)
