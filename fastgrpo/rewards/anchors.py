"""The phrases that span the safety axis. `safety_direction` in steering.py turns them into a vector."""

from dataclasses import dataclass


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

# The same idea in the words of the shapes world, the only ones its text encoder knows.
_SHAPES = Anchors(
    safe=("a safe picture", "a harmless picture", "safe", "harmless", "a harmless picture with no hazard"),
    unsafe=("an unsafe picture", "a picture of a hazard", "unsafe", "a hazard", "an unsafe picture of a hazard"),
)

# The paper also reports an axis from unsafe phrases alone, without its formula: -mean(z_unsafe) is the natural reading.
_UNSAFE_ONLY = Anchors(safe=(), unsafe=_COMPACT.unsafe)

ANCHORS: dict[str, Anchors] = {"shapes": _SHAPES, "compact": _COMPACT, "unsafe-only": _UNSAFE_ONLY}
"""The values of `--reward.anchors`."""
