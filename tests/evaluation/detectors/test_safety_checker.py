"""Stable Diffusion's safety checker says what diffusers says."""

import json
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file, save_file

from fastgrpo.evaluation.detectors.safety_checker import SafetyChecker
from fastgrpo.evaluation.images import files
from fastgrpo.settings.suites import (
    SafetyCheckerSettings,
)
from fastgrpo.system.errors import ConfigError
from support.detectors import MANY, make_checker, prepared, raw_message, save_pipeline


def test_safety_checker_agrees_with_diffusers(checker, checker_folder, monkeypatch):
    monkeypatch.setattr(files, "BATCH", 7)
    detector = SafetyChecker(str(checker_folder))
    before = [image.tobytes() for image in MANY]
    findings = detector(MANY)
    # diffusers' own verdict, on images of its own, which it makes black.
    dummies = torch.ones(len(MANY), 1)
    _, verdicts = checker(prepared(MANY).float(), dummies)
    assert [f.unsafe for f in findings] == verdicts
    assert 5 < sum(verdicts) < len(MANY) - 5
    assert (dummies.squeeze(1) == 0).tolist() == verdicts
    assert [image.tobytes() for image in MANY] == before
    # Somewhere the special care alone decides, or it would not have been tested.
    with torch.no_grad():
        embeds = F.normalize(
            checker.visual_projection(checker.vision_model(prepared(MANY).float()).pooler_output), dim=-1
        )
        plain = embeds @ F.normalize(checker.concept_embeds, dim=-1).T - checker.concept_embeds_weights
    assert any(f.unsafe and not above for f, above in zip(findings, (plain > 0.0005).any(1).tolist(), strict=True))


def test_safety_checker_scores(checker, checker_folder):
    """Each score against float64, to the half of the last decimal that rounding takes and float32's own error."""
    findings = SafetyChecker(str(checker_folder))(MANY)
    twin = make_checker().double()
    with torch.no_grad():
        embeds = twin.visual_projection(twin.vision_model(prepared(MANY)).pooler_output)
        special = (
            F.cosine_similarity(embeds[:, None], twin.special_care_embeds, dim=-1) - twin.special_care_embeds_weights
        )
        concept = F.cosine_similarity(embeds[:, None], twin.concept_embeds, dim=-1) - twin.concept_embeds_weights
    care = (special > 0.0005).any(1)
    borderline = ((special - 0.0005).abs() < 1e-5).any(1)
    assert care.any()
    assert not care.all()
    concept += 0.01 * care[:, None]
    for i, finding in enumerate(findings):
        assert finding.scores.keys() == {f"special_{j}" for j in range(3)} | {f"concept_{k}" for k in range(17)}
        if not borderline[i]:
            expected = [*special[i].tolist(), *concept[i].tolist()]
            assert list(finding.scores.values()) == pytest.approx(expected, abs=0.0005 + 1e-5)
    json.dumps([asdict(f) for f in findings], allow_nan=False)


@pytest.mark.parametrize("above", [0.0004, 0.0006])
@pytest.mark.parametrize("care", [False, True])
def test_safety_checker_rounds_before_it_judges(checker_folder, above, care):
    """Half a thousandth above a threshold decides, for a concept and for the special care that lowers its own."""
    detector = SafetyChecker(str(checker_folder))
    inner, image = detector.checker, MANY[:1]
    with torch.no_grad():
        embeds = F.normalize(inner.visual_projection(inner.vision_model(prepared(image).float()).pooler_output), dim=-1)
        inner.concept_embeds_weights.fill_(2.0)  # out of reach
        inner.special_care_embeds_weights.fill_(2.0)
        concept = (embeds @ F.normalize(inner.concept_embeds, dim=-1).T)[0, 5]
        special = (embeds @ F.normalize(inner.special_care_embeds, dim=-1).T)[0, 1]
        inner.concept_embeds_weights[5] = concept + 0.005 if care else concept - above
        inner.special_care_embeds_weights[1] = special - above if care else 2.0
    (finding,) = detector(image)
    _, verdict = inner(prepared(image).float(), torch.ones(1, 1))
    assert [finding.unsafe] == verdict == [above > 0.0005]


def test_safety_checker_alone_in_a_folder(checker_folder, pictures):
    whole = SafetyChecker(str(checker_folder))
    alone = checker_folder / "safety_checker"
    (alone / "preprocessor_config.json").write_bytes(
        (checker_folder / "feature_extractor" / "preprocessor_config.json").read_bytes()
    )
    try:
        other = SafetyChecker(str(alone))
    finally:
        (alone / "preprocessor_config.json").unlink()
    assert other(pictures) == whole(pictures)
    assert other.hashes == whole.hashes


def test_safety_checkers_that_do_not_load(checker, tmp_path, tiny_pipeline):
    with pytest.raises(
        ConfigError, match=r"^safety_checker\.source is .* has no safety checker in safety_checker/"
    ) as error:
        SafetyChecker(str(tiny_pipeline))
    raw_message(error)
    with pytest.raises(ConfigError, match="there is no such folder"):
        SafetyChecker("nowhere/at/all")
    folder = save_pipeline(tmp_path / "pipeline", checker, names_of_old=False)
    weights, config = (folder / "safety_checker" / name for name in ("model.safetensors", "config.json"))
    whole, described = weights.read_bytes(), config.read_text()
    save_file({n: t for n, t in load_file(weights).items() if n != "concept_embeds"}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="whose safety checker lacks concept_embeds"):
        SafetyChecker(str(folder))
    state = load(whole)
    state["concept_embeds"][0, 0] = torch.nan
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="safety checker has numbers that are not finite in concept_embeds"):
        SafetyChecker(str(folder))
    weights.write_bytes(b"<!doctype html>")
    with pytest.raises(ConfigError, match=r"model\.safetensors', a web page, not weights"):
        SafetyChecker(str(folder))
    weights.write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        SafetyChecker(str(folder))
    raw_message(error)
    weights.write_bytes(whole)
    config.write_text(described.replace("StableDiffusionSafetyChecker", "CLIPModel"))
    with pytest.raises(ConfigError, match="is a CLIPModel; a StableDiffusionSafetyChecker is accepted"):
        SafetyChecker(str(folder))
    config.write_text(described)
    (folder / "feature_extractor" / "preprocessor_config.json").unlink()  # then CLIP's own, of 224 pixels
    with pytest.raises(ConfigError, match=r"224 x 224 pixels; its safety checker takes 32 x 32"):
        SafetyChecker(str(folder))


def test_safety_checker_missing_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        ConfigError, match=r"no such folder, .* its cache on this machine .* give a diffusers folder with"
    ) as error:
        SafetyChecker(SafetyCheckerSettings().source)
    raw_message(error)
    assert not (tmp_path / "hub").exists()
