"""Captions that stay where they belong and show no boxes; messages of bounded length."""

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont, features

from fastgrpo.prompts.truncation import truncation_lines
from fastgrpo.system import pictures
from fastgrpo.system.console import complain, cut_middle
from fastgrpo.system.errors import cut, quoted
from fastgrpo.system.lettering import fitted, font
from fastgrpo.types import NEGATIVE, Prompt

SIZE, WIDTH = 12, 200
FILE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
CODED = {
    "一只黑猫坐在红色的屋顶上": "CJK",
    "한국어": "Hangul",
    "の ネ in the rain": "Hiragana, Katakana",
    "แมว": "Thai",
    "बिल्ली": "Devanagari",
    "a 𓃠 and a 🫠": "Egyptian, symbols",
}
WRITTEN = ["a cat by the sea", "красный круг", "ένας κόκκινος κύκλος", "Nguyễn – “été” …", "կատու"]


def without_spaces(lines: list[str]) -> str:
    return "".join("".join(lines).split())


def ink(picture: Image.Image, left: int) -> int:
    """Pixels at the right of `left` that are not white."""
    return int((np.asarray(picture)[:, left:] < 255).any(axis=-1).sum())


@pytest.mark.parametrize(
    "text", ["z" * 20_000, "a photo of " + "z" * 60, "W" * 31, "猫" * 500, "word " * 5000, "aé" * 99]
)
def test_no_caption_runs_over_the_pictures(text: str) -> None:
    """Pictures are white, so that all ink is the caption's."""
    white = torch.ones(2, 3, 64, 64)
    sheet = pictures.grid(white, [Prompt(text, NEGATIVE)])
    assert ink(sheet, pictures.CAPTION_WIDTH) == 0
    assert ink(sheet, 0) > 0
    both = pictures.side_by_side(sheet, sheet, (text, text))
    gap = both.crop(
        (
            pictures.CAPTION_WIDTH + 2 * (64 + pictures.GAP),
            0,
            pictures.CAPTION_WIDTH + 2 * (64 + pictures.GAP) + 3 * pictures.GAP,
            both.height,
        )
    )
    assert ink(gap, 0) == 0, "headings end with their pictures"
    assert ink(both.crop((0, 0, pictures.CAPTION_WIDTH - 1, pictures.HEADING_HEIGHT)), 0) == 0


@pytest.mark.parametrize("text", [*WRITTEN, *CODED, "z" * 30, "a photo of " + "z" * 60, "word " * 9])
@pytest.mark.parametrize("lines", [1, 2, 20])
def test_lines_are_as_wide_as_told_and_hold_the_text_or_how_it_begins(text: str, lines: int) -> None:
    whole = fitted(text, SIZE, 10_000, 2)
    found = fitted(text, SIZE, WIDTH, lines)
    assert 1 <= len(found) <= lines
    assert all(font(SIZE).getlength(line) <= WIDTH for line in found)
    if lines == 20:
        assert without_spaces(found) == without_spaces(whole)
    elif lines == 2 and without_spaces(found) != without_spaces(whole):
        assert found[-1].endswith("…")
        assert without_spaces(whole).startswith(without_spaces(found)[:-1])


def test_words_stay_whole_where_they_fit() -> None:
    words = [f"word{index}" for index in range(40)]
    lines = fitted(" ".join(words), SIZE, WIDTH, 99)
    assert [word for line in lines for word in line.split()] == words
    for line, following in itertools.pairwise(lines):
        assert font(SIZE).getlength(f"{line} {following.split()[0]}") > WIDTH
    assert fitted("", SIZE, WIDTH, 4) == []


@pytest.mark.parametrize("text", CODED)
def test_letters_that_the_font_lacks_are_named_and_can_be_read_back(text: str) -> None:
    first, *others = fitted(text, SIZE, 10_000, 2)[0].split("] ", 1)
    assert first == f"[{CODED[text]}, by code"
    (coded,) = others
    assert coded.encode("ascii").decode("unicode_escape") == text
    narrow = fitted(text, SIZE, 80, 99)
    pieces = "".join(line for line in narrow if "\\" in line).split("\\")[1:]
    assert all(len(piece.split()[0]) in (5, 9) or piece[0] == "U" for piece in pieces), "no code is broken in two"
    one = fitted(text, SIZE, 40, 1)[0]
    assert one.endswith("…")
    assert not one[:-1].split("\\")[-1].startswith("u") or len(one[:-1].split("\\")[-1]) >= 5


@pytest.mark.parametrize("text", [*WRITTEN, *CODED])
def test_everything_that_is_written_has_a_glyph(text: str) -> None:
    """By another reader of the font's tables, and by what is drawn: a letter that is lacking would be a box."""
    glyphs = TTFont(FILE).getBestCmap()
    written = "".join(fitted(text, SIZE, 10_000, 2)).replace(" ", "")
    assert {ord(letter) for letter in written} <= glyphs.keys()
    drawn = ImageFont.truetype(str(FILE), 40)
    box = bytes(drawn.getmask("\U000f0000"))
    assert all(bytes(drawn.getmask(letter)) != box for letter in written)
    if text in WRITTEN:
        assert written == text.replace(" ", "")


def test_prompts_of_any_script_look_different() -> None:
    white = torch.ones(1, 3, 64, 64)
    sheets = [np.asarray(pictures.grid(white, [Prompt(text, NEGATIVE)])) for text in ("猫", "犬", "แ", "\U000f0000")]
    for index, sheet in enumerate(sheets):
        assert all((sheet != other).any() for other in sheets[:index])


@pytest.mark.parametrize(("raqm", "coded"), [(True, False), (False, True)])
def test_right_to_left_needs_who_can_set_it(monkeypatch: pytest.MonkeyPatch, raqm: bool, coded: bool) -> None:
    monkeypatch.setattr(features, "check", lambda name: raqm)
    (line,) = fitted("חתול", SIZE, 10_000, 2)
    assert line == (r"[Hebrew, by code] \u05d7\u05ea\u05d5\u05dc" if coded else "חתול")


def test_invisible_letters_are_left_out() -> None:
    assert fitted("a\u200b c\u0007at\u202e", SIZE, 10_000, 2) == ["a cat"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat", "'a cat'"),
        ("a  cat\nby the\tsea", "'a cat by the sea'"),
        ("z" * 80, "'" + "z" * 80 + "'"),
        ("z" * 81, "'" + "z" * 80 + "...'"),
        ("z" * 20_000, "'" + "z" * 80 + "...'"),
        ("it's", '"it\'s"'),
    ],
)
def test_prompts_in_sentences_are_cut(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_a_sentence_keeps_its_beginning_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    complain("prompts.positive = " + "z" * 20_000 + ": no such source; accepted are files")
    said = capsys.readouterr().err
    assert said.startswith("fastgrpo: prompts.positive = zzz")
    assert said.endswith("zzz: no such source; accepted are files.\n")
    assert len(said) < 2050
    assert " ... " in said
    assert cut_middle("z" * 2000) == "z" * 2000
    assert cut("four", 4) == "four"


def test_an_endless_word_is_shown_where_a_prompt_is_cut_off() -> None:
    class Tokenizer:
        model_max_length = 8

        def __call__(self, texts: list[str], verbose: bool) -> object:
            return type("Tokens", (), {"input_ids": [list(text) for text in texts]})

    (line,) = truncation_lines(["z" * 20_000], Tokenizer())
    assert line.startswith("1 of 1 prompts, '" + "z" * 60 + "...', is longer than the text encoder's 8 tokens")
