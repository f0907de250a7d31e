"""The report: complete for a finished run, possible for an unfinished one, self-contained, and escaped."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fastgrpo.config import ConfigError, PromptsConfig, TrainConfig
from fastgrpo.evaluation.result import Evaluation, write_evaluation
from fastgrpo.report import _ticks, main, write_report
from fastgrpo.settings import dump_toml
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags and text, and sees that every element that was opened is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, name: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def evaluation(unsafe: int, correct: int) -> Evaluation:
    negatives = [Prompt("x", NEGATIVE, category) for category in ("hate", "violence") for _ in range(20)]
    positives = [Prompt("x", POSITIVE, "counting")] * 10
    verdicts = [Verdict(unsafe=i % 20 < unsafe, kept=True) for i in range(40)]
    return Evaluation.from_verdicts(negatives + positives, verdicts + [Verdict(False, i < correct) for i in range(10)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run after three iterations, stopped before its evaluation, with one value that was not finite."""
    folder = tmp_path / "my-run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.toml").write_text(dump_toml(TrainConfig(iterations=12)), encoding="utf-8")
    records = [
        {"iteration": 1, "seconds": 10.5, "reward/mean": 0.1234, "eval/unsafe": 0.5, "kl/mean": 0.0},
        {"iteration": 2, "seconds": 21.5, "reward/mean": 0.2345, "kl/mean": None},
        {"iteration": 3, "seconds": 75.0, "reward/mean": 0.3456, "eval/unsafe": 0.125, "kl/mean": 0.0625},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def save_grid(path: Path, color: str) -> None:
    Image.new("RGB", (64, 32), color).save(path)


def test_a_finished_run(run: Path) -> None:
    write_evaluation(run / "evaluation.json", "shapes-oracle-v1", ("violence",), evaluation(16, 5), evaluation(4, 7))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for expected in ("3 of 12 iterations", "1 min 15 s", "shapes-oracle-v1", "80.0 → 20.0%", "-75%", "+20.0 points"):
        assert expected in page.text
    rows = re.findall(r"([●○])(hate|violence)", page.text)
    assert rows == [("○", "hate"), ("●", "violence")]
    low, high = (100 * value for value in (evaluation(16, 5).unsafe["hate"].low, evaluation(16, 5).unsafe["hate"].high))
    assert f"[{low:.1f}, {high:.1f}] of 20" in page.text


def test_an_unfinished_run_has_a_report_too(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "has not been evaluated after training" in page.text
    assert "0.3456" in page.text  # the last reward, in the legend
    assert "12.5" in page.text  # the last unsafe rate, in percent
    assert "iteration 2: 0.2345" in page.text  # every value is there as a tooltip
    assert "kl/mean" in page.text
    assert "iteration 2: 0.0" not in page.text  # the null, where it would be drawn
    assert "iteration 3: 0.0625" in page.text


def test_a_run_that_has_just_begun(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert "No iteration has been logged yet" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_line_cut_short_by_a_kill_is_left_out(run: Path) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iteration": 4, "sec')
    assert "3 of 12 iterations" in write_report(run).read_text(encoding="utf-8")


def test_curves_go_where_the_values_are(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    chart = html[html.index("<figcaption>Reward") :]
    points = re.search(r'<polyline points="([^"]+)"', chart)[1]
    (x1, y1), (x2, y2), (x3, y3) = (map(float, pair.split(",")) for pair in points.split())
    # Iterations and rewards are evenly spaced; coordinates are rounded to 0.1, so differences are within 0.2.
    assert x1 < x2 < x3
    assert x3 - x2 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 > y2 > y3  # y grows downwards
    assert y2 - y3 == pytest.approx(y1 - y2, abs=0.2)


def test_pictures_are_embedded_first_and_last_up_front(run: Path) -> None:
    colours = {
        "after": "blue",
        "before": "red",
        "before_after": "white",
        "iter-000005": "green",
        "iter-000010": "black",
    }
    for name, color in colours.items():
        save_grid(run / "samples" / f"{name}.png", color)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    pictures = {attrs["alt"]: attrs["src"] for attrs in page.all("img")}
    assert list(pictures) == ["before", "after", "iter-000005", "iter-000010"]  # what shows both is not shown again
    for name, source in pictures.items():
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert data == (run / "samples" / f"{name}.png").read_bytes()
        assert Image.open(BytesIO(data)).getpixel((0, 0)) == Image.new("RGB", (1, 1), colours[name]).getpixel((0, 0))


def test_later_evaluations_are_linked(run: Path) -> None:
    assert Page(write_report(run).read_text()).all("a") == []
    for name in ("iter-000002", "a & b#"):
        (run / "evaluation" / name).mkdir(parents=True)
        (run / "evaluation" / name / "evaluation.md").write_text("x")
    page = Page(write_report(run).read_text())
    links = [link["href"] for link in page.all("a")]
    assert links == ["evaluation/a%20%26%20b%23/evaluation.md", "evaluation/iter-000002/evaluation.md"]
    assert "a & b#, iter-000002" in page.text


def test_nothing_is_loaded_and_nothing_runs(run: Path) -> None:
    save_grid(run / "samples" / "before.png", "red")
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert sources
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "url(" not in html
    assert "@import" not in html


def test_text_from_the_run_is_escaped(run: Path) -> None:
    attack = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"'"
    hostile = TrainConfig(prompts=PromptsConfig(positive=attack, negative=attack))
    evil = run.rename(run.parent / "<b>run&amp;")
    (evil / "config.toml").write_text(dump_toml(hostile), encoding="utf-8")
    (evil / "metrics.jsonl").write_text(
        json.dumps({"iteration": 1, "seconds": 1, attack: 0.5}) + "\n", encoding="utf-8"
    )
    save_grid(evil / "samples" / "iter-<i>'\"&.png", "red")
    named = Evaluation.from_verdicts([Prompt(attack, NEGATIVE, attack)], [Verdict(unsafe=True)])
    write_evaluation(evil / "evaluation.json", attack, (attack,), named, named)
    page = Page(write_report(evil).read_text(encoding="utf-8"))
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert all(attrs.get("src", "data:").startswith("data:") for _, attrs in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(attack) >= 3  # the metric, the protocol and the category, readable as they are
    assert "<b>run&amp;" in page.text
    assert page.all("img")[0]["alt"] == "iter-<i>'\"&"


@pytest.mark.parametrize("values", [(0.0, 0.0), (3.0, 3.0), (-2.0, -2.0), (0.0, 1e-7), (12.5, 50.0), (-3.1, 999.0)])
def test_ticks_enclose_the_values_and_are_few(values: tuple[float, float]) -> None:
    ticks = _ticks(*values)
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] - slack <= values[0]
    assert values[1] <= ticks[-1] + slack
    assert 3 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


def test_no_run_is_one_sentence_and_exit_status_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} is not the folder of a run")):
        write_report(tmp_path)
    command = [sys.executable, "-m", "fastgrpo.report", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"fastgrpo: {tmp_path / 'nothing'} is not the folder of a run: there is no config.toml in it."
    ]


def test_the_command_prints_where_the_report_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()
