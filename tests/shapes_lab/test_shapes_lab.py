"""How the shipped models are made and measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgrpo.models.check import SHAPES_PIPELINE
from fastgrpo.policy import load_policy
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes.world import TASKS
from fastgrpo.shapes_lab import measure
from fastgrpo.shapes_lab.architectures import CONTEXT, build_tokenizer, vocabulary
from fastgrpo.shapes_lab.drawings import caption, paint_pictures, random_request, to_unit
from fastgrpo.shapes_lab.measure import oracle_quality, round_trip
from fastgrpo.types import POSITIVE, Prompt, Rewards


@pytest.mark.slow
def test_oracle_reads_vae_round_trips():
    pictures = paint_pictures(700, seed=123456)
    policy = load_policy(ModelConfig(path="shapes"), torch.device("cpu"), torch.float32)
    quality = oracle_quality(round_trip(policy, to_unit(pictures.images)), pictures.scenes)
    for name, row in quality.items():
        # 95% of every class, and of hazards as a whole 99%; a share of n may lie three standard errors lower.
        rate = 0.99 if name == "any hazard" else 0.95
        least = rate - 3 * np.sqrt(rate * (1 - rate) / row["n"])
        assert min(row["precision"], row["recall"]) >= least, (name, row)


def test_every_word_is_one_token_and_the_end_token_is_the_largest(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # open_clip pools at the largest id
    rng = np.random.default_rng(5)
    assert max(len(tokenizer(caption(random_request(rng), rng)).input_ids) for _ in range(2000)) <= CONTEXT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights with both encoders, the reward's in the held-out one's place."""
    for name, shipped in (("pipeline", "pipeline"), ("encoder", "encoder"), ("held_out", "encoder")):
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / name).symlink_to(SHAPES_PIPELINE.parent / shipped)
    return tmp_path / "weights"


@pytest.mark.slow
def test_measuring_prints_what_it_finds_and_writes_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into weights/quality.json, which is part of the project, it is put by whoever means to."""
    shipped = (SHAPES_PIPELINE.parent / "quality.json").read_bytes()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert measure.main(["--weights", str(folder), "--pictures", "60", "--prompts", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 60
    assert found["encoders"]["encoder"] == found["encoders"]["held_out"]
    assert set(found["oracle"]) == {"clean", "noise", "blur", "vae"}
    trained = load_toml(find_preset("shapes")).prompts.categories
    assert set(found["encoders"]["encoder"]["prefers_in_group"]) == {*TASKS, *trained}
    assert (SHAPES_PIPELINE.parent / "quality.json").read_bytes() == shipped
    assert list((tmp_path / "here").iterdir()) == []


def test_weights_that_lack_an_encoder_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "held_out").unlink()
    assert measure.main(["--weights", str(folder)]) == 2
    assert "there is no held_out/ in it; accepted is a folder of" in capsys.readouterr().err
    assert measure.main(["--prompts", "0"]) == 2
    assert "--prompts 0: accepted is 1 or more" in capsys.readouterr().err


def test_the_teachers_choices_are_counted_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against three loops, over scores with ties, groups that are all good, and two prompts of a category."""
    generator = np.random.default_rng(6)
    prompts = tuple(Prompt(f"{i}", POSITIVE, ("colors", "counting", "colors", "position")[i], i) for i in range(4))
    scores = generator.integers(0, 6, (4, 16)).astype(np.float32)
    good = generator.random((4, 16)) < 0.4
    good[3] = True
    rewards = Rewards(total=torch.from_numpy(scores), parts={})
    monkeypatch.setattr(measure, "SteeringReward", lambda *_: lambda images, own, size: rewards)
    found = measure.teacher_quality(None, measure.DrawnGroups(prompts, torch.zeros(4, 16, 3, 2, 2), good))
    for category, numbers in (("colors", (0, 2)), ("counting", (1,)), ("position", (3,))):
        won = [
            scores[p, i] > scores[p, j]
            for p in numbers
            for i in range(16)
            for j in range(16)
            if good[p, i] and not good[p, j]
        ]
        assert found[category]["pairs"] == len(won)
        assert found[category]["preferred"] == (round(float(np.mean(won)), 3) if won else None)
    assert found["position"]["pairs"] == 0
