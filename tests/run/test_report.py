"""The report: complete for a finished run, possible for an unfinished one, self-contained, and escaped."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.evaluation.results.file import write
from fastgrpo.evaluation.results.summary import write_before, write_summary
from fastgrpo.evaluation.statistics.intervals import wilson
from fastgrpo.report import main
from fastgrpo.run import best
from fastgrpo.run.page import charts, results
from fastgrpo.run.page.charts import Panel, axis_ticks, chart
from fastgrpo.run.page.document import write_report
from fastgrpo.settings.schema import PromptsConfig, TrainConfig
from fastgrpo.settings.toml import dump_toml
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.sheets import CAPTION_WIDTH, GAP
from fastgrpo.types import NEGATIVE, POSITIVE
from support.evaluation import Rates, result_of

VOID = {"meta", "img", "input"}


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
        self.text += data if self.open[-1:] not in (["style"], ["script"]) else ""

    def verdicts(self) -> list[dict[str, str]]:
        """List items with a word of what became of something."""
        return [attrs for attrs in self.all("li") if "class" in attrs]

    def all(self, name: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.tags if tag == name]


TRAINED = ("violence",)


def rates(unsafe: int, correct: int) -> tuple[Rates, Rates]:
    """Of 20 images of each of two hazards, and 10 of a task."""
    return {"hate": (unsafe, 20), "violence": (unsafe, 20)}, {"counting": (correct, 10)}


def evaluate(run: Path, before: tuple[Rates, Rates], after: tuple[Rates, Rates]) -> None:
    """Leave the results of suite `shapes`, as a training does."""
    result = result_of(before, after, TRAINED)
    folder = run / "evaluation" / "in-training"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, result)
    write_summary(run / "evaluation.json", result["suites"]["shapes"])


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


def drawing(html: str, title: str) -> str:
    """From where a chart is drawn."""
    return html[html.index('<svg viewBox="0 0 320 160"', html.index(f"<figcaption>{title}")) :]


def curve(html: str, title: str) -> list[tuple[float, ...]]:
    """Where a chart's first line goes."""
    points = re.search(r'<polyline points="([^"]+)"', drawing(html, title))[1]
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


def save_grid(path: Path, color: str) -> None:
    Image.new("RGB", (64, 32), color).save(path)


def test_a_finished_run(run: Path) -> None:
    evaluate(run, rates(16, 5), rates(4, 7))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for expected in ("3 of 12 iterations", "1 min 15 s", "80.0 → 20.0%", "-60.0 points (-75%)", "+20.0 points"):
        assert expected in page.text
    assert "unsafe: better, 80.0 → 20.0%, 60.0 points fewer (paired test, p < 0.001)" in page.text
    assert "composition: undecided, 50.0 → 70.0%, 20.0 points more (paired test, p = 0.5)" in page.text
    assert "read back by the shapes oracle" in page.text
    rows = re.findall(r"([●○])(hate|violence)", page.text)
    assert rows == [("○", "hate"), ("●", "violence")]
    low, high = wilson(16, 20)
    assert f"[{100 * low:.1f}, {100 * high:.1f}] of 20" in page.text


def test_alarms_of_the_guard(run: Path) -> None:
    """When they were on and why; nothing where nothing was watched."""
    assert "Guard" not in Page(write_report(run).read_text(encoding="utf-8")).text
    seen = [(0, 0.9), (1, 0.4), (1, 0.35), (0, 0.55), (1, 0.45)]
    records = [
        {"iteration": i, "seconds": 1.0, "guard/alarm": alarm, "guard/diversity_within": within, "guard/alignment": -1}
        for i, (alarm, within) in enumerate(seen, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert (
        "Alarm in iterations 2 to 3: the diversity of a positive prompt's images 40% of it, below 50% of" in page.text
    )
    assert "-1.00, more than 0.25 standard deviations below the base model's" in page.text
    assert "Alarm in iteration 5: the diversity of a positive prompt's images 45%" in page.text
    assert [attrs["class"] for attrs in page.verdicts()] == ["worse", "worse"]
    (run / "metrics.jsonl").write_text(json.dumps(records[0]) + "\n", encoding="utf-8")
    assert "No alarm in 1 iterations" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_how_far_pictures_moved_and_the_best_checkpoint_are_told(run: Path) -> None:
    vendi = {"before": 8.0, "after": 6.0, "ratio": 0.75, "low": 0.7, "high": 0.8}
    mmd = {"value": 0.0125, "low": 0.01, "high": 0.015, "p": 0.0001}
    distance = {"suite": "shapes", "encoder": "shapes", "images": 10, "mmd": mmd, "vendi": vendi}
    (run / "evaluation" / "in-training").mkdir(parents=True)
    write(run / "evaluation" / "in-training", result_of(rates(16, 5), rates(4, 7), TRAINED) | {"distance": distance})
    evaluated = Evaluated(3, "trained", "a", 0.25, 40, 0.4, 0.5, 0.75, 0.5)
    (run / "checkpoints").mkdir()
    best.record(run, [asdict(evaluated)])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "a squared MMD of 0.0125 [0.0100, 0.0150] (permutation test, p < 0.001)" in page.text
    assert "diversity: worse, Vendi score 8.0 → 6.0, 0.75 [0.70, 0.80] of before" in page.text
    assert {"class": "worse"} in page.verdicts()
    assert "There is no best checkpoint, composition is below 0.500 after iteration 3. The rule: fewest" in page.text
    assert "squared MMD of 0.0125" in (run / "evaluation" / "in-training" / "evaluation.md").read_text(encoding="utf-8")


def test_what_got_worse_looks_worse(run: Path) -> None:
    """In the words, and in the classes that colour, frame and bolden it; what is better or undecided does not."""
    looks = {}
    for name, (before, after) in {"worse": (4, 16), "better": (16, 4), "undecided": (8, 9)}.items():
        evaluate(run, rates(before, 5), rates(after, 5))
        page = Page(write_report(run).read_text(encoding="utf-8"))
        assert f"unsafe: {name}, " in page.text
        looks[name] = [
            attrs["class"] for tag, attrs in page.tags if tag in ("li", "div") and "worse" in attrs.get("class", "")
        ]
        assert page.verdicts()[0]["class"] == name
        assert (" points (+300%) worse" in page.text) == (name == "worse")
    assert looks == {"worse": ["worse", "tile worse", "tile worse"], "better": [], "undecided": []}


def test_a_run_of_an_earlier_version_is_reported_and_of_a_still_earlier_one_without_sentences(run: Path) -> None:
    evaluate(run, rates(16, 5), rates(4, 7))
    whole = write_report(run).read_text(encoding="utf-8")
    shutil.rmtree(run / "evaluation")
    old = write_report(run).read_text(encoding="utf-8")  # of the version that had evaluation.json alone
    assert Page(old).verdicts() == Page(whole).verdicts()
    assert [re.sub("<[^>]*>", "", line) for line in re.findall("<tr.*?</tr>", old) if "group" not in line] == [
        re.sub("<[^>]*>", "", line) for line in re.findall("<tr.*?</tr>", whole) if "group" not in line
    ]
    data = json.loads((run / "evaluation.json").read_text())
    older = {key: data[key] for key in ("protocol", "trained_categories", "before", "after")}
    (run / "evaluation.json").write_text(json.dumps(older), encoding="utf-8")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.verdicts() == []
    assert "paired test" not in page.text
    assert "Protocol shapes-oracle-v3-test." in page.text
    assert "-60.0 points (-75%)" in page.text


def test_the_suites_a_run_was_evaluated_with_have_their_sentences(run: Path) -> None:
    """Also where there is nothing else to say of before and after, as for any model but the embedded one."""
    entry = {
        "metric": "q16",
        "binary": True,
        "n": 50,
        "a": 0.2,
        "b": 0.5,
        "difference": 0.3,
        "p": 0.002,
        "better": "lower",
    }
    suites = {"i2p": {"compared": [entry | {"verdict": "worse"}]}, "old": {"compared": [entry]}}
    folder = run / "evaluation" / "in-training"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"suites": suites}))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "i2p, q16: worse, 20.0 → 50.0%, 30.0 points more (paired test, p = 0.002)" in page.text
    assert [item["class"] for item in page.verdicts()] == ["worse"]
    assert "has not been evaluated" not in page.text


def test_curves_begin_before_training(run: Path) -> None:
    """At iteration 0, with what was measured then."""
    write_before(run, {}, {"eval/unsafe": 0.8, "eval/unsafe_hate": 0.8, "eval/held_out_mean": 0.25})
    html = write_report(run).read_text(encoding="utf-8")
    (x0, y0), (x1, y1), (x3, y3) = curve(html, "Unsafe images")
    assert x0 == 46  # the axis
    assert x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2)  # iterations 0, 1 and 3
    assert y3 - y1 == pytest.approx((y1 - y0) * 37.5 / 30, abs=0.3)  # 80, 50 and 12.5%
    assert 'data-i="0 1 3" data-v="80 50 12.5"' in drawing(html, "Unsafe images")
    assert "80 → 12.5" in html
    assert "eval/unsafe_hate" in html
    assert "eval/held_out_mean" in html


def test_charts_can_be_read_without_seeing_them_and_without_colour() -> None:
    records = [{"iteration": i, "a": 0.125 * i, "b": 0.5, "c": 0.375 - 0.125 * i} for i in range(4)]
    page = Page(chart(Panel("Three", {"a": "one", "b": "two", "c": "the third"}, 100, "%"), records))
    *samples, svg = page.all("svg")
    assert svg["role"] == "img"
    words = "one: 0 before training, 37.5 at iteration 3; 4 values from 0 to 37.5."
    assert svg["aria-label"].startswith(f"Three, %. {words} two: 50 before training, 50 at iteration 3;")
    assert "the third: 37.5 before training, 0 at iteration 3; 4 values from 0 to 37.5." in svg["aria-label"]
    inside = [tag for tag, _ in page.tags][page.tags.index(("svg", svg)) + 1 :]
    assert inside[0] == "desc"
    assert words in page.text
    # Each series has a class of its own, for its dash and colour, and a marker of its own: in the chart and in the
    # legend.
    assert [sample["class"] for sample in samples] == [f"sample line s{k} c{k}" for k in (1, 2, 3)]
    assert {sample["aria-hidden"] for sample in samples} == {"true"}
    for shape in ("circle", "rect", "path"):
        assert len([attrs for attrs in page.all(shape) if attrs.get("class") == "dot"]) == 4 + 1
    style = Path(charts.__file__).with_name("page.css").read_text(encoding="utf-8")
    dashes = re.findall(r"\.c\d \{[^}]*--dash: ([^;]+);", style)
    assert len(dashes) == len(set(dashes)) == charts.MOST_LINES


def test_an_unfinished_run_has_a_report_too(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert "has not been evaluated after training" in page.text
    assert "0.3456" in page.text  # the last reward, in the legend
    assert "12.5" in page.text  # the last unsafe rate, in percent
    assert 'data-i="1:3" data-v="0.1234 0.2345 0.3456"' in drawing(html, "Reward")  # every value is there to be read
    assert 'data-i="1 3" data-v="0 0.0625"' in drawing(html, "kl/mean")  # not the null


def test_a_run_that_has_just_begun(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert "No iteration has been logged yet" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_line_cut_short_by_a_kill_is_left_out(run: Path) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iteration": 4, "sec')
    assert "3 of 12 iterations" in write_report(run).read_text(encoding="utf-8")


def test_curves_go_where_the_values_are(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    (x1, y1), (x2, y2), (x3, y3) = curve(html, "Reward")
    # Iterations and rewards are evenly spaced; coordinates are rounded to 0.1, so differences are within 0.2.
    assert x1 < x2 < x3
    assert x3 - x2 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 > y2 > y3  # y grows downwards
    assert y2 - y3 == pytest.approx(y1 - y2, abs=0.2)


def save_rows(path: Path, colors: list[str]) -> None:
    """A grid as a training draws it, a row of one picture for each colour."""
    sheet = Image.new("RGB", (CAPTION_WIDTH + 64 + GAP, len(colors) * (64 + GAP)), "white")
    for row, color in enumerate(colors):
        sheet.paste(Image.new("RGB", (64, 64), color), (CAPTION_WIDTH, row * (64 + GAP)))
    sheet.save(path)


def write_prompts(run: Path, *texts: str) -> None:
    """Of the rows of the grids: the first asks for something unsafe."""
    rows = [
        {"text": text, "label": POSITIVE if number else NEGATIVE, "category": "" if number else "violence", "id": 0}
        for number, text in enumerate(texts)
    ]
    (run / "samples" / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")


def colour(picture: dict[str, str]) -> tuple[int, ...]:
    """In the middle of an <img>, to the nearest half: WebP changes a little."""
    data = base64.b64decode(picture["src"].removeprefix("data:image/webp;base64,"))
    with Image.open(BytesIO(data)) as image:
        assert (image.width, image.height) == (int(picture["width"]), int(picture["height"]))
        middle = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
    return tuple(round(value / 255) for value in middle)


def test_each_prompt_has_its_pictures_of_every_evaluation(run: Path) -> None:
    """Those before training stay beside them, and the last show where nothing moves the slider."""
    write_prompts(run, "a <b>knife</b>", "a cat")
    drawn = {"before": ["red", "lime"], "iter-000010": ["black", "blue"], "iter-000005": ["yellow", "cyan"]}
    for name, colors in (drawn | {"after": ["blue", "white"], "before_after": ["white", "white"]}).items():
        save_rows(run / "samples" / f"{name}.png", colors)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    knife, cat = [p for p in page.all("img") if "knife" in p["alt"]], [p for p in page.all("img") if "cat" in p["alt"]]
    when = ["before training", "before training", "after iteration 5", "after iteration 10", "after training"]
    assert [picture["alt"] for picture in knife] == [f"a <b>knife</b>, drawn {each}" for each in when]
    assert [colour(picture) for picture in knife] == [(1, 0, 0), (1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 0, 1)]
    assert [colour(picture) for picture in cat] == [(0, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 1, 1)]
    assert ["hidden" in picture for picture in knife] == [False, True, True, True, False]
    assert [picture["data-at"] for picture in knife[1:]] == ["0", "5", "10", "12"]
    (slider,) = [each for each in page.all("input") if each["id"] == "stop"]
    assert (slider["max"], slider["value"], slider["data-stops"]) == ("3", "3", "0 5 10 12")
    assert "a <b>knife</b> violence" in page.text


def test_grids_of_other_shapes_and_files_that_are_no_pictures(run: Path) -> None:
    """Are shown whole, as those of runs that did not write their prompts, and left out."""
    save_grid(run / "samples" / "before.png", "red")
    save_grid(run / "samples" / "iter-000002.png", "blue")
    (run / "samples" / "iter-000003.png").write_bytes(b"no picture")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert [p["alt"] for p in page.all("img")] == [
        "Pictures drawn before training",
        "Pictures drawn before training",
        "Pictures drawn after iteration 2",
    ]
    assert [colour(picture) for picture in page.all("img")] == [(1, 0, 0), (1, 0, 0), (0, 0, 1)]


def write_verdicts(run: Path, stage: str, values: dict[str, float], binary: bool = True, better: str = "lower") -> Path:
    """Of suite `custom`, whose pictures are named by numbers."""
    folder = run / "evaluation" / "in-training" / stage / "custom"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    metric = {"name": "q16", "binary": binary, "better": better, "values": values}
    (folder / "custom.verdicts.json").write_text(json.dumps({"format": 1, "metrics": [metric]}), encoding="utf-8")
    rows = [{"id": id, "text": f"<i>prompt</i> {id}"} for id in values]
    (folder / "manifest.json").write_text(json.dumps({"images": rows}), encoding="utf-8")
    for id in values:
        save_grid(folder / "images" / f"{id}.png", "red" if stage == "before" else "blue")
    return folder


def test_what_fails_after_training_is_shown_what_had_passed_first(run: Path) -> None:
    write_verdicts(run, "before", {"1": 1.0, "2": 0.0, "3": 0.0, "4": 1.0})
    folder = write_verdicts(run, "after", {"1": 1.0, "2": 0.0, "3": 1.0, "4": 0.0})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "custom: q16" in page.text
    assert "2 of 4 pictures fail, 1 of which passed before training" in page.text
    shown = [(picture["alt"], colour(picture)) for picture in page.all("img")]
    assert shown == [
        (f"<i>prompt</i> {id}, drawn {stage} training", color)
        for id in ("3", "1")
        for stage, color in (("before", (1, 0, 0)), ("after", (0, 0, 1)))
    ]
    (folder / "images" / "3.png").unlink()
    shutil.rmtree(folder.parents[1] / "before")
    assert "The picture is not there any more" in Page(write_report(run).read_text(encoding="utf-8")).text
    write_verdicts(run, "after", {"../../x": 1.0})
    assert not Page(write_report(run).read_text(encoding="utf-8")).all("img")  # a name, not a path


@pytest.mark.parametrize(("better", "first"), [("lower", "3"), ("higher", "1")])
def test_of_values_without_a_limit_the_worst_are_shown(run: Path, better: str, first: str) -> None:
    write_verdicts(run, "after", {"1": 0.1, "2": 0.2, "3": 0.3}, binary=False, better=better)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.all("img")[0]["alt"] == f"<i>prompt</i> {first}, drawn after training"


def test_later_evaluations_are_linked(run: Path) -> None:
    assert not [link for link in Page(write_report(run).read_text()).all("a") if link["href"][0] != "#"]
    for name in ("iter-000002", "a & b#"):
        (run / "evaluation" / name).mkdir(parents=True)
        (run / "evaluation" / name / "evaluation.md").write_text("x")
    page = Page(write_report(run).read_text())
    links = [link["href"] for link in page.all("a") if link["href"][0] != "#"]
    assert links == ["evaluation/a%20%26%20b%23/evaluation.md", "evaluation/iter-000002/evaluation.md"]
    assert "a & b#, iter-000002" in page.text


def test_nothing_is_loaded_and_nothing_but_the_pages_own_script_may_run(run: Path) -> None:
    save_grid(run / "samples" / "before.png", "red")
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    assert not any("style" in attrs for _, attrs in page.tags)  # which the policy would not let apply
    sources = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert [value for value in sources if value.startswith("data:image/webp;base64,")]
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in sources)
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
    write_prompts(evil, attack)
    save_rows(evil / "samples" / "before.png", ["red"])
    named = {attack: (1, 1)}, {attack: (1, 1)}
    suite = result_of(named, named, (attack,))["suites"]["shapes"]
    write_summary(evil / "evaluation.json", suite | {"notes": {"before": [attack]}})
    page = Page(write_report(evil).read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
    assert all(attrs.get("src", "data:").startswith("data:") for _, attrs in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(attack) >= 3  # the metric, the protocol and the category, readable as they are
    assert "<b>run&amp;" in page.text
    assert page.all("img")[0]["alt"] == f"{attack}, drawn before training"


@pytest.mark.parametrize("values", [(0.0, 0.0), (3.0, 3.0), (-2.0, -2.0), (0.0, 1e-7), (12.5, 50.0), (-3.1, 999.0)])
def test_ticks_enclose_the_values_and_are_few(values: tuple[float, float]) -> None:
    ticks = axis_ticks(*values)
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


def test_entropies_are_in_bits_and_may_lack_an_interval() -> None:
    number = {"name": "shapes", "value": 1.5, "n": 4, "low": 1.25, "high": 2.0}
    assert results.number(number, "score") == "1.5000 <small><span>[1.2500, 2.0000]</span> <span>of 4</span></small>"
    assert results.number(number | {"low": None}, "score") == "1.5000 <small><span>of 4</span></small>"
    rate = {"name": "overall", "value": 0.25, "n": 8, "low": 0.125, "high": 0.5}
    assert results.number(rate, "percent") == "25.0 <small><span>[12.5, 50.0]</span> <span>of 8</span></small>"
