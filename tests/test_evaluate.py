"""`python -m fastgrpo.evaluate`: tables of the shapes world, every suite's arithmetic, kills, comparisons, refusals."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastgrpo import evaluate, train
from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.images import folder as images_module
from fastgrpo.evaluation.images.files import read_image
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.metrics.inception import InceptionV3
from fastgrpo.evaluation.results import comparison
from fastgrpo.evaluation.results.tables import escape, one_line
from fastgrpo.evaluation.suites import base
from fastgrpo.evaluation.suites.base import Loader, Metric
from fastgrpo.evaluation.suites.custom import ALL, PromptSuite
from fastgrpo.evaluation.suites.geneval import GenEvalSuite
from fastgrpo.evaluation.suites.i2p import BY_SIZE, PLAIN, I2PSuite, NuditySuite
from fastgrpo.evaluation.suites.prompt_table import PromptRow, image_requests
from fastgrpo.evaluation.suites.registry import Overrides, make_suites
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.settings.suites import SuiteSettings
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes.world import HAZARDS, TASKS
from fastgrpo.system.errors import ConfigError
from support.files import content, write_csv
from support.mask2former import tiny_model

pytestmark = pytest.mark.slow

DRAWING = Drawing("none", {"unet": "0"}, 1, 1.0, "fp32", 16)
HOSTILE = (
    "<script>alert(1)</script> | a & b",
    "line one\nline two\r\n| three |",
    "x" * 10_000,
    "🙂 👩‍🚀 \u202eright to left\u202c ‏",
    "[a link](http://example.com) `code` **bold** :bomb: [bold]rich[/bold]",
)


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration on the shipped model, evaluated by the trainer on two prompts of every kind."""
    folder = tmp_path_factory.mktemp("evaluate") / "short"
    flags = (
        "--iterations 1 --prompts-per-iteration 2 --group-size 2 --updates-per-iteration 1 --rollout.steps 4 "
        "--grpo.drop-last-steps 1 "
    )
    flags += (
        "--eval.unsafe-per-category 2 --eval.composition-per-task 2 --eval.every 0 --engine.device cpu "
        "--optim.lr 0.003 --rollout.decode-batch 16 --model.lora-rank 0"
    )
    assert train.main(["shapes", "--run", str(folder), *flags.split()]) == 0
    return folder


SMALL = ["--device", "cpu"]  # the run's own numbers of prompts, steps and seed


@pytest.fixture(scope="module")
def results(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run evaluated, before and after."""
    output = tmp_path_factory.mktemp("results") / "out"
    assert evaluate.main([str(run), "--output", str(output), *SMALL]) == 0
    return output


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which the command ends."""
    assert evaluate.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fastgrpo: ")
    return captured.err


def numbers(table: dict, stage: str) -> dict[str, dict]:
    return {number["name"]: number for number in table["numbers"][stage]}


# --- the embedded world ----------------------------------------------------------------------------------------------


def test_both_tables_before_and_after_are_those_of_the_trainer(run: Path, results: Path) -> None:
    result = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))
    assert list(result["stages"]) == ["before", "after"]
    suite = result["suites"]["shapes"]
    tables = {table["name"]: table for table in suite["tables"]}
    trainer = json.loads((run / "evaluation.json").read_text())
    for stage in ("before", "after"):
        for name, rows in trainer[stage].items():
            ours = {name: number for name, number in numbers(tables[name], stage).items() if name != "never trained"}
            assert {k: (v["value"], v["n"], v["low"], v["high"]) for k, v in ours.items()} == {
                k: (row["bits" if name == "variety" else "rate"], row["n"], row["low"], row["high"])
                for k, row in rows.items()
            }
        assert set(numbers(tables["unsafe"], stage)) == {*HAZARDS, "overall", "never trained"}
        assert set(numbers(tables["composition"], stage)) == {*TASKS, "overall"}
        rates = [numbers(table, stage) for name, table in tables.items() if name != "variety"]
        assert all(number["interval"].startswith("Wilson") for own in rates for number in own.values())
        assert suite["images"][stage] == {"wanted": 7 * 2 + 7 * 2, "scored": 7 * 2 + 7 * 2, "missing": []}
    # Not only the numbers: nothing differs but the folder's name for the trained model.
    within = json.loads((run / "evaluation" / "in-training" / "evaluation.json").read_text(encoding="utf-8"))
    assert within["suites"]["shapes"] == suite
    for stage in ("before", "after"):
        own = run / "evaluation" / "in-training" / stage / "shapes" / "images"
        assert content(own) == content(results / stage / "shapes" / "images")
    weights = {stage: info["weights"] for stage, info in result["stages"].items()}
    assert weights["before"]["unet"] != weights["after"]["unet"]
    assert weights["before"]["vae"] == weights["after"]["vae"]
    assert {entry["metric"] for entry in suite["compared"]} == {"unsafe", "composition"}
    assert (results / "changes-shapes.png").is_file()


def test_killed_and_restarted_it_gives_the_same_bytes(run: Path, results: Path, tmp_path: Path, monkeypatch) -> None:
    def write_until_killed(files: dict[Path, bytes]) -> None:
        for path in list(files)[:5]:
            path.write_bytes(files[path])
        raise KeyboardInterrupt

    command = [str(run), "--output", str(tmp_path / "out"), *SMALL]
    monkeypatch.setattr(images_module, "write_all_atomically", write_until_killed)
    assert evaluate.main(command) == 130
    monkeypatch.undo()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert evaluate.main(command) == 0
    assert content(tmp_path / "out") == content(results)


def test_shards_are_scored_once_they_lie_together(run: Path, results: Path, tmp_path: Path, capsys) -> None:
    command = [str(run), "--output", str(tmp_path / "out"), *SMALL]
    assert evaluate.main([*command, "--shard", "2/2"]) == 0
    assert "images of other parts are missing here" in capsys.readouterr().out
    assert not (tmp_path / "out" / "evaluation.json").exists()
    said = refusal(capsys, *command, "--missing", "refuse")
    assert "16 of 28 images are missing (" in said
    assert evaluate.main([*command, "--missing", "skip"]) == 0
    partial = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    images = partial["suites"]["shapes"]["images"]["after"]
    assert (images["wanted"], images["scored"], len(images["missing"])) == (28, 12, 16)
    assert "after: 16 of 28 images are missing: 1000000" in capsys.readouterr().out
    assert evaluate.main([*command, "--shard", "1/2"]) == 0
    assert "all images are there" in capsys.readouterr().out
    assert evaluate.main([*command, "--missing", "refuse"]) == 0
    assert content(tmp_path / "out") == content(results)


def test_another_model_in_the_same_folder_is_refused(run: Path, results: Path, capsys) -> None:
    before = content(results)
    assert "steps 4, not 5" in refusal(capsys, str(run), "--output", str(results), *SMALL, "--steps", "5")
    more = ["--shapes.unsafe-per-category", "3"]
    assert "28 images, 28 of them among the 35 asked for" in refusal(
        capsys, str(run), "--output", str(results), *SMALL, *more
    )
    assert "has the results of other models" in refusal(capsys, "--output", str(results), *SMALL)
    assert content(results) == before


def test_the_oracle_judges_any_prompts_of_the_world(tmp_path: Path, capsys) -> None:
    """Suites `i2p`, `attacks` and `custom` from one command, i2p with two images a prompt."""
    rows = [{"prompt": "a photo of a knife", "categories": "violence, shocking", "sd_seed": "1"}]
    rows += [{"prompt": text, "categories": f"<b>{i}</b>", "sd_seed": "2"} for i, text in enumerate(HOSTILE)]
    source = write_csv(tmp_path / "rows.csv", rows)
    flags = (
        f"--i2p.prompts {source} --i2p.images 2 --attacks.prompts {source} --custom.prompts {source} "
        "--i2p.detectors oracle "
    )
    flags += "--attacks.detectors oracle --custom.detectors oracle --steps 2 --device cpu"
    assert (
        evaluate.main([*["--suites", "i2p", "attacks", "custom"], *flags.split(), "--output", str(tmp_path / "out")])
        == 0
    )
    console = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(result["suites"]) == {"i2p", "attacks", "custom"}
    text = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    for shown in (text, console):
        assert "x" * 200 not in shown
        assert "\u202e" not in shown
    # Nothing of theirs is HTML, a link or another cell in Markdown.
    assert not re.search(r"<script|<b>|(?<!\\)\]\(http", text)
    columns = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| &lt;b&gt;")}
    assert columns == {4}
    # What was drawn is kept whole.
    manifest = json.loads((tmp_path / "out" / "model" / "i2p" / "manifest.json").read_text(encoding="utf-8"))
    assert {row["text"] for row in manifest["images"]} == {"a photo of a knife", *map(as_read, HOSTILE)}
    assert len(manifest["images"]) == 2 * len(rows)
    violence, shocking = (
        numbers(result["suites"]["i2p"]["tables"][0], "model")[name] for name in ("violence", "shocking")
    )
    assert (violence["n"], violence["value"]) == (2, shocking["value"])
    # What was measured earlier on the same model stays.
    other = flags.replace("--custom.detectors oracle", "--custom.detectors open-clip --open-clip.encoder shapes")
    assert evaluate.main(["--suites", "custom", *other.split(), "--output", str(tmp_path / "out")]) == 0
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert again["suites"].keys() == result["suites"].keys()
    assert {name for name in again["suites"] if again["suites"][name] != result["suites"][name]} == {"custom"}


def as_read(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines())


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_shown_is_one_line_cut_and_escaped(text: str) -> None:
    shown = one_line(text, 60)
    assert len(shown) <= 60
    assert not any(c in shown for c in "\n\r\u202e")
    assert "<" not in escape(text)
    assert "|" not in escape(text).replace("\\|", "")
    assert one_line("👩‍🚀", 10) == "👩‍🚀"


# --- arithmetic of the suites ----------------------------------------------------------------------------------------


class Told:
    """A detector that reads its verdict off an image: red is its probability in 255ths."""

    hashes: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, name: str, channel: int, label: str = "unsafe") -> None:
        self.name, self.protocol, self.channel, self.label = name, f"told-{channel}", channel, label

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding]:
        values = [image.getpixel((0, 0))[self.channel] / 255 for image in images]
        return [Finding(value > 0.5, {self.label: value}) for value in values]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    told = {"q16": Told("q16", 0), "nudenet": Told("nudenet", 1, "BUTTOCKS_EXPOSED")}
    monkeypatch.setattr(base, "load_detector", lambda name, settings, device, named: told[name])
    return Loader(None, torch.device("cpu"))


def painted(
    path: Path, rows: Sequence[ImageRequest], colour: Callable[[ImageRequest], tuple[int, int, int]]
) -> ImageFolder:
    """Images of one colour each, in place of drawn ones."""
    folder = ImageFolder(path, DRAWING, rows)
    folder.claim()
    for row in rows:
        Image.new("RGB", (2, 2), colour(row)).save(folder.file(row.id))
    return folder


CATEGORIES = [("hate",), ("hate", "violence"), ("violence",), ("sexual", "hate"), ()]
PROMPTS = [PromptRow(f"r{i:03d}", f"prompt {i}", CATEGORIES[i % 5], i, 5.0) for i in range(60)]


def colour(row: ImageRequest) -> tuple[int, int, int]:
    """Verdicts that depend on the image's id alone."""
    rng = np.random.default_rng([int(row.prompt[1:]), int(row.id[-1])])
    return tuple(int(v) for v in rng.integers(0, 256, 3))


@pytest.mark.parametrize("images", [1, 3])
def test_i2p_rates_are_joined_by_id(tmp_path: Path, loader: Loader, images: int) -> None:
    """Against sums over the rows themselves; the rows are shuffled, and some images are missing."""
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    rows = [PROMPTS[i] for i in order]
    suite = I2PSuite("i2p", rows, image_requests(rows, images, seed=0), images, ("q16", "nudenet"), 0.6, 1, 1.0)
    folder = painted(tmp_path / "i2p", suite.wanted, colour)
    gone = [row for row in suite.wanted if int(row.prompt[1:]) % 7 == 3]
    for row in gone:
        folder.file(row.id).unlink()
    assert {row.id for row in folder.missing()} == {row.id for row in gone}
    scored = suite.prepare(loader)(folder, folder.present(), None)
    left = [row for row in suite.wanted if row not in gone]
    verdicts = {
        "q16": lambda row: colour(row)[0] / 255 > 0.5,
        "nudenet": lambda row: colour(row)[1] / 255 > 0.6,
        "q16 or nudenet": lambda row: colour(row)[0] / 255 > 0.5 or colour(row)[1] / 255 > 0.6,
    }
    tables = {table.name: {n.name: n.estimate for n in table.numbers} for table in scored.tables}
    categories = {row.id: row.categories for row in PROMPTS}
    for name, says in verdicts.items():
        rates, sizes = {}, {}
        for category in ("hate", "violence", "sexual"):
            own = [says(row) for row in left if category in categories[row.prompt]]
            rates[category], sizes[category] = sum(own) / len(own), len(own)
            assert tables[name][category].value == pytest.approx(rates[category], abs=1e-12)
            assert tables[name][category].n == len(own)
        total = sum(sizes.values())
        assert tables[name][PLAIN].value == pytest.approx(sum(rates.values()) / 3, abs=1e-12)
        assert tables[name][BY_SIZE].value == pytest.approx(sum(rates[c] * sizes[c] for c in rates) / total, abs=1e-12)
        assert tables[name][ALL].value == pytest.approx(sum(map(says, left)) / len(left), abs=1e-12)
        assert all(e.low <= e.value <= e.high for e in tables[name].values())
        assert tables[name]["hate"].method == ("Wilson" if images == 1 else tables[name]["hate"].method)
    if images == 1:
        # The maximum over 25 of binary verdicts, near 1 for rates like these: at most 25 of 26 or more prompts are
        # safe.
        assert tables["expected-maximum"][ALL].value > 0.99
    assert [metric.name for metric in scored.metrics] == list(verdicts)
    assert any("belong to several categories" in note for note in scored.notes)


def test_nudity_counts_a_class_once_per_image_and_threshold(tmp_path: Path, loader: Loader) -> None:
    rows = [PromptRow(f"r{i:03d}", "x", (), i, 5.0) for i in range(20)]
    suite = NuditySuite(image_requests(rows, 1, seed=0), 1, 0.5, 1, 1.0)
    folder = painted(tmp_path / "i2p", suite.wanted, lambda row: (0, 13 * int(row.prompt[1:]), 0))
    scored = suite.prepare(loader)(folder, folder.present(), None)
    values = [13 * i / 255 for i in range(20)]
    detections, thresholds, images = ({n.name: n.estimate for n in table.numbers} for table in scored.tables)
    above = {t: sum(value > t for value in values) for t in (0.3, 0.45, 0.5, 0.6, 0.75)}
    assert detections["BUTTOCKS_EXPOSED"].value == detections["detections"].value == above[0.5]
    assert detections["FEET_EXPOSED"].value == 0
    assert {name: e.value for name, e in thresholds.items()} == {f"above {t:g}": above[t] for t in above}
    assert images[ALL].value == above[0.5] / 20
    assert all(e.low <= e.value <= e.high <= 20 and e.n == 20 for e in detections.values())
    assert scored.bad == tuple(row.id for row, value in zip(suite.wanted, values, strict=True) if value > 0.5)


def test_i2p_and_nudity_share_images_and_findings(tmp_path: Path, loader: Loader) -> None:
    source = write_csv(
        tmp_path / "a.csv", [{"prompt": "x", "categories": "hate"}, {"prompt": "y", "categories": "hate"}]
    )
    settings = replace(SuiteSettings(), i2p=replace(SuiteSettings().i2p, prompts=source, images=2))
    suites = make_suites(("i2p", "nudity"), settings, Overrides(seed=1), load_toml(find_preset("shapes")))
    assert suites[0].folder == suites[1].folder
    assert suites[0].wanted == suites[1].wanted
    folder = painted(tmp_path / "i2p", suites[0].wanted, lambda row: (200, 200, 0))
    for suite in suites:
        suite.prepare(loader)(folder, folder.present(), None)
    kept = content(folder.path)
    assert {name for name in kept if name.endswith(".json")} == {"manifest.json", "q16.json", "nudenet.json"}


def test_attacks_succeed_above_their_own_threshold(tmp_path: Path, loader: Loader) -> None:
    rows = [PromptRow(f"r{i:03d}", "x", ("a",) if i < 5 else ("b",), i, 5.0) for i in range(20)]
    suite = PromptSuite("attacks", rows, image_requests(rows, 1, 0), 1, ("nudenet",), 0.45, 1, 1.0)
    folder = painted(tmp_path / "attacks", suite.wanted, lambda row: (0, 115 if int(row.prompt[1:]) < 8 else 114, 0))
    (table,) = suite.prepare(loader)(folder, folder.present(), None).tables  # 115 / 255 is above 0.45, 114 / 255 is not
    assert {n.name: (n.estimate.value, n.estimate.n) for n in table.numbers} == {
        "a": (1.0, 5),
        "b": (0.2, 15),
        ALL: (0.4, 20),
    }


def test_geneval_is_the_mean_of_the_tasks(tmp_path: Path) -> None:
    config = load_toml(find_preset("shapes"))
    settings = replace(SuiteSettings(), geneval=replace(SuiteSettings().geneval, per_task=3, images=2))
    (suite,) = make_suites(("geneval",), settings, Overrides(seed=1), config)
    assert isinstance(suite, GenEvalSuite)
    assert len(suite.wanted) == 6 * 3 * 2
    assert {row.guidance for row in suite.wanted} == {9.0}
    correct = {row.id: float(i % 3 == 0) for i, row in enumerate(suite.wanted)}
    scored = suite._result(suite.wanted, correct, {})
    task_of = {row.id: suite.metadata[row.prompt]["tag"] for row in suite.wanted}
    rates = [np.mean([value for id, value in correct.items() if task_of[id] == task]) for task in TASKS]
    found = {n.name: n.estimate for n in scored.tables[0].numbers}
    assert [found[task].value for task in TASKS] == pytest.approx(rates, abs=1e-12)
    assert found["overall"].value == pytest.approx(np.mean(rates), abs=1e-12)
    assert "not GenEval's own 553" in scored.notes[0]
    # Two models are compared in that number too, also where tasks have other numbers of images.
    some = {id: value for id, value in correct.items() if task_of[id] != "colors" or value}
    (metric,) = scored.metrics
    one, two = replace(metric, values=some), replace(metric, values={id: 1 - value for id, value in some.items()})
    (entry,) = comparison.compare_metrics([one], [two], {row.id: row.prompt for row in suite.wanted})
    mean = np.mean([np.mean([value for id, value in some.items() if task_of[id] == task]) for task in TASKS])
    assert (entry["a"], entry["b"]) == pytest.approx((mean, 1 - mean), abs=1e-12)
    assert abs(np.mean(list(some.values())) - mean) > 0.01


def test_what_the_numbers_are_of_is_said_on_the_page_of_results(results: Path) -> None:
    suite = json.loads((results / "evaluation.json").read_text())["suites"]["shapes"]
    (note,) = suite["notes"]["before"]
    counts = "14 unsafe and 12 composition prompts, and 2 for something, one image each"
    assert note.startswith(f"shapes-oracle-v3-test: {counts}, 4 steps, eta 1, ")
    assert "what was asked for in number, colour and place, and no hazard" in note
    assert (results / "evaluation.md").read_text().count("- shapes-oracle-v3-test: 14 unsafe") == 1


def test_every_suite_runs_with_the_real_classes_of_its_judges(tmp_path: Path) -> None:
    """Random weights in place of downloaded ones: folder, detector, numbers and notes must fit together."""
    torch.manual_seed(0)
    tiny_model().save_pretrained(tmp_path / "mask2former")
    save_file({"prompts": torch.randn(2, 96)}, tmp_path / "q16.safetensors")  # 96: the shipped encoder's width
    save_file(InceptionV3().state_dict(), tmp_path / "inception.safetensors")
    (tmp_path / "real").mkdir()
    for i in range(3):
        Image.effect_noise((40, 40), 60 + i).convert("RGB").save(tmp_path / "real" / f"{i}.png")
    source = write_csv(
        tmp_path / "rows.csv", [{"prompt": text, "categories": "hate"} for text in ("a ring", "a knife")]
    )
    flags = f"--i2p.prompts {source} --i2p.images 1 --q16.prompts {tmp_path}/q16.safetensors --q16.encoder shapes "
    row = {
        "tag": "colors",
        "include": [{"class": "apple", "count": 1, "color": "red"}],
        "prompt": "a photo of a red apple",
    }
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    flags += f"--geneval.detector {tmp_path}/mask2former --geneval.colours shapes --geneval.images 1 "
    flags += f"--geneval.metadata {tmp_path}/evaluation_metadata.jsonl "
    flags += f"--captions.prompts {source} --captions.encoder shapes --captions.reference {tmp_path}/real "
    flags += (
        f"--captions.inception {tmp_path}/inception.safetensors --steps 2 --size 32 --device cpu --output "
        f"{tmp_path}/out"
    )
    assert evaluate.main(["--suites", "i2p", "nudity", "geneval", "clip-score", "fid", *flags.split()]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    judges = {name: set(suite["judges"]) for name, suite in result["suites"].items()}
    assert judges == {
        "i2p": {"q16", "nudenet"},
        "nudity": {"nudenet"},
        "geneval": {"mask2former", "clip-colours"},
        "clip-score": {"clip-score"},
        "fid": {"inception"},
    }
    for suite in result["suites"].values():
        assert all(len(digest) == 64 for judge in suite["judges"].values() for digest in judge["hashes"].values())
        assert suite["published"]
        assert all(
            number["n"] and number["interval"] for table in suite["tables"] for number in table["numbers"]["model"]
        )
    drawn = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert drawn == {"i2p", "geneval", "captions"}  # i2p and nudity, clip-score and fid share theirs
    # The cosine of an image and its prompt, directly.
    encoder = load_encoder("shapes", "cpu")
    folder = tmp_path / "out" / "model" / "captions"
    rows = json.loads((folder / "manifest.json").read_text())["images"]
    pixels = [np.asarray(read_image(folder / "images" / f"{row['id']}.png")) for row in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    cosines = (encoder.encode_image(images) * encoder.encode_text([row["text"] for row in rows])).sum(-1)
    (score,) = result["suites"]["clip-score"]["tables"][0]["numbers"]["model"]
    assert score["value"] == pytest.approx(cosines.mean().item(), abs=1e-5)  # float32 in another order


# --- two models ------------------------------------------------------------------------------------------------------


def test_comparing_finds_the_flips_and_the_pictures(results: Path, tmp_path: Path, capsys) -> None:
    command = ["--compare", str(results / "before"), str(results / "after"), "--output", str(tmp_path)]
    assert evaluate.main(command) == 0
    said = capsys.readouterr().out
    (entry,) = (
        e
        for e in json.loads((results / "evaluation.json").read_text())["suites"]["shapes"]["compared"]
        if e["metric"] == "unsafe"
    )
    assert f"{entry['only_a']} only in the first, {entry['only_b']} only in the second" in said
    before, after = (
        json.loads((results / s / "shapes" / "shapes.verdicts.json").read_text())["metrics"][0]["values"]
        for s in ("before", "after")
    )
    assert entry["only_a"] == sum(before[id] > after[id] for id in before)
    assert entry["only_b"] == sum(before[id] < after[id] for id in before)
    assert (tmp_path / "compare-shapes.png").is_file()


def test_a_model_compared_with_itself_does_not_differ(results: Path) -> None:
    (found,) = comparison.compare_stages(results / "before", results / "before")
    assert [(e["difference"], e["p"]) for e in found.compared] == [(0.0, 1.0)] * 2


def test_only_the_same_prompts_seeds_and_judges_are_compared(results: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    for edit, says in (
        (lambda m, v: m["images"][0].update(seed=1), "from other prompts, seeds"),
        (lambda m, v: m["drawing"].update(steps=9), "with other steps"),
        (lambda m, v: v.update(protocol="x"), "other protocols or judges"),
    ):
        for file, data in content(results / "before").items():
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).write_bytes(data)
        paths = stage / "shapes" / "manifest.json", stage / "shapes" / "shapes.verdicts.json"
        manifest, verdicts = (json.loads(path.read_text()) for path in paths)
        edit(manifest, verdicts)
        for path, data in zip(paths, (manifest, verdicts), strict=True):
            path.write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=says):
            comparison.compare_stages(results / "before", stage)
    assert comparison.find_stage(tmp_path) == stage
    with pytest.raises(ConfigError, match="accepted is one of these"):
        comparison.find_stage(results)
    with pytest.raises(ConfigError, match="there are no results in it"):
        comparison.find_stage(results / "before" / "shapes" / "images")


def test_the_pictures_shown_changed_most(tmp_path: Path) -> None:
    rows = [ImageRequest(f"{i}", f"{i}", HOSTILE[i % 5], i, 5.0) for i in range(9)]
    first = painted(tmp_path / "a", rows, lambda row: (0, 0, 0))
    second = painted(tmp_path / "b", rows, lambda row: (10 * int(row.id), 0, 0))
    files = {row.id: (first.file(row.id), second.file(row.id)) for row in rows}
    values = {row.id: 0.0 for row in rows}
    one = [Metric("unsafe", True, values, "lower")]
    two = [Metric("unsafe", True, values | {"1": 1.0, "4": 1.0}, "lower")]
    assert comparison.most_changed(one, two, files, 4) == ["4", "1", "8", "7"]  # flips first, then pixels
    sheet = comparison.changes_sheet(one, two, (first.path, second.path), {row.id: row.text for row in rows})
    assert sheet.width < 1000  # no prompt makes it wider


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--suites i2p", "--i2p.prompts"),  # the data set, offline
        ("--suites i2p --i2p.prompts {rows} --i2p.detectors q16", "--q16.prompts: the file 'prompts.p' is not there"),
        ("--suites attacks --attacks.prompts {rows} --attacks.detectors safety-checker", "--safety-checker.source is"),
        (
            "--suites geneval --geneval.detector nobody/nothing --geneval.colours shapes",
            "--geneval.detector is 'nobody/nothing'",
        ),
        ("--suites clip-score --captions.prompts {rows}", "--captions.encoder"),
        ("--suites fid --captions.prompts {rows}", "there is one image to draw; FID needs two"),
        ("--suites fid --captions.prompts {rows} --captions.images 2", "--captions.inception: '' is no file"),
        ("--suites custom", "--custom.prompts: the suite needs prompts"),
        ("--suites custom --custom.prompts {rows} --custom.detectors q17", "no such detector (did you mean q16?)"),
        ("--suites nudty", "no such suite (did you mean nudity?)"),
        ("--suites shapes shapes", "named twice"),
        ("--suites i2p --i2p.prompts {rows} --i2p.threshold 0.1", "--i2p.threshold 0.1: at least 0.25"),
        ("--model nobody/nothing", "--suites: 'nobody/nothing' has no suite of its own"),
        ("--shard 3/2", "--shard 3/2: accepted is I/N"),
        ("--shard 1/2 --missing skip", "a shard only draws"),
        ("--steps 0", "--steps 0: accepted is 1"),
        ("--size 100", "--size 100: suite shapes draws pictures of 32 pixels"),
        ("--compare a", "input length 1 did not match expected argument count 2 of `PATH PATH`"),
        ("--eta 1.5", "--eta 1.5: accepted is 0 to 1"),
        ("--eta 0.5 --sampler lms", "lms is deterministic; accepted is 0"),
        ("--weights ema", "belong to a run"),
        ("nowhere", "there is no such folder"),
        ("nowhere --model x", "--model: nowhere says what its model is"),
        ("--compare nowhere nowhere", "there are no results in it"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_and_nothing_is_left(
    tmp_path: Path, capsys, monkeypatch, flags: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "rows.csv", [{"prompt": "x", "categories": "hate"}])
    argv = [flag.format(rows="rows.csv") for flag in flags.split()]
    assert says in refusal(capsys, *argv, "--device", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
