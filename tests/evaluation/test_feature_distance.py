"""Pictures now beside those before training: whose are compared, by which features, and what is said of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.evaluation import feature_distance
from fastgrpo.evaluation.feature_distance import PictureFeatures, PicturePairs
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.metrics.mmd import paired_mmd
from fastgrpo.evaluation.metrics.vendi import vendi
from fastgrpo.evaluation.sentences import of_distance
from fastgrpo.rewards.encoder import OpenClipEncoder, load_encoder
from support.encoders import write_folder

PROMPTS = [f"{i:02d}" for i in range(12)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OpenClipEncoder:
    folder = tmp_path_factory.mktemp("encoder")
    write_folder(folder)
    return load_encoder(f"local-dir:{folder}", "cpu")


def pictures(path: Path, seed: int, ids: Iterable[str], spread: int = 255) -> ImageFolder:
    """A folder with noise of all values up to `spread`, each image by its own id."""
    rows = [ImageRequest(id, id[:2], "a cat", 0, 3.0) for id in ids]
    folder = ImageFolder(path, Drawing("model", {}, 3, 1.0, "fp32", 4), rows)
    (path / "images").mkdir(parents=True)
    for row in rows:
        noise = np.random.default_rng([seed, int(row.id)]).integers(0, spread + 1, (16, 16, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder.file(row.id))
    return folder


def features(encoder: OpenClipEncoder, folder: ImageFolder, ids: Iterable[str]) -> np.ndarray:
    """By the reward's own transform, image by image."""
    images = [torch.from_numpy(np.asarray(Image.open(folder.file(id))).copy()).permute(2, 0, 1) / 255 for id in ids]
    return torch.cat([encoder.encode_image(image[None].float()) for image in images]).numpy()


def test_benign_pictures_that_both_have_are_compared(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    before = pictures(tmp_path / "before", 0, PROMPTS)
    now = pictures(tmp_path / "now", 1, PROMPTS[2:], spread=120)
    found = PictureFeatures(encoder).pairs(before, now, PROMPTS[:10])
    ids = PROMPTS[2:10]
    assert [row.id for row in found.rows] == ids
    one, two = features(encoder, before, ids), features(encoder, now, ids)
    # PIL and the reward's transform round colours otherwise: by half of one in 255, in the encoder's input.
    assert np.abs(found.before - one).max() < 0.02
    assert np.abs(found.after - two).max() < 0.02
    distance = found.distance()
    assert distance.ratio.value == pytest.approx(vendi(two).score / vendi(one).score, rel=0.05)
    assert distance.mmd == paired_mmd(found.before, found.after, ids)
    of_some = found.distance(ids[:5])
    assert of_some.ratio.n == 5
    assert of_some.mmd == paired_mmd(found.before[:5], found.after[:5], ids[:5])
    assert found.distance(ids[:1]) is None


def test_pictures_that_did_not_change(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    before = pictures(tmp_path / "before", 0, PROMPTS)
    distance = PictureFeatures(encoder).pairs(before, before, PROMPTS).distance()
    assert distance.metrics() == {
        "eval/distance_mmd": pytest.approx(0.0, abs=1e-12),
        "eval/distance_mmd_p": 1.0,
        "eval/diversity_vendi": 1.0,
    }
    assert distance.least < 1


def test_of_many_prompts_the_first_are_compared(
    encoder: OpenClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_distance, "MOST_PROMPTS", 3)
    before = pictures(tmp_path / "before", 0, [f"{prompt}{k}" for prompt in PROMPTS for k in (0, 1)])
    found = PictureFeatures(encoder).pairs(before, before, [row.id for row in before.wanted])
    assert [row.id for row in found.rows] == ["000", "001", "010", "011", "020", "021"]


def pairs(per_prompt: int = 1, seed: int = 0, count: int = 60) -> PicturePairs:
    """Features of which those after are closer together."""
    rng = np.random.default_rng(seed)
    rows = tuple(ImageRequest(f"{i:03d}", f"{i // per_prompt:03d}", "", 0, 3.0) for i in range(count))
    noise = rng.normal(size=(2, count, 8))
    before, after = (scale * each + 1.0 for scale, each in zip((1.0, 0.5), noise, strict=True))
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (before, after)]
    return PicturePairs(rows, *unit)


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_the_ratio_s_interval_is_that_of_the_jackknife_over_prompts(per_prompt: int) -> None:
    """The delta method and the jackknife, which leaves out one prompt at a time, agree but for terms of order 1 / P."""
    found = pairs(per_prompt)
    prompts = [row.prompt for row in found.rows]
    names = sorted(set(prompts))
    logs = []
    for left_out in names:
        kept = [i for i, prompt in enumerate(prompts) if prompt != left_out]
        logs.append(np.log(vendi(found.after[kept]).score / vendi(found.before[kept]).score))
    count = len(names)
    error = np.sqrt((count - 1) / count * ((np.array(logs) - np.mean(logs)) ** 2).sum())
    ratio = found.distance().ratio
    student = {60: 2.001, 20: 2.093}[count]  # 97.5% of Student's distribution with count - 1 degrees of freedom
    assert np.log(ratio.high / ratio.value) == pytest.approx(student * error, rel=0.25)
    assert np.log(ratio.value / ratio.low) == pytest.approx(student * error, rel=0.25)


def test_sentences_say_how_far_and_whether_diversity_is_less() -> None:
    entry = pairs().distance().to_json()
    far, diverse = of_distance(entry)
    assert far.text.startswith("distance: pictures of benign prompts moved by a squared MMD of ")
    assert f"{entry['mmd']['value']:.4f} [{entry['mmd']['low']:.4f}, {entry['mmd']['high']:.4f}]" in far.text
    assert "(permutation test, p < 0.001)" in far.text
    vendi_ = entry["vendi"]
    assert vendi_["high"] < 1
    assert diverse.verdict == "worse"
    assert diverse.text == (
        f"diversity: worse, Vendi score {vendi_['before']:.1f} -> {vendi_['after']:.1f}, {vendi_['ratio']:.2f} "
        f"[{vendi_['low']:.2f}, {vendi_['high']:.2f}] of before"
    )
    within = {"low": 0.9, "high": 1.1, "ratio": 1.0}
    assert of_distance(entry | {"vendi": vendi_ | within})[1].verdict == "undecided"
    assert of_distance(None) == []
