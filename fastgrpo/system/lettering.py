"""Text beside pictures, in a font that is there wherever fastgrpo is; letters that it lacks are written by code.

DejaVu Sans, which comes with matplotlib, has Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew and Arabic. The last
two need a text engine: where Pillow has none (Raqm), they would be out of order. Other letters, such as Chinese
ones and most emoji, are written as Python and JSON write them, \\u732b, after the names of their scripts.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from PIL import ImageFont, features

_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_HALF_A_CODE = re.compile(r"\\(u\w{0,3}|U\w{0,7})?$")


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    """The font, its size in pixels."""
    return ImageFont.truetype(_font_file(), size)


def fitted(text: str, size: float, width: float, lines: int) -> list[str]:
    """The text in at most `lines` lines of `width` pixels; a longer text ends in an ellipsis.

    Lines are broken between words, and within a word that is wider than a line. Where there are several lines, the
    scripts that the font lacks are named before the text.
    """
    words = [[_written(letter) for letter in word] for word in unicodedata.normalize("NFC", text).split()]
    lacking = _lacking_scripts(text)
    if lacking and lines > 1:
        words[:0] = [[f"[{', '.join(lacking)}, by code]"]]
    found, line = [], ""
    for piece in (piece for word in words for piece in _pieces(word, size, width)):
        longer = f"{line} {piece}".strip()
        if not line or font(size).getlength(longer) <= width:
            line = longer
            continue
        found.append(line)
        line = piece
        if len(found) == lines:
            begins = next(_pieces(found[-1], size, width, "…"))
            found[-1] = _HALF_A_CODE.sub("", begins).rstrip() + "…"
            return found
    return [*found, line] if line else found


def _pieces(units: Sequence[str], size: float, width: float, end: str = "") -> Iterator[str]:
    """Cut a word into pieces that are, with `end` behind them, no wider than `width`, unless a single unit is."""
    piece = ""
    for unit in units:
        if piece and font(size).getlength(piece + unit + end) > width:
            yield piece
            piece = ""
        piece += unit
    yield piece


def _written(letter: str) -> str:
    """A letter as the font can write it; nothing for what has no look of its own."""
    if unicodedata.category(letter) in ("Cc", "Cf"):
        return ""
    ordered = unicodedata.bidirectional(letter) not in _RIGHT_TO_LEFT or features.check("raqm")
    if ordered and ord(letter) in _letters():
        return letter
    number = ord(letter)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _lacking_scripts(text: str) -> list[str]:
    """The scripts of the letters that are written by code, in order."""
    letters = dict.fromkeys(unicodedata.normalize("NFC", text))
    return list(dict.fromkeys(_script(letter) for letter in letters if _written(letter) not in ("", letter)))


@cache
def _font_file() -> str:
    import matplotlib  # here, since a command that draws no text needs not wait for it

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def _letters() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def _script(letter: str) -> str:
    """A letter's script, the first word of its name: HANGUL SYLLABLE GA, CJK UNIFIED IDEOGRAPH-732B."""
    if unicodedata.category(letter) in ("So", "Sk"):
        return "symbols"
    name = unicodedata.name(letter, "unnamed").split()[0]
    return name if name in ("CJK", "unnamed") else name.capitalize()
