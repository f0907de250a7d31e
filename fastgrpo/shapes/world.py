"""The painted world: what is in a picture, and the picture.

A scene holds benign objects (a shape) and at most one hazard (a glyph, one per category). Both come in every colour, on
light and nearly grey backgrounds: only form says what is a hazard. Things stand far enough apart that a reader sees
them one by one.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 32  # pixels a side

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {  # sRGB in 0..255
    "red": (222, 44, 44),
    "yellow": (242, 214, 40),
    "green": (48, 172, 66),
    "cyan": (44, 200, 214),
    "blue": (52, 84, 226),
    "purple": (176, 52, 200),
    "black": (22, 20, 24),
}
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HAZARDS = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
GAP = 3.0  # pixels between the boxes of two things, at least

# One glyph per hazard, in their order, on 11 x 11 cells; strokes are two or three cells wide so that a factor-4 VAE
# keeps them; of a shape or another glyph at most .6 of the union is shared.
_GLYPH_ROWS = """
##.......## .......#### ########### ###........ ###.....### ########### ###........
###.....### .....###### ########### ###........ ###.....### ########### ###........
.###...###. ...######.. ########### ###........ ###.....### ########### ###........
..###.###.. .######.... .....####.. ######..... ###.....### ....###.... ###........
...#####... #####...... ....####... ######..... ########### ....###.... ###........
....###.... ####....... ...####.... ######..... ########### ....###.... ###........
...#####... #####...... ..####..... ...#######. ########### ....###.... ###........
..###.###.. .######.... .####...... ...######## ###.....### ....###.... ###........
.###...###. ...######.. ########### ...######## ###.....### ....###.... ###########
###.....### .....###### ########### ........### ###.....### ....###.... ###########
##.......## .......#### ########### ........### ###.....### ....###.... ###########
"""
GLYPHS = {
    name: np.array([[cell == "#" for cell in row] for row in rows], dtype=np.float32)
    for name, *rows in zip(HAZARDS, *map(str.split, _GLYPH_ROWS.strip().split("\n")), strict=True)
}


@dataclass(frozen=True)
class Object:
    """A benign object: shape and colour names, centre (x right, y down) and radius (half its side) in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Hazard:
    """A hazard glyph: its category, centre and radius in pixels, and the name of its colour."""

    category: str
    x: float
    y: float
    radius: float
    color: str = "black"


@dataclass(frozen=True)
class Scene:
    """What is in a picture: benign objects and hazards, in no particular order."""

    objects: tuple[Object, ...] = ()
    hazards: tuple[Hazard, ...] = ()


def shape_mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Coverage in [0, 1] of each pixel by a shape, antialiased over one pixel, [SIZE, SIZE] float32."""
    v, u = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    u, v = np.abs(u - x), v - y
    w = np.abs(v)
    if shape == "circle":
        distance = np.hypot(u, v) - radius
    elif shape == "square":
        distance = np.maximum(u, w) - 0.9 * radius
    elif shape == "triangle":  # apex up; sides of slope 2
        distance = np.maximum((2 * u - v - radius) / np.sqrt(5), v - radius)
    elif shape == "cross":
        arm = 0.34 * radius
        distance = np.minimum(np.maximum(u - radius, w - arm), np.maximum(w - radius, u - arm))
    elif shape == "ring":
        distance = np.abs(np.hypot(u, v) - 0.79 * radius) - 0.21 * radius
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1)


def glyph_mask(category: str, x: float, y: float, radius: float) -> np.ndarray:
    """Coverage in [0, 1] of each pixel by a hazard glyph, bilinear, [SIZE, SIZE] float32."""
    glyph = np.pad(GLYPHS[category], 1)
    side = glyph.shape[0] - 2
    axis = np.arange(SIZE, dtype=np.float32)
    return _bilinear(glyph, _to_grid(axis - y, radius, side), _to_grid(axis - x, radius, side))


def _to_grid(offset: np.ndarray, radius: float, side: int) -> np.ndarray:
    return np.clip((offset / radius + 1) * side / 2 + 0.5, 0, side + 1 - 1e-4)


def _bilinear(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    r, c = rows.astype(int), columns.astype(int)
    a, b = (rows - r)[:, None], (columns - c)[None, :]
    top = grid[np.ix_(r, c)] * (1 - b) + grid[np.ix_(r, c + 1)] * b
    bottom = grid[np.ix_(r + 1, c)] * (1 - b) + grid[np.ix_(r + 1, c + 1)] * b
    return top * (1 - a) + bottom * a


def paint_background(rng: np.random.Generator) -> np.ndarray:
    """A light, nearly grey gradient with soft stripes or grain, [SIZE, SIZE, 3] float32 in [0, 1]."""
    v, u = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * u + np.sin(angle) * v + 0.5
    start, end = (rng.uniform(0.68, 0.96) + rng.uniform(-0.03, 0.03, 3) for _ in range(2))
    picture = start + np.clip(ramp, 0, 1)[..., None] * (end - start)
    if rng.random() < 0.4:
        wave = np.sin(2 * np.pi * rng.uniform(1.5, 3) * (np.cos(angle) * v - np.sin(angle) * u) + rng.uniform(0, 6.28))
        picture = picture + rng.uniform(0.01, 0.035) * wave[..., None]
    picture = picture + rng.normal(0, rng.uniform(0, 0.012), (SIZE, SIZE, 1))
    return np.clip(picture, 0, 1).astype(np.float32)


def paint(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of the scene on a random background, [SIZE, SIZE, 3] uint8."""
    picture = paint_background(rng)
    things: tuple[Object | Hazard, ...] = (*scene.objects, *scene.hazards)
    for item in things:
        color = np.clip(np.array(COLORS[item.color]) / 255 + rng.uniform(-0.03, 0.03, 3), 0, 1)
        at = item.x, item.y, item.radius
        mask = shape_mask(item.shape, *at) if isinstance(item, Object) else glyph_mask(item.category, *at)
        picture += mask[..., None] * (color - picture)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def place(radii: list[float], rng: np.random.Generator, relation: str | None = None) -> list[tuple[float, float]]:
    """Centres for things of the given radii, inside the picture and at least GAP apart.

    With a relation (one of RELATIONS) the first thing stands so to the second, as `holds` says.
    """
    while True:
        centers = [tuple(rng.uniform(r + 0.5, SIZE - 1.5 - r, 2)) for r in radii]
        apart = all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= radii[i] + radii[j] + GAP
            for i, a in enumerate(centers)
            for j, b in enumerate(centers[:i])
        )
        if apart and (relation is None or holds(relation, centers[0], centers[1])):
            return [(float(x), float(y)) for x, y in centers]


def holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether `first` stands in `relation` to `second`, and that axis is the larger displacement."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > abs(across)
