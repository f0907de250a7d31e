"""The axis of one run, where it takes the base model's pictures to know it: reward.neutral and reward.saturate.

Settled once and kept in the run's folder, so that a resumed run steers along the same bits:

    RUN/
      axis.safetensors   direction [E] float32, what the run steers along; plain [E] float32, what the anchors span
      axis.json          what it was made by; `removed`, how many directions; `variance`, the share of the pictures'
                         variance along them; `length`, what they left of the axis; `next_length`, what one more would
                         have left; `level`, the median z_image . direction of the pictures
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgrpo.rewards.axis.neutral import neutral_axis
from fastgrpo.rewards.steering import Axis, SteeringReward
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading
from fastgrpo.system.kept import Kept, keep, kept_files, read_kept, reusable

STEM = "axis"
"""Its files' name, without the suffixes, in the run's folder."""

_SHORT = 0.8  # below it steering may be too weak: in a trial on `shapes` 0.56 of the axis kept no safety
_SAME_AXIS = (
    1 - 1e-4
)  # cosine; another machine's rounding is far nearer 1, other anchors or another encoder further off


def needs_pictures(config: RewardConfig) -> bool:
    """Whether the axis is not known from the anchors alone."""
    return config.neutral > 0 or config.saturate


def settle_axis(
    steering: SteeringReward, features: Tensor, run: Path | None, ranks: Ranks, say: Callable[[str], object]
) -> Axis:
    """The axis that the settings of `steering`, which has the plain one, ask for; the same on all processes.

    features: [N, 2, E] unit vectors of the base model's pictures of positive prompts. run: a claimed folder, where it
    is kept, and read where it is already; None keeps nothing. say: told what was left out, and of too short an axis.
    Raises ConfigError where there are no pictures, and OSError where the folder cannot be written.
    """
    config, plain = steering.config, steering.direction
    if not len(features):
        name, value = ("reward.neutral", config.neutral) if config.neutral else ("reward.saturate", config.saturate)
        raise ConfigError.of(name, value, "there is no positive prompt, whose pictures it takes")
    level, direction = math.inf, plain.new_empty(0, len(plain))
    if ranks.first:
        kept = _settled(steering, features, run, say)
        say(_line(config, kept.notes))
        if warning := _warning(kept.notes):
            say(f"warning: {warning}")
        level, direction = kept.notes["level"], kept.tensors["direction"][None].to(plain.device)
    # repr and float give a float64 back as it was.
    level, direction = float(ranks.agree(repr(level))), ranks.gather(direction)[0]
    return Axis(direction, level if config.saturate else math.inf)


def axis_of_run(steering: SteeringReward, run: Path | None) -> tuple[Axis | None, str]:
    """The axis that a run settled, and a line about it; None and why not, where it has none for these settings.

    steering: has the plain axis. run: a run's folder, or None where none is known.
    Raises ConfigError for damaged files.
    """
    config = steering.config
    wanted = " and ".join(
        f"{name} {value}" for name, value in (("neutral", config.neutral), ("saturate", config.saturate)) if value
    )
    if run is None:
        return None, f"plain: {wanted} takes a run's pictures; --run RUN shows that run's"
    _, notes_file = kept_files(run / STEM)
    with reading(notes_file):
        kept = read_kept(run / STEM)
        if kept is None:
            return None, f"plain: no {STEM}.json in {run}, so {wanted} is not settled there"
        made_by, plain, direction = kept.notes["made_by"], kept.tensors["plain"], kept.tensors["direction"]
        if any(made_by[name] != getattr(config, name) for name in ("neutral", "saturate")):
            return None, f"plain: {run} settled its own for other settings than {wanted}"
        if plain.shape != steering.direction.shape or plain @ steering.direction.cpu() < _SAME_AXIS:
            return None, f"plain: {run} has another encoder or other anchors"
        level = kept.notes["level"] if config.saturate else math.inf
        return Axis(direction.to(steering.direction.device), level), _line(config, kept.notes).removeprefix("axis: ")


def _settled(steering: SteeringReward, features: Tensor, run: Path | None, say: Callable[[str], object]) -> Kept:
    """What the folder keeps, or else what is computed here, and then kept where there is a folder."""
    config, plain = steering.config, steering.direction
    pictures = features.flatten(0, 1).cpu().contiguous()
    made_by = {
        "neutral": config.neutral,
        "saturate": config.saturate,
        "anchors": {"safe": list(steering.anchors.safe), "unsafe": list(steering.anchors.unsafe)},
        "pictures": hashlib.sha256(pictures.numpy().tobytes()).hexdigest(),
    }
    if run and (kept := reusable(run / STEM, made_by, "the safety axis", say)):
        return kept
    notes: dict[str, Any] = {"removed": 0, "variance": 0.0, "length": 1.0, "next_length": None}
    direction = plain.cpu()
    if config.neutral:
        made = neutral_axis(plain, pictures, config.neutral)
        notes = {name: getattr(made, name) for name in notes}
        if made.removed:  # else it is the plain one, bit for bit
            direction = made.direction.float()
    notes["level"] = (pictures.double() @ direction.double()).quantile(0.5).item()
    tensors = {"direction": direction, "plain": plain.cpu()}
    return keep(run / STEM, made_by, tensors, **notes) if run else Kept(tensors, notes | {"made_by": made_by})


def _line(config: RewardConfig, notes: dict[str, Any]) -> str:
    """What became of the axis, in a line."""
    parts = []
    if config.neutral:
        parts.append(
            f"{notes['removed']} directions of benign pictures left out, {notes['variance']:.0%} of their variance, "
            f"{notes['length']:.2f} of its length left"
        )
    if config.saturate:
        parts.append(f"saturates at {notes['level']:+.3f}")
    return f"axis: {'; '.join(parts)}"


def _warning(notes: dict[str, Any]) -> str | None:
    """One sentence where too little of the axis is left, or none of it was left out."""
    if notes["length"] < _SHORT:
        return (
            f"only {notes['length']:.2f} of the safety axis' length is left, and steering may no longer make anything "
            f"safe: --reward.neutral {_SHORT} or more keeps more of it."
        )
    if notes["made_by"]["neutral"] and not notes["removed"]:
        why = "the pictures do not differ"
        if notes["next_length"] is not None:
            why = f"without the first direction {notes['next_length']:.2f} of its length would be left"
        return f"reward.neutral leaves the safety axis as it is: {why}."
    return None
