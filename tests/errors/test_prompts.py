"""Mistakes in files and sources of prompts."""

from collections.abc import Callable

import pytest

from support.mistakes import (
    TRAIN,
    Mistake,
    dry,
    mistakes,
    not_installed,
    offline,
)

PROMPTS = [
    Mistake(
        "no prompt file",
        TRAIN + "--prompts.positive none.txt",
        "prompts.positive: cannot read 'none.txt' (No such file or directory); a UTF-8 text file is needed.",
    ),
    Mistake(
        "folder for a prompt file",
        TRAIN + "--prompts.negative a.txt",
        "prompts.negative: cannot read 'a.txt' (Is a directory); ...",
        {"a.txt/b.txt": "a cat"},
    ),
    Mistake(
        "empty prompt file",
        TRAIN + "--prompts.positive a.txt",
        "prompts.positive: 'a.txt' holds no prompt; one per line is needed.",
        {"a.txt": "\n \n"},
    ),
    Mistake(
        "binary prompt file",
        TRAIN + "--prompts.positive a.txt",
        "prompts.positive: 'a.txt' is binary, with a NUL byte in line 2; UTF-8 text is needed.",
        {"a.txt": b"a cat\n\0"},
    ),
    Mistake(
        "prompts in Latin-1",
        TRAIN + "--prompts.positive a.txt",
        "prompts.positive: 'a.txt' is not UTF-8: byte 0xe9 in line 2, offset 9 of the file; save it as UTF-8.",
        {"a.txt": "a cat\ncafé\n".encode("latin-1")},
    ),
    Mistake(
        "prompts in UTF-16",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive: 'a.csv' is UTF-16; save it as UTF-8.",
        {"a.csv": "prompt\na cat\n".encode("utf-16")},
    ),
    Mistake(
        "semicolons in a CSV",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive: 'a.csv' has semicolons between its columns; accepted are commas in a .csv and tabs in a "
        ".tsv file.",
        {"a.csv": "prompt;n\na cat, a dog;1\n"},
    ),
    Mistake(
        "column",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive_column: 'a.csv' has no column 'prompt' (did you mean prompts?); there are prompts, n.",
        {"a.csv": "prompts,n\na cat,1\n"},
    ),
    Mistake(
        "ragged CSV",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive: 'a.csv' has 3 cells in line 2 and 2 in its header; ...",
        {"a.csv": "prompt,n\na cat, a dog,1\n"},
    ),
    Mistake(
        "broken JSONL",
        TRAIN + "--prompts.positive a.jsonl",
        "prompts.positive: 'a.jsonl' is broken in line 2: ...",
        {"a.jsonl": '{"prompt": "a cat"}\n{"prompt": \n'},
    ),
    Mistake(
        "source of prompts",
        TRAIN + "--prompts.positive genval",
        "prompts.positive = 'genval': no such source (did you mean geneval?); accepted are geneval, shapes, a file ...",
    ),
    Mistake(
        "category",
        TRAIN + "--prompts.negative unsafe --prompts.categories vilence",
        "prompts.categories = 'vilence': accepted is any of hate, ... (did you mean violence?).",
    ),
    Mistake(
        "data set out of reach",
        TRAIN + "--prompts.positive hf:someone/prompts",
        "prompts.positive = 'hf:someone/prompts': cannot be loaded: ... on the Hub ...",
        given=(offline,),
    ),
    Mistake(
        "data sets without their library",
        TRAIN + "--prompts.positive hf:someone/prompts",
        "prompts.positive = 'hf:someone/prompts': this needs the library datasets: pip install ...",
        given=(not_installed("datasets"),),
    ),
]


@pytest.mark.slow
@mistakes(*PROMPTS, *dry(PROMPTS, "no prompt file"))
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
