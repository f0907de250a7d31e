"""Mask2Former's post-processing against a float64 statement of it and against transformers' own.

Colours, as CLIP sees them, are worked out by hand.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.evaluation.detectors.colours import TEMPLATES, ClipColours, cut_out
from fastgrpo.evaluation.detectors.mask2former import Mask2Former, detect, prepare, resized_size
from fastgrpo.evaluation.images import files
from fastgrpo.evaluation.metrics.geneval_rules import Detected, evaluate_images
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.prompts.geneval import CLASSES, COLORS
from fastgrpo.rewards.encoder_files import SHIPPED_ENCODERS
from fastgrpo.system.errors import ConfigError
from support.mask2former import tiny_model

# isort: split
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerImageProcessor

MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])

# Float32 against float64. Two interpolations round some three times each, by 6e-8 of the largest logit: a pixel further
# than CERTAIN of it from 0 is on the same side in both. Logits of at most 20 so differ by less than 1e-5, their
# sigmoids and hence quality and score by a quarter of that; the sum over some 2,000 pixels and the softmax add some
# 1e-6.
CERTAIN = 5e-7
SCORE_TOLERANCE = 1e-5


# A second statement of the post-processing, in float64, query by query


def axis_weights(source: int, target: int) -> np.ndarray:
    """[target, source]: how bilinear interpolation, with pixels as squares, mixes the pixels of one axis."""
    weights = np.zeros((target, source))
    for i in range(target):
        place = min(max((i + 0.5) * source / target - 0.5, 0), source - 1)
        low = int(np.floor(place))
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, source - 1)] += place - low
    return weights


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (axis_weights(s, t) for s, t in zip(picture.shape, size, strict=True))
    return rows @ picture @ columns.T


def restated(
    class_logits: np.ndarray,
    mask_logits: np.ndarray,
    padded: tuple,
    resized: tuple,
    original: tuple,
    least: float,
    certain: float = CERTAIN,
) -> list[tuple[str, float, tuple, np.ndarray]]:
    """(class, score, box, mask) of one image's detections with score > least, of the 100 likeliest pairs."""
    exponentials = np.exp(class_logits - class_logits.max(1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(1, keepdims=True))[:, :-1]
    pairs = sorted(np.ndindex(probabilities.shape), key=lambda pair: -probabilities[pair])[:100]
    brought_back = [resize(resize(m, padded)[: resized[0], : resized[1]], original) for m in mask_logits]
    found = []
    for query, label in pairs:
        logits = brought_back[query]
        if probabilities[query, label] > least:
            assert np.abs(logits).min() > certain * np.abs(mask_logits[query]).max()
        mask = logits > 0
        quality = (1 / (1 + np.exp(-logits[mask]))).sum() / (mask.sum() + 1e-6)
        rows, columns = np.nonzero(mask)
        if (score := probabilities[query, label] * quality) > least:
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.append((CLASSES[label], score, box, mask))
    return found


def assert_same(actual: Sequence[Detected], expected: Sequence[tuple]) -> None:
    """Up to the order of detections whose classes are about equally likely."""
    assert len(actual) == len(expected)
    actual = sorted(actual, key=lambda seen: (seen.label, -seen.score))
    for seen, (label, score, box, mask) in zip(actual, sorted(expected, key=lambda e: (e[0], -e[1])), strict=True):
        assert (seen.label, seen.box) == (label, tuple(map(float, box)))
        assert seen.score == pytest.approx(score, abs=SCORE_TOLERANCE)
        assert seen.mask.dtype == bool
        np.testing.assert_array_equal(seen.mask, mask)


def random_logits(images: int, queries: int, size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits, of which a few are large, and mask logits that are smooth blobs of either sign."""
    generator = torch.Generator().manual_seed(seed)
    classes = 4 * torch.randn(images, queries, len(CLASSES) + 1, generator=generator)
    coarse = torch.randn(images, queries, 4, 4, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size, mode="bicubic") * 5
    return classes, masks.clamp(-20, 20)


@pytest.mark.parametrize(
    ("padded", "resized", "original"),
    [
        ((64, 96), (60, 90), (37, 55)),  # shrunk, with padding on both sides
        ((32, 32), (32, 32), (48, 48)),  # grown, without
        ((64, 32), (50, 32), (20, 33)),
    ],
)
def test_scores_masks_and_boxes_are_those_of_a_direct_computation(padded, resized, original):
    classes, masks = random_logits(3, 6, (padded[0] // 4, padded[1] // 4), seed=sum(original))
    found = detect(classes, masks, padded, resized, original, min_score=0.3)
    assert sum(map(len, found)) >= 6
    for index, detections in enumerate(found):
        logits = classes[index].double().numpy(), masks[index].double().numpy()
        assert_same(detections, restated(*logits, padded, resized, original, least=0.3))


def test_as_transformers_has_it_where_that_works_at_the_image_s_size():
    """Its masks are made at 384 x 384: with such an image, neither resized nor padded, the rules are the same."""
    classes, masks = random_logits(2, 100, (48, 48))
    found = detect(classes, masks, (384, 384), (384, 384), (384, 384), min_score=0.1)
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0.1, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    for detections, other in zip(found, theirs, strict=True):
        expected = []
        for info, mask in zip(other["segments_info"], other["segmentation"].numpy() > 0, strict=True):
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            expected.append((CLASSES[info["label_id"]], info["score"], box, mask))
        assert len(expected) > 50
        assert_same(detections, expected)


def test_one_query_may_be_two_classes_with_one_mask():
    classes = torch.full((1, 2, 81), -20.0)
    classes[0, 0, [CLASSES.index("dog"), CLASSES.index("cat")]] = 5.0  # half and half
    classes[0, 1, -1] = 5.0  # nothing
    masks = torch.full((1, 2, 8, 8), -8.0)
    masks[0, 0, 2:6, 4:7] = 8.0
    dog, cat = sorted(detect(classes, masks, (8, 8), (8, 8), (8, 8))[0], key=lambda seen: seen.label, reverse=True)
    assert (dog.label, cat.label) == ("dog", "cat")
    assert dog.box == cat.box == (4, 2, 7, 6)
    quality = 1 / (1 + np.exp(-8)) * 12 / (12 + 1e-6)
    # float32's softmax and mean are within a few of its roundings, 6e-8
    assert [dog.score, cat.score] == pytest.approx([quality / 2] * 2, abs=1e-6)
    np.testing.assert_array_equal(dog.mask, (masks[0, 0] > 0).numpy())


def test_the_hundred_likeliest_pairs_are_detections():
    classes, masks = random_logits(1, 8, (8, 8))
    masks = masks.abs() + 0.1  # no mask is empty
    found = detect(classes, masks, (32, 32), (32, 32), (32, 32), min_score=0.0)[0]
    expected = restated(classes[0].double().numpy(), masks[0].double().numpy(), (32, 32), (32, 32), (32, 32), least=0)
    assert len(found) == 100
    assert_same(found, expected)


def test_what_is_left_out_early_would_not_have_exceeded_the_least_score():
    classes, masks = random_logits(2, 20, (16, 16))
    every = detect(classes, masks, (64, 64), (64, 64), (30, 30), min_score=0.0)
    few = detect(classes, masks, (64, 64), (64, 64), (30, 30), min_score=0.2)
    for detections, kept in zip(every, few, strict=True):
        # Masks are interpolated together with others, which may round otherwise.
        assert_same(kept, [(s.label, s.score, s.box, s.mask) for s in detections if s.score > 0.2])
    assert 0 < sum(map(len, few)) < sum(map(len, every)) / 2


def test_a_mask_that_is_empty_is_no_object():
    classes = torch.full((1, 1, 81), -20.0)
    classes[..., 0] = 20.0
    assert detect(classes, torch.full((1, 1, 8, 8), -1.0), (8, 8), (8, 8), (8, 8), min_score=0.0) == [[]]
    assert detect(-classes, torch.ones(1, 1, 8, 8), (8, 8), (8, 8), (8, 8)) == [[]]


# What the model is given


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((512, 768), (800, 1200)),
        ((768, 512), (1200, 800)),
        ((1024, 1024), (800, 800)),
        ((300, 900), (444, 1333)),  # 900 -> 1333 leaves 444.3; 300 -> 800 would need 2400
        ((333, 501), (800, 1204)),  # 1203.6 rounds up
        ((480, 640), (800, 1067)),
        ((10, 1000), (13, 1333)),
    ],
)
def test_sizes(size, expected):
    assert resized_size(*size) == expected


def test_images_are_resized_normalised_and_padded():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    padded, (height, width) = prepare(pixels)
    assert (height, width) == (800, 1333)
    assert padded.shape == (1, 3, 800, 1344)
    assert (padded[..., width:] == 0).all()
    values = padded[0, :, :, :width].double().numpy().transpose(1, 2, 0) * STD + MEAN
    # Whole levels, up to float32's rounding of the normalised value, 2.7 at most, times 58.
    np.testing.assert_allclose(values, values.round(), atol=58 * 2.7 * 2.0**-22)
    exact = np.stack([resize(np.array(image)[..., c].astype(float), (height, width)) for c in range(3)], axis=-1)
    assert np.abs(values - exact).max() < 0.5 + 1e-3
    # PIL rounds once more, between the axes.
    assert np.abs(values - np.array(image.resize((width, height), Image.BILINEAR), dtype=float)).max() < 1.01


# The model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mask2former")
    tiny_model().save_pretrained(path)
    return path


def draw(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((size[1], size[0]), Image.BICUBIC)


def test_images_of_any_size_are_detected_in_as_one_by_one(folder):
    sizes = [(20, 32), (24, 24), (20, 32)]
    images = [draw(size, seed) for seed, size in enumerate(sizes)]
    detector = Mask2Former(str(folder), "cpu")
    found = detector(images)
    for image, size, objects in zip(images, sizes, found, strict=True):
        padded, resized = prepare(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
        with torch.no_grad():
            output = detector.model(pixel_values=padded)
        expected = restated(
            output.class_queries_logits[0].double().numpy(),
            output.masks_queries_logits[0].double().numpy(),
            tuple(padded.shape[-2:]),
            resized,
            size,
            least=0.3,
            certain=2e-6,  # the model itself rounds otherwise in another batch
        )
        assert expected
        assert all(seen.label == name for name, group in objects.items() for seen in group)
        assert_same([seen for group in objects.values() for seen in group], expected)
    assert detector([]) == []


def test_a_detector_says_what_it_is(folder):
    detector = Mask2Former(str(folder), "cpu")
    assert detector.name == "mask2former"
    assert detector.protocol == "mask2former/800-1333/top-100"
    assert list(detector.hashes) == ["model.safetensors"]
    assert len(detector.hashes["model.safetensors"]) == 64
    assert not any(p.requires_grad for p in detector.model.parameters())


def refusal(spec: Path | str) -> str:
    with pytest.raises(ConfigError) as error:
        Mask2Former(str(spec), "cpu")
    message = str(error.value)
    assert str(spec) in message
    assert "\n" not in message
    return message


def test_torch_files_are_read_without_running_them(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    detector = Mask2Former(str(tmp_path), "cpu")
    assert list(detector.hashes) == ["pytorch_model.bin"]
    assert weights_sha256(detector.model) == weights_sha256(Mask2Former(str(folder), "cpu").model)

    class Hostile:
        def __reduce__(self) -> tuple[Callable, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(state | {"extra": Hostile()}, tmp_path / "pytorch_model.bin")
    assert "cannot be loaded" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_or_no_weights_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    name = "class_predictor.bias"
    state[name][3] = torch.inf
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"which has numbers that are not finite in {name} (float32)" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 5\n")
    assert "model.safetensors', the Git LFS pointer to a file of 5 bytes" in refusal(tmp_path)


def test_what_is_missing_or_broken_is_said_in_a_sentence(folder, tmp_path, monkeypatch):
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "config.json cannot be read" in refusal(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_dim": "wide"}))
    assert "config.json cannot be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    assert "a 'swin' of" in refusal(tmp_path)
    more = {"id2label": {i: str(i) for i in range(133)}}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert "133 classes; a 'mask2former' of COCO's 80 is accepted" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert "cannot be loaded" in refusal(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["class_predictor.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "which lacks class_predictor.weight" in refusal(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "give a folder with its config.json and weights" in refusal("someone/new")


# Colours


@pytest.fixture(scope="module")
def colours():
    return ClipColours("shapes", "cpu", "--colours")


def test_an_object_is_cut_out_on_grey():
    image = draw((12, 20), 0)
    mask = np.zeros((12, 20), dtype=bool)
    mask[3:9, 5:11] = True
    mask[3, 5] = False
    seen = Detected("dog", (5.0, 3.0, 11.0, 9.0), 0.9, mask)
    # The way GenEval does it.
    theirs = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask)).crop((5, 3, 11, 9))
    np.testing.assert_array_equal(np.array(cut_out(image, seen)), np.array(theirs))
    assert cut_out(image, seen).getpixel((0, 0)) == (0x99, 0x99, 0x99)
    whole = cut_out(image, Detected("dog", (5.0, 3.0, 11.0, 9.0), 0.9))
    np.testing.assert_array_equal(np.array(whole), np.array(image)[3:9, 5:11])


def objects_in(images: Sequence[Image.Image]) -> list[tuple[Image.Image, Detected]]:
    rng = np.random.default_rng(1)
    pairs = []
    for image, label in zip(images, ("circle", "square", "circle", "star", "hot dog"), strict=True):
        mask = rng.random((image.height, image.width)) > 0.3
        pairs.append((image, Detected(label, (2.0, 3.0, image.width - 4.0, image.height - 1.0), 0.9, mask)))
    return pairs


def test_cosines_are_those_of_open_clip_s_own_path(colours):
    pairs = objects_in([draw((40, 60 + 8 * i), i) for i in range(5)])
    model, _, transform = open_clip.create_model_and_transforms(SHIPPED_ENCODERS["shapes"])
    tokenizer = open_clip.get_tokenizer(SHIPPED_ENCODERS["shapes"])
    unit = {}
    with torch.no_grad():
        for label in {seen.label for _, seen in pairs}:
            for colour in COLORS:
                phrases = [
                    f"a photo of a {colour} {label}",
                    f"a photo of a {colour}-colored {label}",
                    f"a photo of a {colour} object",
                ]
                z = model.eval().encode_text(tokenizer(phrases)).double().numpy()
                mean = (z / np.linalg.norm(z, axis=1, keepdims=True)).mean(0)
                unit[label, colour] = mean / np.linalg.norm(mean)
        expected = []
        for image, seen in pairs:
            z = model.encode_image(transform(cut_out(image, seen))[None])[0].double().numpy()
            expected.append([unit[seen.label, colour] @ z / np.linalg.norm(z) for colour in COLORS])
    actual = colours.cosines(pairs).numpy()
    # Cosines of float32 features: both sides' towers round in another order, by some 1e-6 of the features' size.
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert np.ptp(actual, axis=1).min() > 100 * 2e-5  # so that another colour's vector would be noticed
    assert colours(pairs) == [COLORS[np.argmax(row)] for row in expected]
    assert colours([]) == []
    assert len(TEMPLATES) == 3


def test_colours_do_not_depend_on_the_batch(colours, monkeypatch):
    pairs = objects_in([draw((40, 60), i) for i in range(5)])
    whole, alone = colours(pairs), [colours([pair])[0] for pair in pairs]
    monkeypatch.setattr(files, "BATCH", 2)
    assert colours(pairs) == whole == alone


def test_colours_say_what_they_are(colours):
    assert colours.protocol == "clip-colours/shapes"
    again = ClipColours("shapes", "cpu")
    assert again.hashes == colours.hashes
    with torch.no_grad():
        next(again.encoder.model.parameters()).view(-1)[0] += 1
    assert weights_sha256(again.encoder.model) != colours.hashes["clip"]
    with pytest.raises(ConfigError, match=r"geneval\.colours"):
        ClipColours("local-dir:/nowhere/at/all", "cpu")


def test_both_together_evaluate_images(folder, colours):
    detector = Mask2Former(str(folder), "cpu")
    image = draw((24, 24), 1)
    best = max((seen for group in detector([image])[0].values() for seen in group), key=lambda seen: seen.score)
    colour = colours([(image, best)])[0]
    other = next(c for c in COLORS if c != colour)
    rows = [{"tag": "colors", "include": [{"class": best.label, "count": 1, "color": c}]} for c in (colour, other)]
    verdicts = evaluate_images([image, image], rows, detector, colours)
    assert [v.correct for v in verdicts] == [True, False]
    assert colour in verdicts[1].reason
