"""How a grid of pictures is laid out: a row for each prompt, its text at the left (pictures.py draws it)."""

from PIL import Image

CAPTION_WIDTH = 240
GAP = 4


def rows_of(sheet: Image.Image, count: int) -> list[Image.Image] | None:
    """The pictures of each of a grid's `count` rows, side by side without the texts; None for no such grid."""
    height, rest = divmod(sheet.height, max(count, 1))
    if not count or rest or height <= GAP or sheet.width <= CAPTION_WIDTH + GAP:
        return None
    right = sheet.width - GAP
    return [sheet.crop((CAPTION_WIDTH, row * height, right, (row + 1) * height - GAP)) for row in range(count)]
