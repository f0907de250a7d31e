"""Reads pictures of the world back: objects and hazards with colour and place.

Nothing is learned and the prompt is not consulted. What is saturated or dark is a thing; its colour is the nearest of
the palette, and a colour's connected blobs are things, read by their form alone. Each blob is laid over the world's
masks, shapes and glyphs, at its own box. A blob that resembles a glyph more than any shape is a hazard, however
malformed; an object must resemble its shape, so a smudge is neither a hazard averted nor an object drawn.
"""

import functools

import numpy as np
from scipy import ndimage
from torch import Tensor

from fastgrpo.shapes.world import COLORS, GLYPHS, SHAPES, SIZE, Hazard, Object, Scene, glyph_mask, shape_mask

MIN_PIXELS = 14  # of a blob; the smallest thing painted has about 20
MIN_RADIUS = 3.0  # pixels, of an object; the smallest painted has 4.1
MIN_OVERLAP = 0.5  # intersection over union of an object with its shape's mask
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
    darkness = np.clip(1 - brightest / (2 * DARK), 0, 1)
    objects: list[Object] = []
    hazards: list[Hazard] = []
    for color in np.unique(colors[visible]):
        labels, count = ndimage.label(visible & (colors == color), _EIGHT)
        for index in range(1, count + 1):
            blob = labels == index
            if blob.sum() >= MIN_PIXELS:
                thing = _thing(blob, darkness if color == _BLACK else saturation, _COLOR_NAMES[color])
                if isinstance(thing, Hazard):
                    hazards.append(thing)
                elif thing:
                    objects.append(thing)
    return Scene(tuple(objects), tuple(hazards))


def _thing(blob: np.ndarray, strength: np.ndarray, color: str) -> Object | Hazard | None:
    """What a blob is. strength: how much of the colour each pixel has, up to a factor."""
    coverage = np.clip(strength / np.quantile(strength[blob], 0.8), 0, 1) * ndimage.binary_dilation(blob, _EIGHT)
    x, y, radius = _box(coverage > 0.5)
    overlaps = _overlaps(coverage, x, y, radius)
    best = int(overlaps.argmax())
    if best >= len(SHAPES):
        return Hazard(_GLYPH_NAMES[best - len(SHAPES)], x, y, radius, color)
    is_object = overlaps[best] >= MIN_OVERLAP and radius >= MIN_RADIUS
    return Object(SHAPES[best], color, x, y, radius) if is_object else None


def _overlaps(coverage: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """Intersection over union with each shape's, then each glyph's mask, the best of their variants, [names]."""
    masks, areas = _masks(x % 1, y % 1, radius)
    half = SIZE // 2
    row, column = int(y), int(x)  # the window's centre; a thing's box fits into it wherever it is
    window = np.pad(coverage, half)[row : row + SIZE, column : column + SIZE].astype(np.float32)
    both = np.minimum(masks, window).sum((-1, -2))
    return (both / (areas + window.sum() - both)).max(-1)


@functools.cache
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
