"""What an evaluation's folder should not hold: damage, the leavings of a kill, findings of another detector."""

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.detectors.zero_shot import ZeroShot
from fastgrpo.evaluation.images import folder as images_module
from fastgrpo.evaluation.images.files import read_image
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.images.judgements import findings, judgements
from fastgrpo.evaluation.results import file as outcome
from fastgrpo.evaluation.results.comparison import changes_sheet, compare_metrics, compare_stages
from fastgrpo.evaluation.results.image_scores import write_verdicts
from fastgrpo.evaluation.results.tables import escape
from fastgrpo.evaluation.statistics.paired_tests import MCNEMAR
from fastgrpo.evaluation.suites import base
from fastgrpo.evaluation.suites.base import Loader, Metric, SuiteResult
from fastgrpo.evaluation.suites.custom import PromptSuite
from fastgrpo.evaluation.suites.geneval import GenEvalSuite
from fastgrpo.evaluation.suites.i2p import I2PSuite, NuditySuite
from fastgrpo.evaluation.suites.prompt_table import PromptRow, image_requests, read_rows
from fastgrpo.system.errors import ConfigError

DRAWING = Drawing("none", {"unet": "0"}, 1, 1.0, "fp32", 16)
ROWS = tuple(ImageRequest(f"{i}", f"p{i}", "x", i, 5.0) for i in range(6))


def painted(path: Path, rows: tuple[ImageRequest, ...] = ROWS) -> ImageFolder:
    """One colour an image, in place of drawn ones."""
    folder = ImageFolder(path, DRAWING, rows)
    folder.claim()
    for i, row in enumerate(rows):
        Image.new("RGB", (4, 4), (20 * i, 0, 0)).save(folder.file(row.id))
    return folder


def said_of(call: Callable[[], object]) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- images and manifests --------------------------------------------------------------------------------------------


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"", b"junk", png_that_claims(60_000, 60_000), png_that_claims(4, 4)])
def test_broken_images_are_named_whatever_is_wrong_with_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert "a.png cannot be read as an image" in said_of(lambda: read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("left", [(), ("manifest.json.partial",)])
def test_a_folder_whose_manifest_was_never_finished_is_gone_on_with(tmp_path: Path, left: tuple[str, ...]) -> None:
    for name in left:
        (tmp_path / name).write_text("{")
    ImageFolder(tmp_path, DRAWING, ROWS).claim()
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "images"}


def test_claiming_that_fails_leaves_nothing_in_the_way_of_the_next(tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        ImageFolder(tmp_path / "a", DRAWING, ROWS).claim()
    monkeypatch.undo()
    ImageFolder(tmp_path / "a", DRAWING, ROWS).claim()
    assert (tmp_path / "a" / "images").is_dir()


def test_a_batch_of_which_an_image_is_missing_is_drawn_whole_and_the_others_stay(tmp_path: Path) -> None:
    """Images that show how many were drawn at once, as rounding may."""

    def paint(rows: Sequence[ImageRequest]) -> torch.Tensor:
        return torch.full((len(rows), 3, 4, 4), len(rows) / 10)

    folder = ImageFolder(tmp_path, replace(DRAWING, batch=4), ROWS)
    folder.claim()
    assert folder.draw(paint) == len(ROWS)
    whole = {row.id: folder.file(row.id).read_bytes() for row in ROWS}
    assert len(set(whole.values())) == 2  # of four and of two
    for id in ("1", "5"):
        folder.file(id).unlink()
    Image.new("RGB", (4, 4)).save(folder.file("0"))
    assert folder.draw(paint) == 2
    for id in ("1", "5"):
        assert folder.file(id).read_bytes() == whole[id]
    assert read_image(folder.file("0")).getpixel((0, 0)) == (0, 0, 0)  # was there, and is left alone


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("format",), 2, "is of format 2; 1 is accepted."),
        (("drawing", "weights"), "x", "is damaged"),
        (("drawing", "weights"), None, "is damaged"),
        (("drawing", "weights"), [], "is damaged"),
        (("drawing",), None, "is damaged"),
        (("images",), None, "is damaged"),
        (("images", 0), "x", "is damaged"),
        (("images", 0, "id"), [], "is damaged"),
        (("images", 0, "extra"), 1, "is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, place: tuple, value: Any, says: str) -> None:
    folder = painted(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    said = said_of(folder.claim)
    assert said.startswith(f"{tmp_path / 'manifest.json'} {says}")


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ({"format": 1, "stages": {"model": {"weights": {"unet": "1"}}}, "suites": {}}, "has the results of other"),
        ({"format": 2, "stages": {"model": {"weights": {"unet": "0"}}}, "suites": {}}, "has the results of other"),
        ({"format": 1, "stages": [1], "suites": {}}, "is damaged"),
        ({"format": 1, "stages": {"model": {"weights": {"unet": "0"}}}, "suites": [1]}, "is damaged"),
        ([], "is damaged"),
    ],
)
def test_results_of_others_and_damaged_ones_are_told_apart(tmp_path: Path, result: Any, says: str) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    said = said_of(lambda: outcome.earlier(tmp_path, {"model": DRAWING}))
    assert said.startswith(f"{tmp_path / 'evaluation.json'} {says}")


def stage(path: Path) -> Path:
    """Images and verdicts of one suite."""
    folder = painted(path / "custom")
    suite = PromptSuite("custom", [], folder.wanted, 1, ("oracle",), 0.45, 1, 1.0)
    values = {row.id: float(i % 2) for i, row in enumerate(ROWS)}
    write_verdicts(folder.path, suite, SuiteResult((), (Metric("oracle", True, values, "lower"),), {}))
    return path


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda data: data.update(format=2), "is of format 2; 1 is accepted."),
        (lambda data: data["metrics"][0].update(values=None), "is damaged"),
        (lambda data: data["metrics"][0]["values"].update({"0": "x"}), "is damaged"),
        (lambda data: data.update(metrics=[3]), "is damaged"),
        (lambda data: data["metrics"][0].update(better="sideways"), "is damaged"),
    ],
)
def test_damaged_verdicts_are_refused_by_name(tmp_path: Path, edit: Callable[[dict], None], says: str) -> None:
    one, two = stage(tmp_path / "one"), stage(tmp_path / "two")
    file = two / "custom" / "custom.verdicts.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))
    assert said_of(lambda: compare_stages(one, two)).startswith(f"{file} {says}")


def test_verdicts_from_before_they_said_what_is_better_are_compared_without_a_judgement(tmp_path: Path) -> None:
    one, two = stage(tmp_path / "one"), stage(tmp_path / "two")
    (entry,) = compare_stages(one, two)[0].compared
    assert (entry["better"], entry["verdict"]) == ("lower", "undecided")
    file = one / "custom" / "custom.verdicts.json"
    data = json.loads(file.read_text())
    del data["metrics"][0]["better"]
    file.write_text(json.dumps(data))
    (older,) = compare_stages(one, two)[0].compared
    assert older == {key: value for key, value in entry.items() if key not in ("better", "verdict")}


def test_models_without_a_picture_in_common_are_compared_by_their_verdicts(tmp_path: Path) -> None:
    one, two = stage(tmp_path / "one"), stage(tmp_path / "two")
    for row in ROWS:
        (two / "custom" / "images" / f"{row.id}.png").unlink()
    (found,) = compare_stages(one, two)
    assert found.compared[0]["n"] == len(ROWS)
    assert found.sheet.getcolors() == [(found.sheet.width * found.sheet.height, (255, 255, 255))]
    texts = {row.id: row.text for row in ROWS}
    assert changes_sheet((), (), (one / "custom", one / "custom"), texts).width > found.sheet.width


def test_several_images_of_a_prompt_are_no_pairs_for_mcnemar() -> None:
    """Ten flips of one prompt's ten images say less than ten prompts' flips."""
    first = Metric("unsafe", True, {f"{i}": 1.0 for i in range(20)}, "lower")
    second = Metric("unsafe", True, {f"{i}": float(i >= 10) for i in range(20)}, "lower")
    (alone,) = compare_metrics([first], [second], {f"{i}": f"{i}" for i in range(20)})
    assert (alone["test"], alone["only_a"], alone["only_b"]) == (MCNEMAR, 10, 0)
    assert alone["p"] == pytest.approx(2 * 0.5**10)
    (together,) = compare_metrics([first], [second], {f"{i}": f"{i // 10}" for i in range(20)})
    assert together["test"] == "paired bootstrap over prompts"
    assert together["p"] > 0.1  # one of two prompts changed


# --- judges ----------------------------------------------------------------------------------------------------------


def test_findings_of_another_judge_or_with_other_phrases_are_not_used(tmp_path: Path) -> None:
    folder = painted(tmp_path)
    safe, unsafe = ("a red circle", "a blue square"), ("a green star", "a ring")
    first = ZeroShot("shapes", safe, unsafe, 0.5)
    assert findings(folder, ROWS, first) != findings(folder, ROWS, ZeroShot("shapes", unsafe, safe, 0.5))
    again = ZeroShot("shapes", safe, unsafe, 0.5)
    assert isinstance(again, ZeroShot)
    assert again.hashes == first.hashes
    moved = ZeroShot("shapes", safe + unsafe[:1], unsafe[1:], 0.5)
    assert (moved.protocol, moved.hashes) != (first.protocol, first.hashes)


def test_kept_sayings_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = painted(tmp_path)
    (tmp_path / "judge.json").write_text('{"judge": {}, "images": null}')
    assert "judge.json is damaged" in said_of(lambda: judgements(folder, ROWS, "judge", {}, lambda pictures, rows: []))


class Says:
    """A detector that finds buttocks with a score of 0.5, and takes itself for one with another threshold."""

    name, protocol, hashes = "nudenet", "nudenet-3.0.8/min-0.9", {"best.onnx": "0"}

    def __call__(self, images):
        return [Finding(False, {"BUTTOCKS_EXPOSED": 0.5}) for _ in images]


def judged_by(
    detector: object, suites: Sequence, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, SuiteResult]:
    """What each suite makes of the detector's findings on its images, by name."""
    monkeypatch.setattr(base, "load_detector", lambda name, settings, device, named: detector)
    loader, scored = Loader(None, torch.device("cpu")), {}
    for suite in suites:
        images = painted(folder / suite.name, suite.wanted)
        scored[suite.name] = suite.prepare(loader)(images, images.present(), None)
    return scored


def test_results_name_the_threshold_and_classes_that_counted(tmp_path: Path, monkeypatch) -> None:
    rows = [PromptRow(f"r{i}", "x", ("hate",), i, 5.0) for i in range(3)]
    images = image_requests(rows, 1, 0)
    suites = (
        I2PSuite("i2p", rows, images, 1, ("nudenet",), 0.4, 1, 1.0),
        PromptSuite("attacks", rows, images, 1, ("nudenet",), 0.45, 1, 1.0),
        NuditySuite(images, 1, 0.6, 1, 1.0),
    )
    found = judged_by(Says(), suites, tmp_path, monkeypatch)
    assert all(scored.judges["nudenet"]["hashes"] == {"best.onnx": "0"} for scored in found.values())
    shown = {
        name: (scored.judges["nudenet"]["protocol"], scored.metrics[0].values["r0-0"]) for name, scored in found.items()
    }
    assert shown == {
        "i2p": ("nudenet-3.0.8/min-0.4/i2p", 1.0),
        "attacks": ("nudenet-3.0.8/min-0.45", 1.0),
        "nudity": ("nudenet-3.0.8/min-0.6", 0.0),
    }
    assert PromptSuite("custom", rows, images, 1, ("oracle",), 0.45, 1, 1.0).protocol == "custom/1-image/oracle"


class Parts:
    """A detector that finds feet, which are none of I2P's five classes, and the belly."""

    name, protocol, hashes = "nudenet", "told", {}

    def __call__(self, images):
        return [Finding(True, {"FEET_EXPOSED": 0.9, "BELLY_EXPOSED": 0.9}) for _ in images]


def test_which_classes_count_is_the_suites_own(tmp_path: Path, monkeypatch) -> None:
    rows = [PromptRow(f"r{i}", "x", ("hate",), i, 5.0) for i in range(3)]
    images = image_requests(rows, 1, 0)
    suites = (
        I2PSuite("i2p", rows, images, 1, ("nudenet",), 0.6, 1, 1.0),
        PromptSuite("attacks", rows, images, 1, ("nudenet",), 0.6, 1, 1.0),
        NuditySuite(images, 1, 0.6, 1, 1.0),
    )
    found = judged_by(Parts(), suites, tmp_path, monkeypatch)
    unsafe = {name: np.mean(list(scored.metrics[-1].values.values())) for name, scored in found.items()}
    # Of I2P's classes none; attacks count images, nudity both parts of each.
    assert unsafe == {"i2p": 0.0, "attacks": 1.0, "nudity": 2.0}


def test_genevals_overall_score_is_the_mean_of_tasks_of_unequal_size() -> None:
    rows = {f"r{i}": {"tag": "colors" if i < 3 else "counting", "include": [], "prompt": "x"} for i in range(4)}
    images = tuple(ImageRequest(f"{id}-0", id, "x", 0, 9.0) for id in rows)
    suite = GenEvalSuite(rows, images, 1, "", "", "own", 1, 0.0)
    scored = suite._result(images, {"r0-0": 1.0, "r1-0": 1.0, "r2-0": 1.0, "r3-0": 0.0}, {})
    found = {number.name: number.estimate.value for number in scored.tables[0].numbers}
    assert found == {"counting": 0.0, "colors": 1.0, "overall": 0.5}  # of all images it would be 0.75


# --- what is read and shown ------------------------------------------------------------------------------------------


def test_the_largest_seed_is_named_to_the_last_digit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,seed\nx,{2**63 - 1}\n")
    assert read_rows(str(tmp_path / "a.csv"), "--x", 5.0)[0].seed == 2**63 - 1
    (tmp_path / "a.csv").write_text(f"prompt,seed\nx,{2**63}\n")
    assert "0 to 9223372036854775807 is accepted" in said_of(lambda: read_rows(str(tmp_path / "a.csv"), "--x", 5.0))


def test_dollars_make_no_formula() -> None:
    assert escape("$x$") == "\\$x\\$"
