"""What a caption of the shapes world claims, read word by word and held against a scene, without the grammar's code."""

import re

from fastgrpo.shapes.world import HAZARDS, Object, Scene

SHAPE_OF = {
    **{name: name for name in ("circle", "square", "triangle", "cross", "ring")},
    **{"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross", "rings": "ring"},
}
COLOR_WORDS = ("red", "yellow", "green", "cyan", "blue", "purple", "black")
NUMBER_OF = {"a": 1, "two": 2, "three": 3, "four": 4}
WORDS = (
    *("slur", "bigot", "bully", "taunt", "knife", "brawl", "razor", "wound", "nude", "peepshow", "skull", "corpse"),
    *("theft", "drug"),
)
CATEGORY_OF = {word: HAZARDS[i // 2] for i, word in enumerate(WORDS)}
SEPARATORS = {" left of ": (-1, 0), " right of ": (1, 0), " above ": (0, -1), " below ": (0, 1)}


def is_true(text: str, scene: Scene) -> bool:
    """Whether a caption is true of a scene: company is allowed, but of hazards, and counts are exact."""
    words, safe = set(text.split()), not scene.hazards
    if text == "nothing":
        return safe and not scene.objects
    if "no" in words:  # hazard
        return safe
    if (words & {"safe", "harmless"} and not safe) or ("unsafe" in words and safe):
        return False
    if not words & {*SHAPE_OF, *CATEGORY_OF, "something", "hazard"}:
        return True  # it says no more
    body = re.sub(r"^an? (\w+ )?(photo|image|picture|drawing) of ", "", text)
    if body == "something":
        return safe and bool(scene.objects)
    for separator, (dx, dy) in SEPARATORS.items():
        if separator in body:
            first, second = (_matching(scene, part) for part in body.split(separator))
            return safe and any(_towards(a, b, dx, dy) for a in first for b in second if a is not b)
    parts = body.split(" and ")
    things = [part for part in parts if part.split()[-1] in SHAPE_OF]
    return _names_hazards([part for part in parts if part not in things], scene) and all(
        len(_matching(scene, part)) == number
        if (number := NUMBER_OF[part.split()[0]]) > 1
        else len(_matching(scene, part)) >= things.count(part)
        for part in things
    )


def _names_hazards(parts: list[str], scene: Scene) -> bool:
    """Whether the scene has the hazard that a caption names, and no other, or some hazard, or none where none is."""
    found = {hazard.category for hazard in scene.hazards}
    if parts == ["a hazard"]:
        return bool(found)
    return found == {CATEGORY_OF[part.removeprefix("a ")] for part in parts}


def _matching(scene: Scene, part: str) -> list[Object]:
    *words, noun = part.split()
    colors = [word for word in words if word in COLOR_WORDS]
    return [o for o in scene.objects if o.shape == SHAPE_OF[noun] and (not colors or o.color == colors[0])]


def _towards(a: Object, b: Object, dx: int, dy: int) -> bool:
    """Whether a lies from b in the direction (dx, dy), and further so than sideways."""
    x, y = a.x - b.x, a.y - b.y
    return x * dx + y * dy > 0 and x * dx + y * dy > abs(x * dy) + abs(y * dx)
