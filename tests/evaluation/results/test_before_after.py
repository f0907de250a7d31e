"""Suite `shapes` before and after training: its rates and tests, the contract of RUN/evaluation.json, and the table."""

import json
import math
import random

import pytest
from rich.console import Console

from fastgrpo.evaluation.results.before_after import Change, changes
from fastgrpo.evaluation.results.summary import read_summary, write_summary
from fastgrpo.evaluation.results.tables import console_tables
from fastgrpo.evaluation.sentences import of_suites
from fastgrpo.evaluation.statistics.intervals import wilson
from fastgrpo.evaluation.suites.base import SuiteResult
from fastgrpo.shapes.world import HAZARDS, TASKS
from fastgrpo.types import Verdict
from support.evaluation import OwnPrompts, Rates, judgement, result_of, verdicts_by_rate

UNSAFE_BEFORE = dict(zip(HAZARDS, [(20, 40), (24, 40), (32, 40), (16, 40), (28, 40), (30, 40), (20, 40)], strict=True))
UNSAFE_AFTER = dict(zip(HAZARDS, [(5, 40), (6, 40), (0, 40), (4, 40), (7, 40), (0, 40), (10, 40)], strict=True))
CORRECT_BEFORE = dict(zip(TASKS, [(54, 60), (30, 60), (20, 60), (40, 60), (15, 50), (12, 60)], strict=True))
CORRECT_AFTER = dict(zip(TASKS, [(57, 60), (30, 60), (26, 60), (40, 60), (20, 50), (12, 60)], strict=True))
TRAINED = ("violence", "shocking")
BEFORE, AFTER = (UNSAFE_BEFORE, CORRECT_BEFORE), (UNSAFE_AFTER, CORRECT_AFTER)
BETTER_RUN, WORSE_RUN = result_of(BEFORE, AFTER, TRAINED), result_of(AFTER, BEFORE, TRAINED)


def shapes(result: dict) -> dict:
    return result["suites"]["shapes"]


def lines(result: dict) -> dict[tuple[str, str], Change]:
    return {(table["name"], row.name): row for table in shapes(result)["tables"] for row in changes(table)}


def compared(result: dict) -> dict[str, dict[str, dict]]:
    return {table["name"]: table["tests"] for table in shapes(result)["tables"]}


def measured(shuffled: bool = False) -> SuiteResult:
    """What the suite finds on the images before training."""
    prompts, verdicts = verdicts_by_rate(*BEFORE)
    suite = OwnPrompts(prompts)
    said = [(id, judgement(verdict)) for id, verdict in zip(suite.prompts, verdicts, strict=True)]
    return suite.result(dict(random.Random(3).sample(said, len(said)) if shuffled else said))


def test_rates_do_not_depend_on_the_order_of_images() -> None:
    assert measured(shuffled=True).tables == measured().tables


def test_rates_are_those_put_in() -> None:
    unsafe, composition, kept = ({n.name: n.estimate for n in t.numbers} for t in measured().tables)
    for category, (hits, n) in UNSAFE_BEFORE.items():
        found = unsafe[category]
        assert (found.value, found.n, found.low, found.high) == (hits / n, n, *wilson(hits, n))
    overall = unsafe["overall"]
    assert (overall.value, overall.n, overall.low, overall.high) == (170 / 280, 280, *wilson(170, 280))
    assert composition["counting"].value == 20 / 60
    # The mean of the task rates, not the pooled 171 / 350: position has fewer prompts.
    mean = (54 / 60 + 30 / 60 + 20 / 60 + 40 / 60 + 15 / 50 + 12 / 60) / 6
    assert composition["overall"].value == pytest.approx(mean, abs=1e-12)
    assert composition["overall"].n == 350
    # 20 prompts of each category name an object; every fourth of those lost it.
    assert kept["hate"].value == 15 / 20
    assert (kept["overall"].value, kept["overall"].n) == (105 / 140, 140)


def test_what_nobody_measured_has_no_table() -> None:
    (table,) = (
        OwnPrompts(verdicts_by_rate({"hate": (1, 1)}, {})[0]).result({"000000": judgement(Verdict(unsafe=True))}).tables
    )
    assert {n.name: n.estimate.value for n in table.numbers} == {"hate": 1.0, "overall": 1.0}


def test_evaluation_json_is_the_contract_and_comes_back_equal(tmp_path) -> None:
    path = tmp_path / "evaluation.json"
    write_summary(path, shapes(BETTER_RUN))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {"protocol", "about", "trained_categories", "before", "after", "compared"}
    assert data["trained_categories"] == list(TRAINED)
    for stage in ("before", "after"):
        assert set(data[stage]) == {"unsafe", "composition", "kept", "variety"}
        assert data[stage]["variety"] == {}  # nothing was left open
        assert set(data[stage]["unsafe"]) == {*HAZARDS, "overall"}
        assert set(data[stage]["composition"]) == {*TASKS, "overall"}
        rows = [row for group in data[stage].values() for row in group.values()]
        assert all(set(row) == {"rate", "n", "low", "high"} for row in rows)
    assert data["before"]["unsafe"]["hate"]["rate"] == 0.5
    read = read_summary(path)
    assert read["protocol"] == shapes(BETTER_RUN)["protocol"]
    again = {(table["name"], row.name): row for table in read["tables"] for row in changes(table)}
    for key, row in lines(BETTER_RUN).items():
        one, two = vars(row), vars(again[key])
        for stage in ("before", "after"):
            given = {name: value for name, value in one.pop(stage).items() if name != "interval"}
            assert two.pop(stage) == given
        assert one == two
    assert of_suites({"suites": {"shapes": read}}) == of_suites(BETTER_RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_files_from_before_there_were_tests_are_read(tmp_path) -> None:
    path = tmp_path / "evaluation.json"
    write_summary(path, shapes(WORSE_RUN))
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: data[key] for key in ("protocol", "trained_categories", "before", "after")}))
    older = read_summary(path)
    assert older["compared"] == []
    unsafe = changes(older["tables"][0])
    assert [row.name for row in unsafe] == [*HAZARDS, "overall", "never trained"]
    assert {row.verdict for row in unsafe} == {""}


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "evaluation.json"
    write_summary(path, shapes(WORSE_RUN))
    old = path.read_bytes()
    broken = json.loads(json.dumps(shapes(WORSE_RUN)))
    broken["tables"][0]["numbers"]["after"][0]["value"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        write_summary(path, broken)
    assert path.read_bytes() == old


def test_changes_are_in_points_and_relative_for_unsafe() -> None:
    found = lines(BETTER_RUN)
    unsafe = {name: row for (table, name), row in found.items() if table == "unsafe"}
    assert list(unsafe) == [*HAZARDS, "overall", "never trained"]
    assert [name for name, row in unsafe.items() if row.trained] == list(TRAINED)
    said = {name: (row.points, row.relative) for name, row in unsafe.items()}
    assert said["hate"] == ("-37.5", "-75%")  # 20 -> 5 of 40
    assert said["violence"] == ("-80.0", "-100%")  # 32 -> 0
    assert said["illegal activity"] == ("-25.0", "-50%")  # 20 -> 10
    assert said["overall"] == ("-49.3", "-81%")  # 170 -> 32 of 280
    assert said["never trained"] == ("-38.0", "-70%")  # 108 -> 32 of 200
    assert (unsafe["never trained"].before or {})["value"] == 108 / 200
    others = {key: row for key, row in found.items() if key[0] != "unsafe"}
    assert others["composition", "counting"].points == "+10.0"  # 20 -> 26 of 60
    assert others["composition", "two_object"].points == "+0.0"
    assert others["composition", "overall"].points == f"{100 * (3 / 60 + 6 / 60 + 5 / 50) / 6:+.1f}"
    assert others["kept", "overall"].points == "+0.0"
    assert {row.relative for row in others.values()} == {""}


def test_nothing_is_called_never_trained_where_that_is_unknown() -> None:
    rows = lines(result_of(BEFORE, AFTER))
    assert {row.trained for row in rows.values()} == {None}
    assert [key for key, row in rows.items() if row.is_sum] == [
        (t, "overall") for t in ("unsafe", "composition", "kept")
    ]


@pytest.mark.parametrize(
    ("before", "after", "relative"),
    [
        ((0, 10), (1, 10), ""),
        ((5, 10), (9, 10), "+80%"),
        ((5, 9), (9, 9), ""),
    ],
)
def test_no_relative_change_from_zero_or_of_fewer_than_ten_images(before, after, relative: str) -> None:
    rows = lines(result_of(({"hate": before}, {}), ({"hate": after}, {})))
    assert {rows["unsafe", name].relative for name in ("hate", "overall")} == {relative}


def exact_p(only_before: int, only_after: int) -> float:
    """McNemar's, summed up in whole numbers."""
    n = only_before + only_after
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_before, only_after) + 1)) / 2**n)


def test_every_row_is_tested_on_its_own_images() -> None:
    # In these verdicts the first images of a row are the unsafe ones: a rate that falls by k images flips k, one way.
    found = compared(BETTER_RUN)
    unsafe = found["unsafe"]
    assert set(unsafe) == {*HAZARDS, "never trained", "overall"}
    for name in HAZARDS:
        flips = UNSAFE_BEFORE[name][0] - UNSAFE_AFTER[name][0]
        assert (unsafe[name]["only_a"], unsafe[name]["only_b"], unsafe[name]["n"]) == (flips, 0, 40)
        assert unsafe[name]["p"] == pytest.approx(exact_p(flips, 0), rel=1e-9)
        assert unsafe[name]["verdict"] == "better"
    assert (unsafe["never trained"]["only_a"], unsafe["never trained"]["n"]) == (108 - 32, 200)
    assert (unsafe["overall"]["only_a"], unsafe["overall"]["n"]) == (170 - 32, 280)
    assert unsafe["overall"]["p"] == pytest.approx(exact_p(138, 0), rel=1e-9)
    composition = found["composition"]
    assert composition["counting"]["p"] == pytest.approx(exact_p(0, 6), rel=1e-9)  # 1 / 32
    assert composition["counting"]["verdict"] == "better"
    assert composition["position"]["p"] == pytest.approx(exact_p(0, 5), rel=1e-9)  # 1 / 16
    assert composition["position"]["verdict"] == "undecided"
    assert found["kept"]["overall"]["verdict"] == "undecided"
    worse = compared(WORSE_RUN)
    assert {row["verdict"] for row in worse["unsafe"].values()} == {worse["composition"]["counting"]["verdict"]}
    assert worse["composition"]["counting"]["verdict"] == "worse"


def test_the_tested_composition_is_the_tables_even_where_tasks_have_other_numbers_of_prompts() -> None:
    overall, row = compared(BETTER_RUN)["composition"]["overall"], lines(BETTER_RUN)["composition", "overall"]
    rates = (row.before or {})["value"], (row.after or {})["value"]
    assert (overall["a"], overall["b"]) == pytest.approx(rates, abs=1e-12)
    assert overall["difference"] == pytest.approx(rates[1] - rates[0], abs=1e-12)
    assert overall["test"] == "paired bootstrap over prompts"
    alike = result_of(({}, {"a": (3, 20), "b": (5, 20)}), ({}, {"a": (4, 20), "b": (9, 20)}))
    assert compared(alike)["composition"]["overall"]["test"] == "McNemar, exact"


def test_the_sentence_says_better_worse_or_undecided_in_points() -> None:
    assert [said.text for said in of_suites(BETTER_RUN)] == [
        "unsafe: better, 60.7 -> 11.4%, 49.3 points fewer (paired test, p < 0.001)",
        "composition: better, 48.3 -> 52.5%, 4.2 points more (paired test, p < 0.001)",
    ]
    assert [said.text for said in of_suites(WORSE_RUN)] == [
        "unsafe: worse, 11.4 -> 60.7%, 49.3 points more (paired test, p < 0.001)",
        "composition: worse, 52.5 -> 48.3%, 4.2 points fewer (paired test, p < 0.001)",
    ]
    unsafe: Rates = {"hate": (0, 20)}
    little = result_of((unsafe, {"colors": (7, 20)}), (unsafe, {"colors": (9, 20)}))
    assert [said.text for said in of_suites(little)] == [
        "unsafe: undecided, 0.0 -> 0.0%, no change (paired test, p = 1)",
        "composition: undecided, 35.0 -> 45.0%, 10.0 points more (paired test, p = 0.5)",
    ]


def shown(result: dict, width: int = 80, **options) -> list[str]:
    console = Console(width=width, **options)
    with console.capture() as capture:
        for table in console_tables(result):
            if not isinstance(table, str):
                console.print(table)
    return capture.get().splitlines()


def test_table_shows_marks_rates_and_intervals() -> None:
    found = shown(BETTER_RUN, markup=False)  # brackets must survive with and without markup
    assert shown(BETTER_RUN) == found
    assert max(map(len, found)) <= 80
    low, high = (100 * value for value in wilson(20, 40))
    hate = next(line for line in found if " hate " in line)
    assert "○ hate" in hate
    assert f"50.0 [{low:.1f}, {high:.1f}]" in hate
    assert hate.split()[-4:] == ["-37.5", "(-75%)", "better", "40"]
    assert any("● violence" in line for line in found)
    assert any("overall" in line and "60.7" in line and "-49.3 (-81%)" in line for line in found)
    assert any("never trained" in line and "54.0" in line and "(-70%)" in line for line in found)
    assert next(line for line in found if "counting " in line).split()[-3:] == ["+10.0", "better", "60"]
    assert next(line for line in found if "position " in line).split()[-2:] == ["+10.0", "50"]
    assert any("280 unsafe" in str(line) or "composition prompts" in str(line) for line in console_tables(BETTER_RUN))


def test_what_got_worse_says_so_and_is_red_on_a_terminal() -> None:
    hate = next(line for line in shown(WORSE_RUN) if " hate " in line)
    assert hate.split()[-4:] == ["+37.5", "(+300%)", "worse", "40"]
    red = next(line for line in shown(WORSE_RUN, force_terminal=True, color_system="standard") if "hate" in line)
    assert "31m" in red
    green = next(line for line in shown(BETTER_RUN, force_terminal=True, color_system="standard") if "hate" in line)
    assert "32m" in green
    assert "31m" not in green
