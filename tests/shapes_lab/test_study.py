"""The study's table against numbers worked out by hand."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.evaluation.results.summary import write_before, write_summary
from fastgrpo.run import best
from fastgrpo.shapes.world import TASKS
from fastgrpo.shapes_lab import study
from fastgrpo.shapes_lab.study_table import read_row, seconds_until_safer, summary, table
from support.evaluation import result_of

CORRECT_BEFORE = dict.fromkeys(TASKS, (30, 40))


def made(folder: Path, unsafe: int, correct: dict[str, tuple[int, int]], **last: float) -> Path:
    """A finished run whose model is trained on hate: unsafe images of 40 after training, from 20."""
    folder.mkdir(parents=True)
    rates = {"hate": (10, 20), "shocking": (10, 20)}
    half = {"hate": (unsafe // 2, 20), "shocking": (unsafe - unsafe // 2, 20)}
    result = result_of((rates, CORRECT_BEFORE), (half, correct), ("hate",))
    write_summary(folder / "evaluation.json", result["suites"]["shapes"])
    write_before(folder, {}, {"eval/unsafe": 0.5, "eval/held_out_mean": 0.25})
    lines = [
        {"iteration": 1, "seconds": 10.0},
        {"iteration": 2, "seconds": 21.5, "eval/unsafe": 0.25, "eval/held_out_mean": 0.3},
        {"iteration": 3, "seconds": 33.4, "eval/unsafe": unsafe / 40, **last},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints").mkdir()
    fell = 0.4 if "guard/alarm" in last else 0.6
    best.record(folder, [asdict(Evaluated(2, "trained", "a", 0.25, 40, fell, 0.5, 0.9, 0.5))])
    return folder


def test_a_row_says_what_a_run_left_and_the_last_the_means(tmp_path: Path) -> None:
    worse = CORRECT_BEFORE | {"colors": (10, 40), "counting": (36, 40)}
    one = made(tmp_path / "one", 4, CORRECT_BEFORE, **{"eval/held_out_mean": 0.5, "guard/alarm": 1.0})
    two = made(tmp_path / "two", 10, worse)
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table({"as it is": {2: two, 1: one}, "no": {}})
    )
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["variant"], row["seed"]) for row in cells] == [(("as it is"), seed) for seed in ("1", "2", "mean")]
    first, second, mean = cells
    assert [row["unsafe, %"] for row in cells] == ["50.0 → 10.0", "50.0 → 25.0", "50.0 → 17.5"]
    assert [row["change"] for row in cells] == ["-80%", "-50%", "-65%"]
    assert [row["never trained, change"] for row in cells] == ["-80%", "-50%", "-65%"]
    # (30 + 30 + 36 + 10 + 30 + 30) / 40 / 6 = 69.2
    assert [row["composition, %"] for row in cells] == ["75.0 → 75.0", "75.0 → 69.2", "75.0 → 72.1"]
    assert first["points"] == "+0.0 [+0.0, +0.0]"
    assert second["points"].startswith("-5.8 [")
    assert mean["points"] == "-2.9"
    assert [row["tasks worse"] for row in cells] == ["–", "colors", "1 in 2 runs"]
    assert [row["kept, %"] for row in cells] == ["70 → 70"] * 3  # of 10 prompts that name an object 7 keep it
    assert [row["held-out reward"] for row in cells] == ["0.250 → 0.500", "0.250 → 0.300", "0.250 → 0.400"]
    assert [row["alarm"] for row in cells] == ["3", "–", "1 of 2"]
    assert [row["composition fell"] for row in cells] == ["2", "–", "1 of 2"]
    assert [row["s to -75%"] for row in cells] == ["33", "–", "33 (1 of 2)"]
    assert [row["colours, bits"] for row in cells] == ["–"] * 3


def test_the_summary_has_means_and_the_seeds_extremes(tmp_path: Path) -> None:
    worse = CORRECT_BEFORE | {"colors": (10, 40), "counting": (36, 40)}
    one = made(tmp_path / "one", 4, CORRECT_BEFORE, **{"eval/held_out_mean": 0.5})
    two = made(tmp_path / "two", 10, worse)
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in summary({1: one, 2: two}))
    assert header[0] == "mean of 2 training seeds"
    rows = {name: (before, after, change) for name, before, after, change in lines}
    assert list(rows)[:2] == ["unsafe images, %", "unsafe images, %: never trained"]
    # 7 of 40 after training on average, from 20; 4 and 10 in the two runs.
    assert rows["unsafe images, %"] == ("50.0", "17.5", "-65% (-80 to -50)")
    assert rows["composition, %"] == ("75.0", "72.1", "-2.9 points (-5.8 to +0.0)")
    assert rows["composition, %: colors"] == ("75.0", "50.0", "-25.0 points (-50.0 to +0.0)")
    assert rows["composition, %: counting"] == ("75.0", "82.5", "+7.5 points (+0.0 to +15.0)")
    assert rows["held-out reward"] == ("0.250", "0.400", "+0.150 (+0.050 to +0.250)")


def test_the_interval_is_the_paired_tests(tmp_path: Path) -> None:
    row = read_row(made(tmp_path / "run", 4, CORRECT_BEFORE | {"colors": (10, 40)}))
    entry = json.loads((tmp_path / "run" / "evaluation.json").read_text())["compared"]["composition"]["overall"]
    assert row.interval == (entry["low"], entry["high"])
    assert row.interval[0] <= entry["difference"] <= row.interval[1] < 0


@pytest.mark.parametrize(
    ("rates", "seconds"), [([0.5, 0.2, 0.1], 30.0), ([0.15, 0.4, 0.1], 10.0), ([0.5, 0.5, 0.3], None), ([], None)]
)
def test_seconds_are_those_of_the_first_evaluation_that_is_so_safe(rates: list[float], seconds: float | None) -> None:
    logged = [{"seconds": 10.0 * (i + 1), "eval/unsafe": rate} for i, rate in enumerate(rates)]
    logged.insert(0, {"seconds": 1.0})
    assert seconds_until_safer({"eval/unsafe": 0.6}, logged) == seconds
    assert seconds_until_safer({}, logged) is None


def test_a_study_repeats_no_run_and_says_which_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer's command line in place of the trainer."""
    asked: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command, **_):
        asked.append(command)
        done = Done()
        folder = Path(command[command.index("--run") + 1])
        if "group" in command:
            done.returncode = 1
        else:
            made(folder, 4, CORRECT_BEFORE)
        return done

    monkeypatch.setattr(study.subprocess, "run", run)
    flags = ["--out", str(tmp_path), "--seeds", "3", "4", "--split", "development", "--jobs", "1"]
    assert study.main(flags) == 1
    assert len(asked) == 2 * len(study.VARIANTS)
    for command in asked:
        assert command[:3] == [sys.executable, "-m", "fastgrpo.train"]
        assert command[command.index("--eval.split") + 1] == "development"
    said = capsys.readouterr().out
    assert "per-group advantages, seed 4: failed" in said
    assert (tmp_path / "development" / "without-kl-seed3").is_dir()
    table_file = (tmp_path / "development" / "table.md").read_text()
    assert table_file.startswith("| mean of 2 training seeds |")
    assert table_file.count("| mean |") == len(study.VARIANTS) - 1
    asked.clear()
    assert study.main(flags) == 1
    assert len(asked) == 2  # those that failed
    assert study.main([*flags, "--variants", "without gaurd"]) == 2
    assert "without gaurd: accepted is any of shapes" in capsys.readouterr().err
