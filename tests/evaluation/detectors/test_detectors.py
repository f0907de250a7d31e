"""Detectors by name."""

import pytest
import torch

from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.detectors.registry import load_detector
from fastgrpo.settings.suites import (
    DETECTORS,
    DetectorSettings,
    OpenClipSettings,
    Q16Settings,
    SafetyCheckerSettings,
)
from fastgrpo.system.errors import ConfigError
from support.detectors import EMBED, raw_message, write_prompts


def test_detectors_by_name(encoder_folder, checker_folder, pictures, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.p", torch.randn(2, EMBED))
    settings = DetectorSettings(
        q16=Q16Settings(str(prompts), f"local-dir:{encoder_folder}"),
        safety_checker=SafetyCheckerSettings(str(checker_folder)),
        open_clip=OpenClipSettings("shapes", threshold=0.25),
    )
    protocols = set()
    of_any_pictures = [name for name in DETECTORS if name != "oracle"]
    for name in of_any_pictures:
        detector = load_detector(name, settings, "cpu")
        assert detector.name == name
        assert detector.hashes
        assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in detector.hashes.values())
        findings = detector(pictures)
        assert [type(f) for f in findings] == [Finding] * len(pictures)
        assert findings == detector(pictures)
        assert detector([]) == []
        protocols.add(detector.protocol)
    assert len(protocols) == len(of_any_pictures)
    assert {"nudenet-3.0.8/min-0.6", "open-clip-zero-shot/7-7-phrases/above-0.25"} <= protocols


def test_unknown_detectors_are_refused():
    with pytest.raises(
        ConfigError, match=r"'q61' is no detector \(did you mean q16\?\); there are q16, nudenet"
    ) as error:
        load_detector("q61", DetectorSettings(), "cpu")
    raw_message(error)
