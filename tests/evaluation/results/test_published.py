"""The published rows: their arithmetic, and that they can stand beside our own numbers."""

import math
from collections import Counter

import pytest

from fastgrpo.evaluation.results.published import (
    CLIP_SCORE,
    COMPOSITION,
    COSINE,
    COUNT,
    DETECTIONS,
    DISTANCE,
    FID,
    MAIN,
    NUDITY_ONLY,
    PERCENT,
    ROWS,
    SOURCE,
    UNNAMED,
    UNSAFE_ANCHORS,
    PublishedRow,
    published,
)
from fastgrpo.evaluation.results.summary import OVERALL
from fastgrpo.shapes.world import HAZARDS, TASKS

I2P_ROWS = {
    "hate": 231,
    "harassment": 824,
    "violence": 756,
    "self-harm": 801,
    "sexual": 931,
    "shocking": 856,
    "illegal activity": 727,
}
HALF_A_TENTH = 0.05  # what a number printed with one decimal may be off by, so a mean of such numbers too


def row(suite: str, label: str) -> PublishedRow:
    (found,) = (row for row in published(suite) if row.label == label)
    return found


def plain(row: PublishedRow) -> float:
    return sum(v for name, v in row.values.items() if name != OVERALL) / (len(row.values) - 1)


def by_size(row: PublishedRow) -> float:
    return sum(row.values[name] * n for name, n in I2P_ROWS.items()) / sum(I2P_ROWS.values())


def test_overall_of_the_main_checkpoint_is_the_plain_mean_of_the_seven() -> None:
    main = row("i2p", MAIN)
    # Printed with two decimals, of 18.0757: cut, not rounded.
    assert math.floor(100 * plain(main)) / 100 == main.values[OVERALL] == 18.07
    assert abs(by_size(main) - main.values[OVERALL]) > 0.04
    assert "plain mean" in main.note


@pytest.mark.parametrize("label", ["SD 1.4", "CASTEER"])
def test_overall_of_these_baselines_is_weighted_by_category_size(label: str) -> None:
    baseline = row("i2p", label)
    # The printed overall is off by half a tenth, and so may be the mean of rates that are.
    assert abs(by_size(baseline) - baseline.values[OVERALL]) <= 2 * HALF_A_TENTH
    assert abs(plain(baseline) - baseline.values[OVERALL]) > 2 * HALF_A_TENTH
    assert "weighted" in baseline.note


@pytest.mark.parametrize("label", ["SLD", "ESD-u"])
def test_where_a_row_does_not_give_its_overall_number_the_note_says_what_it_gives(label: str) -> None:
    baseline = row("i2p", label)
    for mean in (plain(baseline), by_size(baseline)):
        assert abs(mean - baseline.values[OVERALL]) > 2 * HALF_A_TENTH
        assert f"{mean:.1f}" in baseline.note
    assert f"not {baseline.values[OVERALL]}" in baseline.note


@pytest.mark.parametrize(("label", "overall"), [("SD 1.4", 42.08), (COMPOSITION, 47.83)])
def test_geneval_overall_is_the_mean_of_six(label: str, overall: float) -> None:
    assert tuple(row("geneval", label).values) == (*TASKS, OVERALL)
    assert round(plain(row("geneval", label)), 2) == row("geneval", label).values[OVERALL] == overall


def test_every_headline_number_belongs_to_its_checkpoint() -> None:
    assert row("nudity", MAIN).values == {DETECTIONS: 31}
    assert row("nudity", UNSAFE_ANCHORS).values == {DETECTIONS: 15}
    assert row("i2p", UNSAFE_ANCHORS).values == {OVERALL: 33.43}
    assert row("geneval", NUDITY_ONLY).values == {OVERALL: 44.12}
    assert row("clip-score", UNNAMED).values == {CLIP_SCORE: 0.311}
    assert row("fid", UNNAMED).values == {FID: 52.28}
    assert sorted(row("attacks", UNNAMED).values.values()) == [2.6, 89.5]


def test_rows_are_whole() -> None:
    assert Counter(row.suite for row in ROWS) == {
        "nudity": 10,
        "i2p": 6,
        "geneval": 4,
        "clip-score": 3,
        "fid": 4,
        "attacks": 2,
    }
    assert len({(row.suite, row.label) for row in ROWS}) == len(ROWS)
    units = {"nudity": COUNT, "clip-score": COSINE, "fid": DISTANCE}
    for entry in ROWS:
        assert entry.unit == units.get(entry.suite, PERCENT)
        assert (entry.source, bool(entry.base), bool(entry.protocol)) == (SOURCE, True, True)
        assert set(entry.values) <= {*HAZARDS, *TASKS, OVERALL} or entry.suite in (
            "nudity",
            "clip-score",
            "fid",
            "attacks",
        )
        assert all(0 <= value <= 100 for value in entry.values.values()) or entry.unit in (COUNT, DISTANCE)
        if entry.suite in ("i2p", "geneval"):
            assert (len(entry.values) == 1) == ("only the overall" in entry.note)


def test_a_suite_that_was_never_published_has_no_rows() -> None:
    assert published("shapes") == ()
