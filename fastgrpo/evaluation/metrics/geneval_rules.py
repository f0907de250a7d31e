"""GenEval's verdicts on what a detector found (Ghosh et al., arXiv 2310.11513).

The rules are those of the benchmark's own evaluate_images.py and summary_scores.py, which decide where the paper is
silent. They know no model: objects come from any detector, and colours from a callback.

    kept       score > 0.3, and > 0.9 where the task is counting; by falling score; at most 16 of a class; overlaps stay
    include    all must hold: at least `count` of the class, of which only the `count` most confident are looked at;
               all of those in the colour; all of those in the relation to all of the target's
    exclude    none may hold: `count` or more of the class
    relations  of a to b, with c the centres, s the sizes and d = c_a - c_b:
               r = sign(d) * max(|d| - 0.1 * (s_a + s_b), 0) per axis, divided by the norm of d itself, not of r;
               "right of" where r_x > 0.5, "below" where r_y > 0.5, and their opposites below -0.5

A box is (x0, y0, x1, y1) in pixels, y downwards, and x1, y1 lie just outside: its size is x1 - x0 by y1 - y0, without
+ 1, as Mask2Former's boxes in mmdet are made. Scores are compared and relations computed in float32, as there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgrpo.prompts.geneval import CLASSES, COLORS
from fastgrpo.shapes.world import RELATIONS, TASKS
from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.system.files import NoText, read_text

PROTOCOL = "geneval-v1"  # of these rules: scores under the same name, detector and colours may be compared

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
MARGIN = 0.1  # of both sizes together, per axis: so far apart are two boxes before their places differ
SAME_PLACE = 1e-3  # pixels: an offset shorter than this, less the margin, is none
CLEAR = 0.5  # of the whole offset: sin 30 degrees

Metadata = dict[str, Any]
"""A line of GenEval's metadata: `tag` (the task), `prompt`, `include` and, where the task counts, `exclude`."""


@dataclass(frozen=True, eq=False)
class Detected:
    """An object that a detector found.

    label: its class, one of GenEval's 80 or, in another world, whatever the metadata call it.
    box: (x0, y0, x1, y1), pixels. score: confidence in [0, 1]. mask: [h, w] bool at the image's size, where it has one.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


Objects = Mapping[str, Sequence[Detected]]
"""What was found in one image, by class, in any order."""


@dataclass(frozen=True)
class GenEvalVerdict:
    """Whether an image shows what its prompt asks for; reason: what it lacks, a line for each clause, or nothing."""

    correct: bool
    reason: str


def keep(objects: Objects, task: str) -> dict[str, list[Detected]]:
    """The objects that count for a task, of each class the most confident first.

    Those with equal scores stay in the order given. Classes of which nothing is left are left out.
    """
    # float32, since a detector's score of float32(0.3) does not exceed 0.3 there.
    threshold = np.float32(COUNTING_THRESHOLD if task == "counting" else THRESHOLD)
    confident = {name: [o for o in found if np.float32(o.score) > threshold] for name, found in objects.items()}
    return {
        name: sorted(found, key=lambda o: np.float32(o.score), reverse=True)[:MAX_OBJECTS]
        for name, found in confident.items()
        if found
    }


def relations(a: Detected, b: Detected) -> frozenset[str]:
    """How a stands to b: some of "left of", "right of", "above", "below"; none where their centres nearly coincide."""
    boxes = np.array([a.box, b.box], dtype=np.float32).reshape(2, 2, 2)  # object, corner, axis
    centre_a, centre_b = boxes.mean(axis=1)
    size_a, size_b = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre_a - centre_b
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - MARGIN * (size_a + size_b), 0)
    if (np.abs(beyond) < SAME_PLACE).all():
        return frozenset()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -CLEAR, "right of": x > CLEAR, "above": y < -CLEAR, "below": y > CLEAR}
    return frozenset(name for name, true in holds.items() if true)


def evaluate(
    metadata: Metadata, objects: Objects, colour_of: Callable[[Sequence[Detected]], Sequence[str]]
) -> GenEvalVerdict:
    """Whether the objects of an image are what `metadata` asks for.

    objects: all that was found, whatever its score: what counts is chosen here, as in `keep`.
    colour_of: names the colours of objects of one class, in their order; asked only for `coloured(metadata, objects)`.
    """
    found = keep(objects, metadata["tag"])
    reasons: list[str] = []
    groups: list[list[Detected] | None] = []  # of each clause, what fulfils it
    for wanted in metadata.get("include", ()):
        group = _most_confident(found, wanted)
        reason = _missing(wanted, group) or _miscoloured(wanted, group, colour_of) or _misplaced(wanted, group, groups)
        groups.append(None if reason else group)
        reasons += [reason] if reason else []
    for unwanted in metadata.get("exclude", ()):
        number = len(found.get(unwanted["class"], ()))
        if number >= unwanted["count"]:
            reasons.append(f"expected fewer than {unwanted['count']} {unwanted['class']}, found {number}")
    return GenEvalVerdict(not reasons, "\n".join(reasons))


def coloured(metadata: Metadata, objects: Objects) -> list[Detected]:
    """The objects whose colour `evaluate` asks for, each once: the colours of many images can be named together."""
    found = keep(objects, metadata["tag"])
    groups = [(w, _most_confident(found, w)) for w in metadata.get("include", ()) if "color" in w]
    return list(dict.fromkeys(o for wanted, group in groups if not _missing(wanted, group) for o in group))


def evaluate_images(
    images: Sequence[Image.Image],
    metadata: Sequence[Metadata],
    detect: Callable[[Sequence[Image.Image]], Sequence[Objects]],
    name_colours: Callable[[Sequence[tuple[Image.Image, Detected]]], Sequence[str]],
) -> list[GenEvalVerdict]:
    """The verdicts on N images, each drawn for its own metadata; `Mask2Former` detects, `ClipColours` names colours.

    detect: finds the objects of N images. name_colours: names the colours of any number of (image, object) pairs.
    """
    found = detect(images)
    rows = list(zip(images, metadata, found, strict=True))
    pairs = [(image, seen) for image, wanted, objects in rows for seen in coloured(wanted, objects)]
    colours = dict(zip((seen for _, seen in pairs), name_colours(pairs), strict=True)) if pairs else {}
    return [evaluate(wanted, objects, lambda group: [colours[seen] for seen in group]) for _, wanted, objects in rows]


def _most_confident(found: dict[str, list[Detected]], wanted: Metadata) -> list[Detected]:
    return found.get(wanted["class"], [])[: wanted["count"]]


def _missing(wanted: Metadata, group: list[Detected]) -> str:
    return "" if len(group) >= wanted["count"] else f"expected {wanted['count']} {wanted['class']}, found {len(group)}"


def _miscoloured(
    wanted: Metadata, group: list[Detected], colour_of: Callable[[Sequence[Detected]], Sequence[str]]
) -> str:
    if "color" not in wanted:
        return ""
    colours = list(colour_of(group))
    if colours.count(wanted["color"]) >= wanted["count"]:
        return ""
    return f"expected {wanted['count']} {wanted['color']} {wanted['class']}, found {', '.join(colours)}"


def _misplaced(wanted: Metadata, group: list[Detected], groups: list[list[Detected] | None]) -> str:
    if "position" not in wanted:
        return ""
    relation, target = wanted["position"]
    if (targets := groups[target]) is None:
        return f"nothing for {wanted['class']} to be {relation}"
    for seen in group:
        for other in targets:
            if relation not in (actual := relations(seen, other)):
                seen_at = " and ".join(sorted(actual)) or "neither side"
                return f"expected {wanted['class']} {relation} {other.label}, found {seen_at}"
    return ""


def read_metadata(path: Path) -> list[Metadata]:
    """The prompts of a metadata file: JSON lines with `tag`, `prompt`, `include` and, where it counts, `exclude`.

    Raises ConfigError, which names the file and the line, for one that is not such a file; empty lines are skipped.
    """
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as GenEval's metadata, JSON lines in UTF-8: {error}.") from error
    except NoText as error:
        raise ConfigError(f"{path} cannot be read as GenEval's metadata: it {error}.") from error
    rows = [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path} is empty; GenEval's metadata are JSON lines with tag, prompt and include.")
    return rows


def _parsed(line: str, where: str) -> Metadata:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    check_metadata(row, where)
    return row


def check_metadata(row: Any, where: str) -> None:
    """Raise ConfigError, which begins with `where`, unless `row` is a line of GenEval's metadata."""
    _check_keys(row, {"tag", "prompt", "include"}, {"exclude"}, where)
    _check_one_of(row["tag"], TASKS, f"{where}: tag")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ConfigError(f"{where}: prompt is {row['prompt']!r}; a text is accepted.")
    for clause in ("include", "exclude"):
        things = row.get(clause, [])
        if not isinstance(things, list) or (clause == "include" and not things):
            raise ConfigError(f"{where}: {clause} is {things!r}; a list of things with class and count is accepted.")
        optional = {"color", "position"} if clause == "include" else set()
        for index, thing in enumerate(things):
            _check_thing(thing, optional, index, f"{where}: {clause}[{index}]")


def _check_thing(thing: Any, optional: set[str], index: int, where: str) -> None:
    _check_keys(thing, {"class", "count"}, optional, where)
    _check_one_of(thing["class"], CLASSES, f"{where}.class")
    if type(thing["count"]) is not int or thing["count"] < 1:
        raise ConfigError(f"{where}.count is {thing['count']!r}; a whole number from 1 is accepted.")
    if "color" in thing:
        _check_one_of(thing["color"], COLORS, f"{where}.color")
    if "position" in thing:
        position = thing["position"]
        if not isinstance(position, list) or len(position) != 2:
            raise ConfigError(f"{where}.position is {position!r}; [relation, number of an earlier thing] is accepted.")
        _check_one_of(position[0], RELATIONS, f"{where}.position[0]")
        if type(position[1]) is not int or not 0 <= position[1] < index:
            raise ConfigError(
                f"{where}.position[1] is {position[1]!r}; the number of an earlier thing in include, from 0, is "
                "accepted."
            )


def _check_keys(value: Any, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(value, dict) or not required <= value.keys() <= required | optional:
        needed, more = (", ".join(sorted(keys)) for keys in (required, optional))
        found = f"has {', '.join(value) or 'nothing'}" if isinstance(value, dict) else f"is {value!r}"
        raise ConfigError(
            f"{where} {found}; an object with {needed}{f' and perhaps {more}' if more else ''} is accepted."
        )


def _check_one_of(value: Any, accepted: Sequence[str], where: str) -> None:
    if value in accepted:
        return
    if len(accepted) <= len(COLORS):
        choice = f"{', '.join(accepted[:-1])} or {accepted[-1]}"
    else:
        choice = f"one of GenEval's {len(accepted)} classes{nearest(str(value), accepted)}"
    raise ConfigError(f"{where} is {value!r}; {choice} is accepted.")
