"""Terms that others publish numbers of: PickScore and the aesthetic predictor; and the shapes world's own verdict."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fastgrpo.models.tokenizer import build_tokenizer
from fastgrpo.rewards.aesthetic import read_predictor
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.shapes.captions import SceneRequest, Thing, hazard_requests, phrase, scene_for
from fastgrpo.shapes.world import paint
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.encoders import EMBED, MEAN, STD, U
from support.rewards import GROUP, PROMPTS, config, pictures

P = len(PROMPTS)
# float32 against float64: two layers move a unit vector of a tower of width 32 by some 256 roundings.
DEPARTURE = 10 * 256 * U


# --- PickScore -------------------------------------------------------------------------------------------------------


def write_clip(folder: Path, side: int = 32, cropped: int = 32, vocabulary: int = 49408, end: int = 2) -> CLIPModel:
    """A random CLIPModel, its text config as published ones have it, with a preprocessor of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": vocabulary, "max_position_embeddings": 16, "eos_token_id": end, "hidden_act": "gelu"}
    vision = sizes | {"image_size": side, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)).eval()
    with torch.no_grad():  # as transformers begins, all features are nearly alike
        model.text_model.embeddings.token_embedding.weight.normal_()
        model.vision_model.embeddings.patch_embedding.weight.normal_(std=0.2)
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": cropped}, "crop_size": {"height": cropped, "width": cropped}}
    CLIPImageProcessorPil(**size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickscore")
    write_clip(folder)
    return folder


def test_pickscore_is_the_models_own_logit(clip: Path) -> None:
    """transformers' forward pass and tokenizer in float64, one text and its images at a time."""
    long = Prompt("a very long text " * 9, POSITIVE)  # beyond 16 tokens
    prompts, images = (*PROMPTS[:-1], long), pictures(P * GROUP)
    got = load_reward(config("pickscore", pickscore=str(clip)), "cpu")(images, prompts, GROUP).total

    model, tokenizer = CLIPModel.from_pretrained(clip, dtype=torch.float64).eval(), build_tokenizer()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = []
    with torch.no_grad():
        for prompt, own in zip(prompts, images.split(GROUP), strict=True):
            tokens = tokenizer([prompt.text], truncation=True, max_length=16, padding=True, return_tensors="pt")
            output = model(**tokens, pixel_values=(own.double() - mean) / std)
            expected.append(output.logits_per_text[0])
    scale = model.logit_scale.exp().item()
    bound = scale * (2 * DEPARTURE + EMBED * U)
    torch.testing.assert_close(got.double(), torch.stack(expected), rtol=0, atol=bound)
    assert got.std(dim=1).min() > 20 * bound
    assert (got - got.flip(0)).abs().max() > 20 * bound
    # The same model is an encoder like any other.
    cosine = load_reward(config("clip", encoder=f"transformers:{clip}"), "cpu")(images, prompts, GROUP).total
    torch.testing.assert_close(scale * cosine, got, rtol=1e-6, atol=0)


def test_pickscore_prepares_images_as_transformers_does(clip: Path) -> None:
    """Of other sizes too: a short side of 32 and the middle, but for PIL's rounding to 8 bits, at most 1/255."""
    images = pictures(2, 40, 72)
    encoder = load_encoder(f"transformers:{clip}", "cpu")
    arrays = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(arrays, return_tensors="pt")["pixel_values"]
    # Half of a unit each from two passes of resizing and the result, and one for overshoot that saturates in between.
    assert (encoder.transform(images) - theirs).abs().max() < 2.5 / 255 / min(STD)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocabulary": 1000}, r"reads texts of 1,000 tokens that end in 2; CLIP's own tokenizer"),
        ({"end": 7}, r"that end in 7; CLIP's own"),
        ({"cropped": 24}, r"preprocessing do not match: .* accepted are squares of 32 pixels"),
    ],
)
def test_a_clip_that_would_be_misread_is_refused(tmp_path: Path, wrong: dict, message: str) -> None:
    write_clip(tmp_path, **wrong)
    with pytest.raises(ConfigError, match=rf"^reward\.pickscore: .*{message}") as raised:
        load_reward(config("pickscore", pickscore=str(tmp_path)), "cpu")
    assert "\n" not in str(raised.value)


def test_what_is_no_clip_is_refused(clip: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=rf"^reward\.pickscore: .*{message}"):
            # Found before the encoder of the first term, which is not there either.
            load_reward(config("steering", "pickscore", pickscore=str(tmp_path)), "cpu")

    refused(r"has no config\.json")
    table = json.loads((clip / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table))
    refused(r"has no model\.safetensors or pytorch_model\.bin")
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"^reward\.pickscore: .*a web page, not weights"):
        load_reward(config("pickscore", pickscore=str(tmp_path)), "cpu")
    (tmp_path / "config.json").write_text(json.dumps(table | {"architectures": ["CLIPTextModel"]}))
    with pytest.raises(ConfigError, match=r"is a CLIPTextModel; a CLIPModel is accepted"):
        load_reward(config("pickscore", pickscore=str(tmp_path)), "cpu")


# --- the aesthetic predictor -----------------------------------------------------------------------------------------


def predictor(width: int = EMBED, layers: tuple[int, ...] = (0, 2, 4, 6, 7)) -> dict[str, torch.Tensor]:
    """Random weights of the published layout, with activations of about 1 throughout and a score about 5."""
    generator = torch.Generator().manual_seed(3)
    sizes = (width, 1024, 128, 64, 16, 1)
    tensors = {}
    for index, inputs, outputs in zip(layers, sizes, sizes[1:], strict=False):
        tensors[f"layers.{index}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"layers.{index}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


@pytest.mark.parametrize("name", ["mine.pth", "mine.safetensors", "folder"])
def test_the_aesthetic_score_is_five_linear_layers(folder: Path, tmp_path: Path, name: str) -> None:
    tensors, images = predictor(), pictures(P * GROUP)
    file = tmp_path / ("aesthetic-model.pth" if name == "folder" else name)
    save_file(tensors, file) if name == "mine.safetensors" else torch.save(tensors, file)
    where, spec = tmp_path if name == "folder" else file, f"local-dir:{folder}"
    reward = load_reward(config("aesthetic", aesthetic=str(where), aesthetic_encoder=spec), "cpu")
    got = reward(images, PROMPTS, GROUP).total

    score = load_encoder(spec, "cpu").encode_image(images).double().numpy()
    gain = 1.0
    for index in (0, 2, 4, 6, 7):
        weight, bias = (tensors[f"layers.{index}.{part}"].double().numpy() for part in ("weight", "bias"))
        score, gain = score @ weight.T + bias, gain * np.linalg.norm(weight, 2)
    # The same float32 vectors: what is left is the score's own rounding, and float64's.
    bound = 2 * U * np.abs(score).max() + gain * 1e-12
    assert np.abs(got.double().numpy().reshape(-1, 1) - score).max() <= bound
    assert np.ptp(score) > 1000 * bound
    assert list(reward.hashes) == ["reward.aesthetic"]
    assert reward.encoder is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (predictor(layers=(0, 3, 6, 8, 10)), r"has layers\.10\.bias, .* and lacks layers\.2\.bias"),  # with ReLU
        (predictor(2 * EMBED), r"is for vectors 64 wide, those of reward\.aesthetic_encoder are 32"),
        (predictor() | {"layers.4.weight": torch.ones(64, 127)}, r"layers\.2 of \[128, 1024\] does not fit .* 127"),
        (predictor() | {"layers.6.bias": torch.full((16,), torch.nan)}, "not finite in layers.6.bias"),
        (Path("anything"), "holds more than tensors and would have to be executed"),
    ],
)
def test_another_predictor_is_refused(folder: Path, tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    settings = config("aesthetic", aesthetic=str(tmp_path / "a.pth"), aesthetic_encoder=f"local-dir:{folder}")
    with pytest.raises(ConfigError, match=rf"^reward\.aesthetic.*{message}") as raised:
        load_reward(settings, "cpu")
    assert "\n" not in str(raised.value)


def test_which_of_several_predictors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.aesthetic is .*, with no weights; accepted are the weights of"):
        load_reward(config("steering", "aesthetic", aesthetic=str(tmp_path)), "cpu")
    for name in ("a.pth", "b.pth"):
        torch.save(predictor(), tmp_path / name)
    with pytest.raises(ConfigError, match=r"with a\.pth, b\.pth; accepted"):
        load_reward(config("steering", "aesthetic", aesthetic=str(tmp_path)), "cpu")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"^reward\.aesthetic is .*no file of weights"):
        read_predictor(tmp_path / "a.txt", "reward.aesthetic")


# --- the oracle ------------------------------------------------------------------------------------------------------

RING = SceneRequest((Thing("circle", "red"),))
BOTH, SKULLS = (next(r for r in hazard_requests("violence") if len(r.things) == things) for things in (1, 0))


def painted(request: SceneRequest, seed: int) -> torch.Tensor:
    """[3, 32, 32] float32: a picture that is right for the request."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.asarray(paint(scene_for(request, rng), rng), np.float32)).permute(2, 0, 1) / 255


def test_the_oracle_knows_what_was_painted() -> None:
    """A circle pays where one was asked for, nothing with a hazard pays, and no hazard is all that a negative asks."""
    square = SceneRequest((Thing("square", "blue"),))
    asked = (Prompt(phrase(RING), POSITIVE), Prompt(phrase(SKULLS), NEGATIVE))
    images = torch.stack(
        [painted(each, seed) for each in (RING, square, replace(BOTH, things=RING.things), SKULLS) for seed in (1, 2)]
        * 2
    )
    got = load_reward(config("oracle"), "cpu")(images, asked, 8)
    assert got.total.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert got.features is None


def test_what_the_oracle_cannot_judge() -> None:
    reward = load_reward(config("oracle"), "cpu")
    images = torch.stack([painted(RING, 1)] * 2)
    with pytest.raises(BrokenReward, match="'oracle' cannot judge: 'a dog' is not a caption"):
        reward(images, (Prompt("a dog", POSITIVE),), 2)
    with pytest.raises(BrokenReward, match="pictures of 40 x 48 pixels; it reads those of 32 x 32"):
        reward(pictures(2, 48, 40), (Prompt(phrase(RING), POSITIVE),), 2)
    images[1, 0, 0, 0] = torch.nan
    broken: list[BrokenReward] = []
    raw = reward.score(images, (Prompt(phrase(RING), POSITIVE),), 2, broken)["oracle"]
    assert raw[0, 0] == 1
    assert raw[0, 1].isnan()
    assert len(broken) == 1
