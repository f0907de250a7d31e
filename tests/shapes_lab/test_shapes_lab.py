"""How the shipped models are made and measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgrpo.models.check import SHAPES_PIPELINE
from fastgrpo.policy import load_policy
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.shapes_lab import measure
from fastgrpo.shapes_lab.architectures import CONTEXT, build_tokenizer, vocabulary
from fastgrpo.shapes_lab.drawings import caption, paint_pictures, random_request, to_unit
from fastgrpo.shapes_lab.measure import oracle_quality, round_trip


@pytest.mark.slow
def test_oracle_reads_vae_round_trips():
    pictures = paint_pictures(1000, seed=123456)
    policy = load_policy(ModelConfig(path="shapes"), torch.device("cpu"), torch.float32)
    images = round_trip(policy, to_unit(pictures.images))
    quality = oracle_quality(images, pictures.scenes)
    for name, row in quality.items():
        assert min(row["precision"], row["recall"]) >= 0.93, (name, row)
    assert min(quality["any hazard"]["precision"], quality["any hazard"]["recall"]) >= 0.99


def test_every_word_is_one_token_and_the_end_token_is_the_largest(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # open_clip pools at the largest id
    rng = np.random.default_rng(5)
    assert max(len(tokenizer(caption(random_request(rng), rng)).input_ids) for _ in range(2000)) <= CONTEXT


def test_measuring_prints_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into weights/quality.json, which is part of the project, it is put by whoever means to."""
    shipped = (SHAPES_PIPELINE.parent / "quality.json").read_bytes()
    for slow in ("oracle_quality", "encoder_quality", "teacher_quality", "round_trip", "load_policy", "load_encoder"):
        monkeypatch.setattr(measure, slow, lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["measure", "--pictures", "2"])
    monkeypatch.chdir(tmp_path)
    measure.main()
    assert json.loads(capsys.readouterr().out)["pictures"] == 2
    assert (SHAPES_PIPELINE.parent / "quality.json").read_bytes() == shipped
    assert list(tmp_path.iterdir()) == []
