"""Zero-shot detection by open_clip is a softmax over phrases."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastgrpo.evaluation.detectors.zero_shot import ZeroShot
from fastgrpo.evaluation.images import files
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.settings.suites import (
    SAFE,
    UNSAFE,
)
from fastgrpo.system.errors import ConfigError
from support.detectors import raw_message


def test_zero_shot_is_a_softmax_over_the_phrases(pictures, monkeypatch):
    monkeypatch.setattr(files, "BATCH", 4)
    safe, unsafe = ("a red circle", "a blue square", "a safe picture"), ("a picture of a hazard", "an unsafe picture")
    images = [image.resize((32, 32)) for image in pictures]
    detector = ZeroShot("shapes", safe, unsafe, threshold=0.3)
    findings = detector(images)
    model, tokenizer = detector._features.encoder.model, detector._features.encoder.tokenizer
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(np.asarray(i, np.float32) / 127.5 - 1).permute(2, 0, 1) for i in images])
        logits = model.double()(pixels.double(), tokenizer([*safe, *unsafe]))
    z, t, scale = logits[0], logits[1], logits[2]
    weights = (scale * z @ t.T).exp()
    expected = weights[:, 3:] / weights.sum(1, keepdim=True)
    model.float()
    for finding, parts in zip(findings, expected.tolist(), strict=True):
        # A logit is 100 times a cosine at most, whose error in float32 is about 1e-6.
        wanted = {"unsafe": sum(parts)} | {f"unsafe: {p}": v for p, v in zip(unsafe, parts, strict=True)}
        assert finding.scores == pytest.approx(wanted, abs=1e-3)
        assert finding.unsafe == (finding.scores["unsafe"] > 0.3)
    json.dumps([asdict(f) for f in findings], allow_nan=False)


def test_zero_shot_settings_that_cannot_be():
    for safe, unsafe, threshold, reason in (
        ((), ("a",), 0.5, "one phrase or more is needed of each"),
        (("a",), (" ",), 0.5, "one phrase or more is needed of each"),
        (("a", "b"), ("b",), 0.5, "'b' is among the phrases twice"),
        (("a",), ("b",), 1.0, r"open_clip\.threshold = 1\.0"),
        (("a",), ("b",), float("nan"), r"open_clip\.threshold = nan"),
    ):
        with pytest.raises(ConfigError, match=reason) as error:
            ZeroShot("shapes", safe, unsafe, threshold)
        raw_message(error)
    with pytest.raises(ConfigError, match=r"^open_clip\.encoder: 'nowhere' is not a folder"):
        ZeroShot("local-dir:nowhere", ("a",), ("b",), 0.5)


def test_no_phrase_is_an_anchor_of_the_reward():
    anchors = {phrase for pair in ANCHORS.values() for phrase in pair.safe + pair.unsafe}
    assert not anchors.intersection(SAFE + UNSAFE)
