"""Reads pictures of the world back: objects with shape, colour and place, hazards with category.

Nothing is learned and the prompt is not consulted. Dark pixels are ink: any blot of at least MIN_INK pixels is a
hazard, however malformed, so a smudged glyph is not safe. Saturated pixels belong to the nearest palette colour; a
colour's connected blobs are objects. Shapes and glyphs are told apart by overlap with the world's masks at the blob's
box.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage
from torch import Tensor

from fastgrpo.shapes.world import COLORS, GLYPHS, SHAPES, Hazard, Object, Scene, glyph_mask, shape_mask

MIN_INK = 14  # pixels; the smallest glyph painted has about 45
MIN_OBJECT = 12  # pixels; the smallest object painted has about 22
INK_LEVEL = 0.42  # brightest channel below this is ink: half coverage on the darkest background
SATURATION = 0.26  # max - min of the channels above this is colour: backgrounds stay below 0.13

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32) / 255
_COLOR_NAMES = tuple(COLORS)
_EIGHT = np.ones((3, 3), dtype=bool)
_BLUR = np.array([0.25, 0.5, 0.25], dtype=np.float32)


def read(images: Tensor) -> list[Scene]:
    """The scene in each picture. images: [N, 3, 32, 32] floating point in [0, 1], on any device."""
    pictures = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Scene(tuple(_objects(picture)), tuple(_hazards(picture))) for picture in pictures]


def _hazards(picture: np.ndarray) -> list[Hazard]:
    brightest = picture.max(-1)
    ink = brightest < INK_LEVEL
    # Coverage by ink, were the paper white: 1 at black, 1/2 near INK_LEVEL.
    coverage = np.clip(1 - brightest / (2 * INK_LEVEL), 0, 1)
    labels, count = ndimage.label(ndimage.binary_dilation(ink, _EIGHT, 2), _EIGHT)  # joins a glyph's broken strokes
    hazards = []
    for index in range(1, count + 1):
        blob = ink & (labels == index)
        if blob.sum() >= MIN_INK:
            box = _box(blob)
            hazards.append(Hazard(_best_match(glyph_mask, tuple(GLYPHS), coverage * (labels == index), box), *box))
    return hazards


def _objects(picture: np.ndarray) -> list[Object]:
    saturation = picture.max(-1) - picture.min(-1)
    colored = saturation > SATURATION
    nearest = _nearest_color(picture)
    objects = []
    for color in np.unique(nearest[colored]):
        labels, count = ndimage.label(colored & (nearest == color))
        for index in range(1, count + 1):
            blob = labels == index
            if blob.sum() >= MIN_OBJECT:
                objects.append(_object(blob, saturation, _COLOR_NAMES[color]))
    return objects


def _object(blob: np.ndarray, saturation: np.ndarray, color: str) -> Object:
    coverage = np.clip(saturation / np.quantile(saturation[blob], 0.8), 0, 1) * ndimage.binary_dilation(blob)
    box = _box(coverage > 0.5)
    return Object(_best_match(shape_mask, SHAPES, coverage, box), color, *box)


def _nearest_color(picture: np.ndarray) -> np.ndarray:
    """Index of the palette colour with the closest hue, [H, W]; lightness does not count."""
    chroma = picture - picture.mean(-1, keepdims=True)
    palette = _PALETTE - _PALETTE.mean(-1, keepdims=True)
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    return (chroma @ palette.T).argmax(-1)


def _box(blob: np.ndarray) -> tuple[float, float, float]:
    """Centre x, centre y and half the longer side of a blob's bounding box, in pixels."""
    rows, columns = np.nonzero(blob)
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    radius = max(columns.max() - columns.min(), rows.max() - rows.min()) / 2 + 0.5
    return float(x), float(y), float(radius)


def _best_match(
    mask_at: Callable[[str, float, float, float], np.ndarray],
    names: tuple[str, ...],
    coverage: np.ndarray,
    box: tuple[float, float, float],
) -> str:
    """The name whose mask overlaps the coverage best, at slightly varied sizes, sharp or blurred."""
    x, y, radius = box
    overlaps: dict[str, float] = {}
    for name in names:
        masks = [mask_at(name, x, y, radius * scale) for scale in (0.92, 1.02, 1.14)]
        masks += [ndimage.convolve1d(ndimage.convolve1d(mask, _BLUR, 0), _BLUR, 1) for mask in masks]
        overlaps[name] = max(np.minimum(m, coverage).sum() / np.maximum(m, coverage).sum() for m in masks)
    return max(overlaps, key=overlaps.__getitem__)
