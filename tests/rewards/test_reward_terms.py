"""The built-in reward terms, and the encoders that they are computed with."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards import encoder as encoders
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.rewards.encoder import OpenClipEncoder, load_encoder
from fastgrpo.rewards.encoder_files import HPSV2_FILE, HPSV2_REPOSITORY
from fastgrpo.rewards.registry import BUILDERS, load_reward
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import BUILT_IN
from fastgrpo.system.errors import ConfigError
from support.encoders import EMBED, MEAN, STD, U, as_pil, tiny_config, tiny_model, write_folder
from support.rewards import GROUP, PROMPTS, P, config, pictures

# isort: split
import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

CPU = torch.device("cpu")
DEPARTURE = 10 * 256 * U  # float32 features against float64 ones: see test_features_are_the_folders_model


def test_registry_builds_every_built_in_term():
    assert set(BUILDERS) == set(BUILT_IN)


def test_encoders_are_loaded_and_asked_once(folder, images, monkeypatch):
    loads, encoded = [], []

    class Counting(OpenClipEncoder):
        def encode_text(self, texts):
            encoded.extend(texts)
            return super().encode_text(texts)

        def encode_image(self, images, batch):
            encoded.append(len(images))
            return super().encode_image(images, batch)

    def load(spec, device, field):
        loads.append((spec, field))
        encoder = load_encoder(spec, device)
        return Counting(encoder.model, encoder.tokenizer, encoder.device, encoder.dtype)

    monkeypatch.setattr(encoders, "load_encoder", load)
    reward = load_reward(config("clip", "steering", folder=folder, clip_encoder=f"local-dir:{folder}"), CPU)
    assert loads == [(f"local-dir:{folder}", "reward.clip_encoder")]
    first = reward(images, PROMPTS, GROUP)
    assert encoded.count(len(images)) == 1
    assert sorted(e for e in encoded if isinstance(e, str)) == sorted(
        {*ANCHORS["shapes"].safe, *ANCHORS["shapes"].unsafe, *(p.text for p in PROMPTS)}
    )
    # The features are of these images, and are not kept for others that come in the same memory.
    images.copy_(images.flip(0))
    second = reward(images, PROMPTS, GROUP)
    assert encoded.count(len(images)) == 2
    assert not torch.equal(first.total, second.total)


def test_steering_alone_is_the_steering_reward(folder, images):
    settings = config("steering", folder=folder, batch=5)
    reward = load_reward(settings, "cpu")
    got = reward(images, PROMPTS, GROUP)
    expected = SteeringReward(load_encoder(f"local-dir:{folder}", "cpu"), ANCHORS["shapes"], settings)(
        images, PROMPTS, GROUP
    )
    assert torch.equal(got.total, expected.total)
    assert got.total.dtype == torch.float32
    assert list(got.parts) == list(expected.parts) == ["alignment", "safety", "steered"]
    assert all(torch.equal(got.parts[name], expected.parts[name]) for name in expected.parts)
    assert reward.steering.config is settings
    assert torch.equal(
        reward.steering.direction,
        SteeringReward(load_encoder(f"local-dir:{folder}", "cpu"), ANCHORS["shapes"], settings).direction,
    )


def features(model: torch.nn.Module, folder: Path, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in float64 for the images and for PROMPTS, by open_clip alone."""
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([p.text for p in PROMPTS])
    with torch.no_grad():
        z = F.normalize(model.double().encode_image(normalised.double()), dim=-1)
        return z.numpy(), F.normalize(model.encode_text(tokens), dim=-1).numpy()


def test_clip_is_the_cosine_under_its_encoder(folder, images, tmp_path):
    reward = load_reward(
        config("clip", clip_encoder=f"local-dir:{folder}"), "cpu"
    )  # reward.encoder is not even looked at
    assert reward.steering is None
    got = reward(images, PROMPTS, GROUP)
    z, text = features(write_folder(tmp_path), tmp_path, images)
    expected = np.array([[z[p * GROUP + g] @ text[p] for g in range(GROUP)] for p in range(P)])
    bound = 2 * DEPARTURE + EMBED * U  # two features and their dot product
    np.testing.assert_allclose(got.total.numpy(), expected, rtol=0, atol=bound)
    assert np.abs(expected[::-1] - expected).max() > 20 * bound
    assert list(got.parts) == ["clip"]
    assert torch.equal(got.parts["clip"], got.total)
    same = load_reward(config("clip", folder=folder), "cpu")(images, PROMPTS, GROUP)
    assert torch.equal(same.total, got.total)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache(hub: Path, repository: str) -> Path:
    """The folder of a repository's files in the local cache, as huggingface_hub lays it out."""
    place, commit = hub / f"models--{repository.replace('/', '--')}", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    return place / "snapshots" / commit


def test_hpsv2_is_the_cosine_under_its_checkpoint(hub, images, monkeypatch):
    small = tiny_config(49408)  # the size of open_clip's own vocabulary
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", small)
    model = tiny_model(small)
    torch.save({"state_dict": model.state_dict()}, cache(hub, HPSV2_REPOSITORY) / HPSV2_FILE)
    got = load_reward(config("hpsv2"), "cpu")(images, PROMPTS, GROUP).total

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        z = F.normalize(model.double().encode_image(((images - mean) / std).double()), dim=-1)
        text = F.normalize(model.encode_text(open_clip.get_tokenizer("ViT-H-14")([p.text for p in PROMPTS])), dim=-1)
    expected = torch.einsum("pge,pe->pg", z.view(P, GROUP, -1), text)
    bound = 2 * DEPARTURE + EMBED * U
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)
    assert (expected.flip(0) - expected).abs().max() > 20 * bound
    # The encoder of that name is the same.
    assert torch.equal(load_reward(config("clip", encoder="hpsv2"), "cpu")(images, PROMPTS, GROUP).total, got)


@pytest.mark.parametrize(("term", "field"), [("hpsv2", "reward.terms"), ("clip", "reward.encoder")])
def test_hpsv2_out_of_reach(hub, term, field):
    with pytest.raises(
        ConfigError, match=rf"^{field}: 'hpsv2' needs {HPSV2_FILE}.*https://huggingface\.co/.*ViT-H-14:"
    ) as raised:
        load_reward(config(term, encoder="hpsv2"), "cpu")
    assert "\n" not in str(raised.value)


def test_jpeg_terms_are_the_size_of_the_file(tmp_path):
    flat = torch.full((1, 3, 48, 40), 0.5)
    images = torch.cat([pictures(5, 48, 40), flat])
    prompts = PROMPTS[:2]
    sizes = []
    for index, image in enumerate(images):
        Image.frombytes("RGB", (40, 48), as_pil(image).tobytes()).save(tmp_path / f"{index}.jpg", quality=95)
        sizes.append(os.path.getsize(tmp_path / f"{index}.jpg") / 1000)
    expected = torch.tensor(sizes, dtype=torch.float32).view(2, 3)
    assert torch.equal(load_reward(config("incompressibility"), "cpu")(images, prompts, 3).total, expected)
    reward = load_reward(config("compressibility"), "cpu")
    assert torch.equal(reward(images, prompts, 3).total, -expected)
    assert torch.equal(reward(images, prompts, 3).total, -expected)
    assert -expected[1, 2] > -expected.flatten()[:5].min()  # a flat image is worth more than any with noise
    # Nothing outside [0, 1] may wrap around.
    assert torch.equal(reward(flat * 9, prompts[:1], 1).total, reward(torch.ones_like(flat), prompts[:1], 1).total)


def test_encoder_that_does_not_load_is_named_by_its_field():
    with pytest.raises(ConfigError, match=r"^reward\.clip_encoder: 'vit-h14'"):
        load_reward(config("clip", clip_encoder="vit-h14:HPS.pt"), "cpu")
    with pytest.raises(ConfigError, match=r"^reward\.encoder: 'vit-h14'"):
        load_reward(config("clip", encoder="vit-h14:HPS.pt"), "cpu")


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"size": 48}, "preprocess_cfg makes images of 48 x 48 pixels, the encoder's tower takes 32 x 32"),
        ({"size": [32, 48]}, "images of 32 x 48 pixels"),
        ({"mean": [0.5]}, r"preprocess_cfg has mean = \[0\.5\]; accepted is three numbers, one per channel"),
        ({"mean": 0.5}, "mean = 0.5"),
        ({"mean": [0.5, 0.5, "0.5"]}, "mean = .*three numbers"),
        ({"std": [0.5, 0.5, 0.5, 0.5]}, r"std = \[0\.5, 0\.5, 0\.5, 0\.5\]; accepted is three numbers above 0"),
        ({"std": [0.5, 0.0, 0.5]}, r"std = \[0\.5, 0\.0, 0\.5\]"),
    ],
)
def test_encoder_and_preprocessing_mismatch(tmp_path, hub, preprocess, message):
    write_folder(tmp_path, preprocess)
    with pytest.raises(ConfigError, match=rf"^reward\.encoder: encoder and preprocessing mismatch: .*{message}"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")
    (cache(hub, "owner/name") / "open_clip_config.json").write_text((tmp_path / "open_clip_config.json").read_text())
    with pytest.raises(ConfigError, match=rf"mismatch: .*{message}"):
        load_encoder("hf-hub:owner/name", "cpu")


def test_matching_preprocessing_is_accepted(tmp_path):
    for size in (32, [32, 32]):
        write_folder(tmp_path, {"size": size})
        assert load_encoder(f"local-dir:{tmp_path}", "cpu").transform.size == 32
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    del config["preprocess_cfg"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    mean = load_encoder(f"local-dir:{tmp_path}", "cpu").transform.mean
    assert mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
