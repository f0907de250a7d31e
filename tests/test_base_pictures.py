"""The base model's pictures: drawn once, kept in the run's folder, the same bits ever after."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgrpo import base_pictures as module
from fastgrpo import train
from fastgrpo.assembly import Training, load_training
from fastgrpo.base_pictures import BasePictures, base_pictures
from fastgrpo.rollout import draw_images
from fastgrpo.run.folder import claim
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.randomness import seed_for
from fastgrpo.types import POSITIVE
from support.training import altered

Draw = Callable[..., BasePictures]
FEATURES_FILE, NOTES_FILE = "base.safetensors", "base.json"  # other programs read them by these names


@pytest.fixture(scope="module")
def training(config_file: Path) -> Training:
    return load_training(load_toml(config_file), 1, say=lambda line: None)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def draw(training: Training, said: list[str]) -> Draw:
    def drawing(run: Path | None, **changes: object) -> BasePictures:
        config, encoder = altered(training.config, changes), training.reward.encoder
        assert encoder is not None
        prompts = training.prompts
        return base_pictures(config, training.policy, training.schedule, encoder, prompts, run, Ranks(), said.append)

    return drawing


def test_features_are_those_of_pictures_drawn_one_by_one(training: Training, draw: Draw) -> None:
    found, rollout = draw(None), training.config.rollout
    positives = [prompt for prompt in training.prompts if prompt.label == POSITIVE]
    assert found.ids == tuple(prompt.id for prompt in positives)
    assert found.features.shape == (len(positives), 4, 32)
    for prompt, features in zip(positives, found.features, strict=True):
        for k in range(4):
            seed = seed_for(training.config.seed, prompt.id, f"base picture {k}")
            embeds = training.policy.encode([prompt.text])
            image = draw_images(training.policy, embeds, training.schedule, rollout.guidance, [seed])
            assert training.reward.encoder is not None
            own = training.reward.encoder.encode_image(image, 1)[0]
            # One image instead of twenty: products of other sizes, over a few steps of a small network.
            assert (own - features[k]).abs().max() < 1e-3
        assert (features[0] - features[1]).abs().max() > 1e-2, "two pictures of one prompt are two"


def test_they_are_drawn_once(draw: Draw, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(tmp_path)
    assert (len(said), sorted(each.name for each in tmp_path.iterdir())) == (1, [NOTES_FILE, FEATURES_FILE])
    kept = load_file(tmp_path / FEATURES_FILE)
    assert torch.equal(kept["features"], first.features)
    assert tuple(kept["ids"].tolist()) == first.ids
    with monkeypatch.context() as patch:
        patch.delattr(module, "draw_images")
        again = draw(tmp_path)
    assert torch.equal(again.features, first.features)
    assert again.ids == first.ids
    assert len(said) == 1


@pytest.mark.parametrize("spoilt", [FEATURES_FILE, NOTES_FILE])
def test_what_is_damaged_is_made_anew(draw: Draw, said: list[str], tmp_path: Path, spoilt: str) -> None:
    first = draw(tmp_path)
    data = (tmp_path / spoilt).read_bytes()
    (tmp_path / spoilt).write_bytes(data[:-9])
    assert torch.equal(draw(tmp_path).features, first.features)
    assert (tmp_path / spoilt).read_bytes() == data
    assert said[1].startswith("warning: ")


def test_other_settings_draw_other_pictures(draw: Draw, said: list[str], tmp_path: Path) -> None:
    first, other = draw(tmp_path), draw(tmp_path, **{"seed": 7})
    assert not torch.equal(first.features, other.features)
    assert said[1] == "the base model's pictures: made anew, since this is not as before: seed"
    assert json.loads((tmp_path / NOTES_FILE).read_text())["made_by"]["seed"] == 7


def test_without_positive_prompts_there_are_none(training: Training, tmp_path: Path) -> None:
    negatives = [prompt for prompt in training.prompts if prompt.label != POSITIVE]
    encoder = training.reward.encoder
    assert encoder is not None
    parts = training.config, training.policy, training.schedule, encoder, negatives
    assert base_pictures(*parts, tmp_path, Ranks(), print).ids == ()
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_draws_no_more(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    options = [str(config_file), "--iterations", "2", "--prompts-per-iteration", "4"]
    options += ["--prompts.negative-fraction", "0.25"]
    options += ["--engine.threads", "1", "--checkpoint.every", "1", "--checkpoint.keep", "0", "--eval.every", "0"]
    assert train.main([*options, "--run", str(run)]) == 0
    weights = [file.read_bytes() for file in sorted((run / "checkpoints").rglob("*.safetensors"))]
    shutil.copytree(run, again)  # as if it had been killed in its second iteration
    shutil.rmtree(again / "checkpoints" / "iter-000002")
    with monkeypatch.context() as patch:
        patch.delattr(module, "draw_images")
        assert train.main(["--resume", str(again), "--iterations", "2"]) == 0
    assert [file.read_bytes() for file in sorted((again / "checkpoints").rglob("*.safetensors"))] == weights
    for name in ("base.safetensors", "base.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_a_start_that_was_killed_while_it_drew_is_no_run_yet(tmp_path: Path) -> None:
    for name in ("base.safetensors", "base.json.partial"):
        (tmp_path / name).touch()
    with claim(tmp_path, resumed=False):
        pass
    (tmp_path / "other").touch()
    with pytest.raises(ConfigError, match="accepted is a folder that is new or empty"), claim(tmp_path, resumed=False):
        pass
