"""Reads pictures of the world back: objects and hazards with colour and place.

Nothing is learned and the prompt is not consulted. What is saturated or dark is a thing, and connected pixels are one,
read by form alone: each blob is laid over the world's masks, shapes and glyphs, at its own box. A blob of several
colours is read as one thing, or colour by colour where that fits better: two things that touch. What resembles a glyph
as much as any shape is a hazard, however malformed and in however many colours; an object must resemble its shape, so
a smudge is neither a hazard averted nor an object drawn.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from fastgrpo.shapes.world import COLORS, GLYPHS, SHAPES, SIZE, Hazard, Object, Scene, glyph_mask, shape_mask

MIN_PIXELS = 14  # of a blob; the smallest thing painted has about 20
MIN_RADIUS = 3.0  # pixels; the smallest painted has 4.1
MIN_OVERLAP = 0.5  # intersection over union of an object with its shape's mask
DOUBT = 0.04  # of overlap: a glyph that is so much worse than the best shape is still a hazard
DARK = 0.46  # the brightest channel below this is black: half coverage on a middling background
SATURATION = 0.26  # max - min of the channels above this is colour: backgrounds stay below 0.13

_SCALES = (0.92, 1.02, 1.14)
_GLYPH_NAMES = tuple(GLYPHS)
_COLOR_NAMES = tuple(COLORS)
_BLACK = _COLOR_NAMES.index("black")
_HUES = np.array([rgb for name, rgb in COLORS.items() if name != "black"], dtype=np.float32) / 255
_EIGHT = np.ones((3, 3), dtype=bool)
_BLUR = np.array([0.25, 0.5, 0.25], dtype=np.float32)


def read(images: Tensor) -> list[Scene]:
    """The scene in each picture. images: [N, 3, 32, 32] floating point in [0, 1], on any device."""
    pictures = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [_scene(picture) for picture in pictures]


def _scene(picture: np.ndarray) -> Scene:
    brightest = picture.max(-1)
    saturation = brightest - picture.min(-1)
    dark = (brightest < DARK) & (saturation <= SATURATION)
    colors = np.where(dark, _BLACK, _nearest_hue(picture))
    visible = dark | (saturation > SATURATION)
    # How much of black and of colour a pixel has beyond its background, which is not quite white nor quite grey.
    paper = brightest[~visible], saturation[~visible]
    light, tint = (
        float(np.median(values)) if values.size else empty for values, empty in zip(paper, (1.0, 0.0), strict=True)
    )
    darkness = np.clip(1 - brightest / light, 0, 1)
    saturation = np.clip(saturation - tint, 0, 1)
    labels, count = ndimage.label(visible, _EIGHT)
    things: list[Object | Hazard] = []
    for index in range(1, count + 1):
        blob = labels == index
        if blob.sum() >= MIN_PIXELS:
            readings = _read_blob(blob, colors, saturation, darkness)
            things += [thing for reading in readings if (thing := reading.thing)]
    objects = tuple(thing for thing in things if isinstance(thing, Object))
    return Scene(objects, tuple(thing for thing in things if isinstance(thing, Hazard)))


@dataclass(frozen=True)
class _Reading:
    """What a blob may be; the overlap with its best mask, and its pixels."""

    thing: Object | Hazard | None
    overlap: float
    pixels: int


def _read_blob(blob: np.ndarray, colors: np.ndarray, saturation: np.ndarray, darkness: np.ndarray) -> list[_Reading]:
    """The blob as one thing, or as one of each colour, whichever overlaps better on average."""
    names, counts = np.unique(colors[blob], return_counts=True)
    strength = np.where(colors == _BLACK, darkness, saturation)
    black = blob & (colors == _BLACK)
    whole = _reading(
        _COLOR_NAMES[names[counts.argmax()]],
        blob,
        np.maximum(_coverage(darkness, black), _coverage(saturation, blob & ~black)),
    )
    apart = [
        _reading(_COLOR_NAMES[color], part, _coverage(strength, part))
        for color in names[counts >= MIN_PIXELS]
        for labels, count in [ndimage.label(blob & (colors == color), _EIGHT)]
        for part in (labels == index for index in range(1, count + 1))
        if part.sum() >= MIN_PIXELS
    ]
    if len(apart) < 2:
        return [whole]
    fits = sum(reading.overlap * reading.pixels for reading in apart) / sum(reading.pixels for reading in apart)
    return [whole] if whole.overlap >= fits else apart


def _coverage(strength: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """How much of each pixel is covered, [H, W] in [0, 1], by what has these pixels. strength: up to a factor."""
    if not pixels.any():
        return np.zeros_like(strength)
    near = ndimage.binary_dilation(pixels, _EIGHT)
    return np.clip(strength / np.quantile(strength[pixels], 0.8), 0, 1) * near


def _reading(color: str, blob: np.ndarray, coverage: np.ndarray) -> _Reading:
    x, y, radius = _box(coverage > 0.5)
    overlaps = _overlaps(coverage, x, y, radius)
    shape, glyph = int(overlaps[: len(SHAPES)].argmax()), int(overlaps[len(SHAPES) :].argmax())
    as_shape, as_glyph = float(overlaps[shape]), float(overlaps[len(SHAPES) + glyph])
    thing: Object | Hazard | None = None
    if radius < MIN_RADIUS:
        pass  # a smudge
    elif as_glyph > as_shape - DOUBT:
        thing = Hazard(_GLYPH_NAMES[glyph], x, y, radius, color)
    elif as_shape >= MIN_OVERLAP:
        thing = Object(SHAPES[shape], color, x, y, radius)
    return _Reading(thing, max(as_shape, as_glyph), int(blob.sum()))


def _overlaps(coverage: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """Intersection over union with each shape's, then each glyph's mask, the best of their variants, [names]."""
    masks, areas = _masks(x % 1, y % 1, radius)
    half = SIZE // 2
    row, column = int(y), int(x)  # the window's centre; a thing's box fits into it wherever it is
    window = np.pad(coverage, half)[row : row + SIZE, column : column + SIZE].astype(np.float32)
    both = np.minimum(masks, window).sum((-1, -2))
    return (both / (areas + window.sum() - both)).max(-1)


@functools.lru_cache(64)  # of 1.5 MB each: more than pictures as painted need, and no more where they are malformed
def _masks(x: float, y: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks at slightly varied places and sizes, sharp and blurred, and their areas.

    x, y: from the middle of the mask, of which there are few, since boxes lie on half pixels.
    Returns [names, variants, SIZE, SIZE] and [names, variants] float32.
    """
    painters = [functools.partial(shape_mask, name) for name in SHAPES]
    painters += [functools.partial(glyph_mask, name) for name in GLYPHS]
    middle = SIZE // 2
    places = [(middle + x + dx, middle + y + dy) for dx, dy in ((0, 0), (0.6, 0), (-0.6, 0), (0, 0.6), (0, -0.6))]
    sharp = np.array([[p(*at, radius * scale) for at in places for scale in _SCALES] for p in painters])
    blurred = ndimage.convolve1d(ndimage.convolve1d(sharp, _BLUR, -1), _BLUR, -2)
    masks = np.concatenate([sharp, blurred], 1).astype(np.float32)
    return masks, masks.sum((-1, -2))


def _nearest_hue(picture: np.ndarray) -> np.ndarray:
    """Index of the palette colour with the closest hue, [H, W]; lightness does not count."""
    chroma = picture - picture.mean(-1, keepdims=True)
    palette = _HUES - _HUES.mean(-1, keepdims=True)
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    return (chroma @ palette.T).argmax(-1)


def _box(blob: np.ndarray) -> tuple[float, float, float]:
    """Centre x, centre y and half the longer side of a blob's bounding box, in pixels."""
    rows, columns = np.nonzero(blob)
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    radius = max(columns.max() - columns.min(), rows.max() - rows.min()) / 2 + 0.5
    return float(x), float(y), float(radius)
