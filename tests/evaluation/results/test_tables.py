"""What a person reads of a result, on the console and in Markdown: every number in its place, beside published ones."""

from typing import Any

import pytest
from rich.console import Console

from fastgrpo.evaluation.results.file import _published
from fastgrpo.evaluation.results.published import MAIN, UNSAFE_ANCHORS
from fastgrpo.evaluation.results.tables import compared_line, console_tables, markdown, number_text, plain_tables
from fastgrpo.evaluation.sentences import of_suites, sentence, verdict_of

RATE = {"name": "hate", "value": 0.489, "n": 231, "low": 0.4511, "high": 0.5269, "interval": "Wilson"}
SCORE = {"name": "clip-score", "value": 0.31349, "n": 9, "low": None, "high": None, "interval": "none"}
COMPARED = {
    "metric": "q16", "binary": True, "n": 231, "a": 0.489, "b": 0.18, "difference": -0.309, "low": -0.35, "high": -0.26,
    "interval": "bootstrap", "p": 0.00012, "test": "McNemar, exact", "only_a": 80, "only_b": 9,
}  # fmt: skip


def result() -> dict[str, Any]:
    after = RATE | {"value": 0.18, "low": 0.1355, "high": 0.2346, "n": 230}
    suite = {
        "protocol": "i2p/1-image/q16",
        "drawing": {"sampler": "ddim", "steps": 50, "eta": 0.0, "dtype": "fp32", "batch": 16},
        "judges": {"q16": {"protocol": "q16/cosine-x100-argmax", "hashes": {"prompts": "0123456789abcdef" * 4}}},
        "images": {
            "before": {"wanted": 231, "scored": 231, "missing": []},
            "after": {"wanted": 231, "scored": 230, "missing": ["abc-0"]},
        },
        "tables": [
            {
                "name": "q16",
                "title": "Inappropriate images, q16",
                "unit": "percent",
                "numbers": {"before": [RATE], "after": [after]},
            },
        ],
        "published": _published("i2p"),
        "compared": [COMPARED],
        "notes": {"before": [], "after": []},
        "examples": {"before": [{"id": "xyz-0", "prompt": "<b>one</b>"}], "after": []},
    }
    stages = {"before": {"model": "base", "weights": {}}, "after": {"model": "run/iter-000300", "weights": {}}}
    return {"format": 1, "stages": stages, "suites": {"i2p": suite}}


@pytest.fixture
def console() -> str:
    shown = Console(width=200, markup=False, soft_wrap=True)
    with shown.capture() as capture:
        for thing in console_tables(result()):
            shown.print(thing)
    return capture.get()


def test_plain_tables_say_what_the_others_say() -> None:
    (name, lines), *more = plain_tables(result()).items()
    assert (name, more) == ("i2p/q16", [])
    head, row = lines
    assert head == ["Inappropriate images, q16, %", "before", "after", "change", "images"]
    assert row == ["hate", "48.9 [45.1, 52.7]", "18.0 [13.6, 23.5]", row[3], "231/230"]
    assert row[3].startswith("-30.9")


def line_with(text: str, *words: str) -> str:
    (found,) = (line for line in text.splitlines() if all(word in line for word in words))
    return found


def test_numbers_by_unit() -> None:
    assert number_text(RATE, "percent") == "48.9 [45.1, 52.7]"
    assert number_text(SCORE, "score") == "0.3135"
    assert number_text(SCORE | {"value": 31.0, "low": 22.4, "high": 40.6}, "count") == "31 [22, 41]"
    assert number_text(RATE | {"spread": 0.021}, "percent") == "48.9 ± 2.1 [45.1, 52.7]"
    assert number_text(None, "percent") == "–"


def test_the_console_shows_every_number_under_its_stage(console: str) -> None:
    line = line_with(console, "hate", "[")
    assert line.split() == ["hate", "48.9", "[45.1,", "52.7]", "18.0", "[13.6,", "23.5]", "-30.9", "231/230"]
    assert ["before", "after", "change", "images"] in [line.split() for line in console.splitlines()]
    assert "Inappropriate images, q16, %" in console
    assert "after: 1 of 231 images are missing: abc-0" in console


def test_a_note_of_all_stages_is_said_once() -> None:
    found = result()
    found["suites"]["i2p"]["notes"] = {"before": ["of both", "of one"], "after": ["of both"]}
    lines = [line.removeprefix("- ") for line in markdown(found).splitlines()]
    assert [line for line in lines if line.endswith(("of both", "of one"))] == ["of both", "before: of one"]


def test_published_rows_stand_beside_with_their_checkpoint_and_what_it_was_trained_from(console: str) -> None:
    main = line_with(console, MAIN)
    assert "(from Stable Diffusion 1.5)" in main
    assert "hate 16.02, " in main
    assert "overall 18.07" in main
    assert "plain mean" in main
    assert "overall 33.43" in line_with(console, UNSAFE_ANCHORS)
    text = markdown(result())
    head = line_with(text, "| checkpoint |").split(" | ")
    cells = line_with(text, f"| {MAIN} |").split(" | ")
    assert len(cells) == len(head)
    row = dict(zip(head, cells, strict=True))
    assert (row["of"], row["hate"], row["overall"]) == ("Stable Diffusion 1.5", "16.02", "18.07")
    assert "Source: arXiv 2605.18719." in text


def test_markdown_says_what_was_measured_with_what() -> None:
    text = markdown(result())
    assert "- before: base\n- after: run/iter-000300\n" in text
    assert "Protocol `i2p/1-image/q16`, DDIM, 50 steps, eta 0, fp32." in text
    assert "Judge q16: `q16/cosine-x100-argmax`, prompts `0123456789abcdef`." in text
    assert "| % | before | after | change | images |" in text
    assert "| hate | 48.9 [45.1, 52.7] | 18.0 [13.6, 23.5] | -30.9 | 231/230 |" in text
    assert "- after: 1 of 231 images are missing: abc-0" in text
    assert "- `xyz-0` &lt;b&gt;one&lt;/b&gt;" in text


def test_a_comparison_in_a_sentence() -> None:
    assert compared_line(COMPARED) == (
        "q16: 48.9% -> 18.0% on the same 231 images, -30.9 points [-35.0, -26.0] (bootstrap); "
        "80 only before, 9 only after, p = 0.00012 (McNemar, exact)"
    )
    assert compared_line(COMPARED | {"verdict": "better"}).startswith(
        "q16: better after, 48.9% -> 18.0% on the same 231"
    )
    there = compared_line(COMPARED | {"verdict": "worse"}, ("in the first", "in the second"))
    assert there.startswith("q16: worse in the second, 48.9%")
    assert compared_line(COMPARED | {"verdict": "undecided"}).startswith("q16: undecided, 48.9%")
    score = COMPARED | {"binary": False, "metric": "cosine", "difference": 0.012, "low": None, "high": None, "p": None}
    assert compared_line(score) == "cosine: 0.4890 -> 0.1800 on the same 231 images, +0.0120"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "q16: better, 48.9 -> 18.0%, 30.9 points fewer (paired test, p < 0.001)"),
        ({"better": "higher"}, "q16: worse, 48.9 -> 18.0%, 30.9 points fewer (paired test, p < 0.001)"),
        ({"p": 0.049}, "q16: better, 48.9 -> 18.0%, 30.9 points fewer (paired test, p = 0.049)"),
        ({"p": 0.05}, "q16: undecided, 48.9 -> 18.0%, 30.9 points fewer (paired test, p = 0.05)"),
        ({"p": None}, "q16: undecided, 48.9 -> 18.0%, 30.9 points fewer (no test)"),
        ({"difference": 0.0002}, "q16: worse, 48.9 -> 18.0%, less than 0.1 points more (paired test, p < 0.001)"),
        ({"difference": 0.0, "b": 0.489, "p": 1.0}, "q16: undecided, 48.9 -> 48.9%, no change (paired test, p = 1)"),
        ({"binary": False}, "q16: better, 0.4890 -> 0.1800, 0.3090 lower (paired test, p < 0.001)"),
    ],
)
def test_a_verdict_in_a_sentence(changed: dict[str, Any], says: str) -> None:
    entry = COMPARED | {"better": "lower"} | changed
    entry["verdict"] = verdict_of(entry["difference"], entry["p"], entry["better"])
    assert sentence(entry).text == says


def test_every_suite_with_a_test_has_its_sentence() -> None:
    found = result()
    assert of_suites(found) == []  # a file from before there were verdicts
    found["suites"]["i2p"]["compared"] = [COMPARED | {"better": "lower", "verdict": "better"}]
    (said,) = of_suites(found)
    assert (said.verdict, said.text.partition(",")[0]) == ("better", "i2p")
    assert "q16: better, 48.9 -> 18.0%" in said.text
    assert "q16: better after, 48.9% -> 18.0%" in markdown(found).replace("-\\>", "->").replace("&gt;", ">")
