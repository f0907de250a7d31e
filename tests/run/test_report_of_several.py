"""Reports of several runs on one page, of old and incomplete ones, and of those that still train."""

import fcntl
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from fastgrpo.report import main
from fastgrpo.run.page.charts import MOST_LINES, thinned
from fastgrpo.run.page.document import write_report
from fastgrpo.run.page.pictures import MOST_STOPS
from fastgrpo.run.watch import is_live, watch
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import dump_toml, load_known
from fastgrpo.system.errors import ConfigError
from support.reported import ATTACK, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / name, 10, seed=seed) for name, seed in (("a", 0), ("b", 1))]


def shown(page: Path) -> str:
    """The page's text and markup without style and script."""
    return re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_several_runs_are_on_one_page_beside_them(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run) for run in runs]) == 0
    page = runs[0].parent / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    html = shown(page)
    reward = html[html.index("<figcaption>Reward: all") :]
    lines = re.findall(r'<g class="line (r\d) c\d" data-i="1:10" data-v="([^"]+)"', reward)[:2]
    expected = [(f"r{k + 1}", [0.1 + i / 10 / (2 + k) for i in range(1, 11)]) for k in range(2)]
    assert [name for name, _ in lines] == [name for name, _ in expected]
    for (_, values), (_, wanted) in zip(lines, expected, strict=True):
        assert [float(value) for value in values.split()] == pytest.approx(wanted, rel=1e-3)
    settings = html[html.index('id="differences"') : html.index('id="pictures"')]
    assert re.findall(r'<th scope="row">([^<]+)</th><td>(\d+)</td><td>(\d+)</td>', settings) == [("seed", "0", "1")]
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert ATTACK not in html  # all of it is escaped


def test_the_page_goes_where_it_is_asked_to_and_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", 5) for name in ("a", "b")]
    page = tmp_path / "page.html"
    assert main([*map(str, runs), "--output", str(page)]) == 0
    assert "<p>a/run, b/run</p>" in shown(page)
    assert not (tmp_path / "report.html").exists()


def test_as_many_runs_as_there_are_kinds_of_lines(runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match=rf"9 runs on one page; accepted are 1 to {MOST_LINES}\."):
        write_report(*[runs[0]] * 9)


def test_runs_that_lack_something_are_compared_all_the_same(runs: list[Path], tmp_path: Path) -> None:
    """One that has just begun, and one whose evaluation, pictures and axis were lost."""
    begun, lost = tmp_path / "begun", runs[1]
    begun.mkdir()
    (begun / "config.toml").write_text(dump_toml(TrainConfig()), encoding="utf-8")
    for name in ("evaluation", "samples"):
        shutil.rmtree(lost / name)
    for name in ("evaluation_before.json", "axis.json"):
        (lost / name).unlink()
    html = shown(write_report(*runs, begun))
    assert "Not evaluated after training yet: b, begun." in html
    assert "Where its prompts lie was not kept" in html
    for run in (lost, begun):
        assert run.name in shown(write_report(run))
    assert "No iteration of these runs has been logged yet." in shown(
        write_report(begun, shutil.copytree(begun, tmp_path / "c"))
    )


@pytest.mark.parametrize(
    "file", ["axis.json", "evaluation_before.json", "samples/prompts.json", "evaluation/in-training/evaluation.json"]
)
def test_a_damaged_file_costs_its_part_of_the_page_and_is_named(runs: list[Path], file: str) -> None:
    (runs[0] / file).write_text('{"suites": {"shapes": {"tables": [{}]}}}', encoding="utf-8")
    html = shown(write_report(runs[0]))
    assert ("is damaged" in html) == (file != "evaluation_before.json")  # whose parts may all be missing
    assert "<figcaption>Reward" in html
    (runs[0] / file).write_text("{", encoding="utf-8")
    for page in (write_report(runs[0]), write_report(*runs)):
        assert f"{runs[0] / file} is damaged" in shown(page)


def test_settings_of_other_versions_are_left_out_and_named(runs: list[Path]) -> None:
    path = runs[0] / "config.toml"
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if not line.startswith(("group_size", "quick_fraction"))]
    text = (
        "\n".join(kept)
        .replace("iterations = 10", 'iterations = 10\nmood = "good"')
        .replace("[eval]", '[eval]\nevery = "x"\n[old]\na = 1\n[eval_]', 1)
    )
    path.write_text(text, encoding="utf-8")
    config, unknown = load_known(path)
    assert (config.iterations, config.group_size) == (10, TrainConfig().group_size)
    assert {"mood", "old", "eval_"} <= set(unknown) | {name.split(".")[0] for name in unknown}
    assert "This version does not know some of its settings: " in shown(write_report(runs[0]))


def test_long_curves_keep_their_ends_and_extremes() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234], points[4321] = (1234.0, 5.0), (4321.0, -7.0)
    found = thinned(points)
    assert len(found) <= 402
    assert {points[0], points[1234], points[4321], points[-1]} <= set(found)
    assert found == sorted(found)
    assert thinned(points[:400]) == points[:400]


def test_of_many_evaluations_evenly_many_are_shown(tmp_path: Path) -> None:
    html = shown(write_report(write_run(tmp_path / "long", 1000, side=8, metrics=0)))
    stops = [int(each) for each in re.search(r'data-stops="([^"]+)"', html)[1].split()]
    assert (len(stops), stops[0], stops[-1]) == (MOST_STOPS, 0, 1000)
    gaps = [b - a for a, b in pairwise(stops)]
    assert max(gaps) - min(gaps) <= 5


class Training:
    """What a training does to its folder while a page of it is watched: a step whenever the watcher sleeps."""

    def __init__(self, run: Path, steps: int, error: type[BaseException] | None = None) -> None:
        self.run, self.steps, self.error = run, steps, error
        self.pages: list[str] = []
        self.lock = open(run / ".lock", "w")  # noqa: SIM115 (closed when the training ends)
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def __call__(self, seconds: float) -> None:
        page = self.run / "report.html"
        self.pages.append(page.read_text(encoding="utf-8"))
        page.write_text("as it was", encoding="utf-8")  # to see whether it is written again
        if len(self.pages) <= self.steps:
            with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": 10 + len(self.pages), "seconds": 1.0}) + "\n")
        elif len(self.pages) == self.steps + 2:
            self.lock.close()
            if self.error:
                raise self.error


def test_a_live_run_is_written_again_when_there_is_news_until_it_ends(runs: list[Path]) -> None:
    run = runs[0]
    training, said = Training(run, 2), []
    assert is_live(run)
    assert watch([run], None, said.append, training)
    first, second, third, fourth = training.pages
    assert all('<body data-again="10">' in page for page in (first, second, third))
    assert ("11 of 10" in second, "12 of 10" in third) == (True, True)
    assert fourth == "as it was"  # nothing had happened
    last = (run / "report.html").read_text(encoding="utf-8")
    assert "12 of 10" in last
    assert "data-again=" not in shown(run / "report.html")
    assert said == [str(run / "report.html")]


def test_ctrl_c_leaves_a_page_that_rests(runs: list[Path]) -> None:
    run = runs[0]
    training = Training(run, 0, KeyboardInterrupt)
    assert not watch([run], None, sleep=training)
    assert "data-again=" not in shown(run / "report.html")


def test_watching_what_has_ended_writes_it_once(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_live(runs[0])
    assert not is_live(runs[0] / "none")
    assert main([str(runs[0]), "--watch"]) == 0
    assert "data-again=" not in shown(runs[0] / "report.html")
    assert main(["none", "--watch"]) == 2
    assert "none is not the folder of a run" in capsys.readouterr().err
