"""Grids of images as PNG: a row for each prompt, beside its text; two grids can stand side by side."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from fastgrpo.system.files import write_atomically
from fastgrpo.system.lettering import fitted, font
from fastgrpo.system.sheets import CAPTION_WIDTH, GAP
from fastgrpo.types import NEGATIVE, Prompt

HEADING_HEIGHT = 32
SMALLEST_TILE, LARGEST_TILE = 64, 256
_FONT_SIZE, _CAPTION_LINES = 12, 4
_PAPER, _INK, _RED = (255, 255, 255), (30, 30, 34), (170, 30, 30)


def grid(images: Tensor, prompts: Sequence[Prompt]) -> Image.Image:
    """A sheet with one row per prompt. Small pictures are enlarged in whole pixels, large ones shrunk.

    images: [R * K, 3, h, w] float32 in [0, 1]; row r shows images r * K ... r * K + K - 1. prompts: R.
    """
    columns = len(images) // len(prompts)
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (CAPTION_WIDTH + columns * (width + GAP), len(prompts) * (height + GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        top = row * (height + GAP)
        _write_caption(draw, prompt, top + height // 2)
        for column in range(columns):
            sheet.paste(tiles[row * columns + column], (CAPTION_WIDTH + column * (width + GAP), top))
    return sheet


def side_by_side(
    before: Image.Image, after: Image.Image, headings: tuple[str, str] = ("before", "after")
) -> Image.Image:
    """Two grids of the same prompts under their headings, with one column of captions."""
    pictures = after.crop((CAPTION_WIDTH, 0, after.width, after.height))
    middle = before.width + 4 * GAP
    sheet = Image.new("RGB", (middle + pictures.width, before.height + HEADING_HEIGHT), _PAPER)
    sheet.paste(before, (0, HEADING_HEIGHT))
    sheet.paste(pictures, (middle, HEADING_HEIGHT))
    draw, size = ImageDraw.Draw(sheet), 1.3 * _FONT_SIZE
    for text, left in zip(headings, (CAPTION_WIDTH, middle), strict=True):
        for line in fitted(text, size, pictures.width, 1):
            draw.text((left + pictures.width // 2, HEADING_HEIGHT // 2), line, _INK, font(size), anchor="mm")
    return sheet


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a PNG; a reader sees the old file or the whole new one."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def write_image(path: Path, image: Tensor) -> None:
    """Write one image, [3, h, w] float32 in [0, 1], at its own size."""
    write_png(path, to_pil(image))


def to_pil(image: Tensor) -> Image.Image:
    """An image, [3, h, w] float32 in [0, 1], in 8 bits. Raises ValueError where it is not finite: it would be black."""
    if not image.isfinite().all():
        raise ValueError("a picture that is not finite cannot be shown")
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))


def _tile(image: Tensor) -> Image.Image:
    picture = to_pil(image)
    side = max(picture.size)
    if side > LARGEST_TILE:
        picture.thumbnail((LARGEST_TILE, LARGEST_TILE), Image.Resampling.LANCZOS)
        return picture
    factor = -(-SMALLEST_TILE // side)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _write_caption(draw: ImageDraw.ImageDraw, prompt: Prompt, middle: int) -> None:
    lines = fitted(prompt.text, _FONT_SIZE, CAPTION_WIDTH - 3 * GAP, _CAPTION_LINES)
    color = _RED if prompt.label == NEGATIVE else _INK
    draw.multiline_text((GAP, middle), "\n".join(lines), color, font(_FONT_SIZE), anchor="lm", spacing=2)
