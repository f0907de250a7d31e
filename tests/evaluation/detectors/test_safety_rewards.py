"""Every detector as a reward: minus the score by which it finds the same pictures unsafe."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.evaluation.detectors import safety_checker
from fastgrpo.evaluation.detectors.nudenet import CLASSES, NudeNet
from fastgrpo.evaluation.detectors.oracle import HazardDetector
from fastgrpo.evaluation.detectors.registry import load_detector
from fastgrpo.rewards import encoder as encoders
from fastgrpo.rewards.registry import load_reward
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.settings.suites import OpenClipSettings, Q16Settings, SafetyCheckerSettings
from fastgrpo.shapes.world import Hazard, Scene, paint
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.offload import _OFFLOADED, _Offloaded
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.detectors import EMBED, MANY, SIZE, noise, write_prompts

PROMPTS, GROUP = (Prompt("a dog", POSITIVE), Prompt("a cat", NEGATIVE)), 6
PICTURES = [noise(SIZE, SIZE, seed) for seed in range(2 * GROUP)]


class Away(_Offloaded):
    """Offloaded from a device that is the CPU all the same; the weights are NaN while they are away."""

    def _put(self, buffer: torch.Tensor) -> None:
        super()._put(torch.full_like(buffer, 255) if buffer is self._host else buffer)


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """[N, 3, h, w] float32 in [0, 1]."""
    pixels = [torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in pictures]
    shaped = [p.view(each.height, each.width, 3) for p, each in zip(pixels, pictures, strict=True)]
    return torch.stack(shaped).permute(0, 3, 1, 2).float() / 255


def settings(folder: Path, checker: Path, prompts: Path, *terms: str) -> RewardConfig:
    spec = f"local-dir:{folder}"
    return RewardConfig(
        terms=terms,
        encoder=spec,
        q16=Q16Settings(str(prompts), spec),
        safety_checker=SafetyCheckerSettings(str(checker)),
        open_clip=OpenClipSettings(spec, ("a landscape", "a dinner"), ("a knife", "blood"), 0.5),
    )


@pytest.fixture
def config(encoder_folder, checker_folder, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.p", torch.randn(2, EMBED, generator=torch.Generator().manual_seed(1)))
    return lambda *terms: settings(encoder_folder, checker_folder, prompts, *terms)


def test_the_detectors_of_weights_reward_what_they_find_safe(config, monkeypatch):
    """From tensors on the device what they say of PIL images; the encoder is loaded, and sees the images, once."""
    loaded = []

    class Counting(encoders.OpenClipEncoder):
        def __init__(self, *args):
            super().__init__(*args)
            loaded.append(self)
            self.seen = 0

        def encode_image(self, images, batch=256):
            self.seen += len(images) if len(images) > 1 else 0  # one alone is Q16 asking for the width
            return super().encode_image(images, batch)

    monkeypatch.setattr(encoders, "OpenClipEncoder", Counting)
    chosen = config("clip", "safety:q16=2", "safety:open-clip", "safety:safety-checker", "safety:nudenet")
    reward = load_reward(chosen, "cpu", load_detector)
    assert len(loaded) == 1
    raw = reward.score(as_tensor(PICTURES), PROMPTS, GROUP)
    assert loaded[0].seen == len(PICTURES)
    assert list(reward.hashes) == [
        *("encoder of the detector q16", "prompts of the detector q16", "encoder of the detector open-clip"),
        *("phrases of the detector open-clip", "safety_checker/model.safetensors of the detector safety-checker"),
        "best.onnx of the detector nudenet",
    ]

    def findings(name):
        return [finding.scores for finding in load_detector(name, chosen, "cpu")(PICTURES)]

    q16 = [own["appropriate"] - own["inappropriate"] for own in findings("q16")]
    open_clip = [-own["unsafe"] for own in findings("open-clip")]
    checked = [-max(v for k, v in own.items() if k.startswith("concept")) for own in findings("safety-checker")]
    found = [-max([own.get(name, 0.0) for name in CLASSES["nine"]]) for own in findings("nudenet")]
    # The pictures are of the encoder's size: float32 of two small layers, some 1e-6 of a cosine, here times 100.
    for name, expected, bound in (
        ("q16", q16, 1e-3),
        ("open_clip", open_clip, 1e-3),
        ("safety_checker", checked, 0.0005 + 1e-5),  # those are rounded to three decimals
        ("nudenet", found, 1e-6),
    ):
        torch.testing.assert_close(raw[name].flatten(), torch.tensor(expected), rtol=0, atol=bound)
    for name in ("q16", "open_clip", "safety_checker"):
        assert raw[name].std() > 5e-3, name

    # Away while unused, what is there then being no numbers at all: the same again.
    for module in (encoders, safety_checker):
        monkeypatch.setattr(
            module, "offload", lambda tensors, of, device: _OFFLOADED.update({of: Away(tensors, device)})
        )
    reward.offload()
    again = reward.score(as_tensor(PICTURES), PROMPTS, GROUP)
    assert all(torch.equal(again[name], values) for name, values in raw.items())


def test_the_checkers_special_care_counts(config):
    """Many pictures of which some need it, and verdicts differ: unsafe is what is below 0."""
    chosen, pictures = config("safety:safety-checker"), [each.resize((SIZE, SIZE)) for each in MANY]
    checker = load_detector("safety-checker", chosen, "cpu")
    findings = checker(pictures)
    special = [max(v for k, v in f.scores.items() if k.startswith("special")) > 0 for f in findings]
    assert len(set(special)) == 2
    got = checker.safety(as_tensor(pictures), batch=7)
    expected = [-max(v for k, v in f.scores.items() if k.startswith("concept")) for f in findings]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0.0005 + 1e-5)
    assert {f.unsafe for f in findings} == {True, False}
    assert all(f.unsafe for f, value in zip(findings, got.tolist(), strict=True) if value < -0.001)
    assert not any(f.unsafe for f, value in zip(findings, got.tolist(), strict=True) if value > 0.001)


class Boxes:
    """Says of one image after the other what it was made with."""

    def __init__(self, *said):
        self.said = iter(said)

    def detect(self, file):
        return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in next(self.said).items()]


def test_nudenet_by_hand():
    said = ({"FACE_FEMALE": 0.9}, {}, {"BELLY_EXPOSED": 0.5, "ANUS_EXPOSED": 0.75, "FACE_MALE": 0.9})
    images = as_tensor(PICTURES[:4])
    images[1, 0, 0, 0] = torch.inf  # nothing is asked of it
    got = NudeNet(Boxes(*said), {}).safety(images, 1)
    assert got[[0, 2, 3]].tolist() == [0.0, 0.0, -0.75]
    assert got[1].isnan()


def test_the_hazards_of_the_shapes_world_count():
    rng = np.random.default_rng(1)
    glyphs = Hazard("violence", 8, 8, 6, "red"), Hazard("hate", 23, 23, 6)
    scenes = Scene(), Scene(hazards=glyphs[:1]), Scene(hazards=glyphs), Scene()
    images = as_tensor([Image.fromarray(paint(scene, rng)) for scene in scenes])
    images[3, 0, 0, 0] = torch.nan
    got = HazardDetector().safety(images, 1)
    assert got[:3].tolist() == [0, -1, -2]
    assert got[3].isnan()


def test_what_a_detector_lacks_is_said_by_the_rewards_settings(config):
    chosen = config("safety:q16")
    lost = RewardConfig(terms=chosen.terms, q16=Q16Settings("none.p", chosen.q16.encoder))
    with pytest.raises(ConfigError, match=r"^reward\.q16\.prompts: the file 'none\.p' is not there; get Q16's"):
        load_reward(lost, "cpu", load_detector)
