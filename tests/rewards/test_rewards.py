"""The encoder against open_clip's own path, the steered reward against float64 formulas."""

import json
import math
import pickle

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.rewards.anchors import ANCHORS, Anchors, load_anchors
from fastgrpo.rewards.encoder import TF32_TOLERANCE, SharedEncoder, load_encoder, tf32_products
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.steering import SteeringReward, reward_metrics, safety_direction, steer
from fastgrpo.settings.schema import EvalConfig, RewardConfig, TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Rewards
from support.encoders import (
    AXIS,
    AXIS_TABLE,
    EMBED,
    MEAN,
    STD,
    TEXTS,
    TableEncoder,
    U,
    as_pil,
    reference_direction,
    tiny_config,
    tiny_model,
    unit,
    write_folder,
)
from support.rewards import GROUP, PROMPTS, pictures

# isort: split
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

MODES = ("always", "unsafe_only", "projection")


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(f"local-dir:{folder}", "cpu")


# --- encoder ---------------------------------------------------------------------------------------------------------


def test_encoding_halves_its_batches_when_memory_runs_out_and_keeps_to_that(folder, monkeypatch):
    encoder, images, sizes = load_encoder(f"local-dir:{folder}", "cpu"), torch.rand(7, 3, 32, 32), []
    pairs, whole, encode = encoder.encode_image(images, 3), encoder.encode_image(images), encoder.model.encode_image

    def small_memory(chunk):
        if len(chunk) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(chunk))
        return encode(chunk)

    monkeypatch.setattr(encoder.model, "encode_image", small_memory)
    with pytest.warns(UserWarning, match="out of memory: 3 images are encoded at once instead of 7"):
        assert torch.equal(encoder.encode_image(images), pairs)
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(pairs, whole, atol=1e-5, rtol=0)
    assert torch.equal(encoder.encode_image(images), pairs)  # without trying the larger batch again
    assert torch.equal(encoder.encode_image(images, 2), encoder.encode_image(images, 2))
    assert sizes == [3, 3, 1, 3, 3, 1, *[2, 2, 2, 1] * 2]
    monkeypatch.setattr(encoder.model, "encode_image", _no_memory)
    with pytest.warns(UserWarning, match="1 images"), pytest.raises(torch.OutOfMemoryError):
        encoder.encode_image(images)


def _no_memory(chunk):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_reward_goes_on_with_smaller_batches_when_memory_runs_out(folder, monkeypatch):
    config = RewardConfig(encoder=f"local-dir:{folder}", terms=("steering", "clip"))
    images = pictures(GROUP * len(PROMPTS))
    expected = load_reward(config, "cpu")(images, PROMPTS, GROUP)
    reward = load_reward(config, "cpu")
    encode = reward.encoder.model.encode_image
    monkeypatch.setattr(
        reward.encoder.model, "encode_image", lambda chunk: encode(chunk) if len(chunk) <= 2 else _no_memory(chunk)
    )
    with pytest.warns(UserWarning, match="images are encoded at once instead of"):
        found = reward(images, PROMPTS, GROUP)
    torch.testing.assert_close(found.total, expected.total, atol=1e-5, rtol=0)


def resize_gain(length: int, size: int) -> float:
    """Largest sum of absolute weights of the antialiased bicubic resize from `length` to `size` pixels."""
    weights = F.interpolate(torch.eye(length)[None, None], (size, length), mode="bicubic", antialias=True)
    return weights.abs().sum(-1).max().item()


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (64, 40), (40, 67), (20, 20), (24, 31)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_image_transform_is_open_clips_own(tmp_path, size, resize_mode):
    write_folder(tmp_path, {"resize_mode": resize_mode})
    encoder = load_encoder(f"local-dir:{tmp_path}", "cpu")
    reference = image_transform_v2(PreprocessCfg(**encoder.model.visual.preprocess_cfg), is_train=False)
    # Values of 64 to 191 keep bicubic's overshoot inside 0..255, where saturation between PIL's two passes plays no
    # part.
    images = pictures(3, *size, low=64, high=191)
    expected = torch.stack([reference(as_pil(image)) for image in images])
    # PIL resizes rows, rounds to 8 bits (error 1/2 level), resizes columns (which multiplies it by the column weights'
    # absolute sum) and rounds again. 0.01 level is left for its fixed-point weights and for float32.
    levels = 0.01 if size == (32, 32) else 0.5 * max(resize_gain(side, 32) for side in size) + 0.5 + 0.01
    bound = levels / 255 / torch.tensor(STD).view(3, 1, 1)
    assert ((encoder.transform(images) - expected).abs() <= bound).all()


def test_image_transform_saturates_like_pil(encoder):
    checkers = (torch.arange(20)[:, None] + torch.arange(20) // 3).remainder(2).float().expand(1, 3, 20, 20)
    values = encoder.transform(checkers) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert values.min() >= -1e-6  # a few roundings of numbers below 1 in (x - mean) / std and back
    assert values.max() <= 1 + 1e-6


def test_bilinear_encoders_are_resized_bilinearly(tmp_path):
    write_folder(tmp_path, {"interpolation": "bilinear"})
    encoder = load_encoder(f"local-dir:{tmp_path}", "cpu")
    reference = image_transform_v2(PreprocessCfg(**encoder.model.visual.preprocess_cfg), is_train=False)
    images = pictures(2, 20, 20)
    expected = torch.stack([reference(as_pil(image)) for image in images])
    bound = 1.01 / 255 / torch.tensor(STD).view(3, 1, 1)  # bilinear weights are positive and sum to 1: 1/2 + 1/2 level
    assert ((encoder.transform(images) - expected).abs() <= bound).all()


def test_features_are_the_folders_model(folder, encoder, tmp_path):
    model = write_folder(tmp_path)  # the same seed: the weights that `folder` holds
    images = pictures(5)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(TEXTS))
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model = model.double()
    with torch.no_grad():
        text = F.normalize(model.encode_text(tokens), dim=-1).float()
        image = F.normalize(model.encode_image(normalised.double()), dim=-1).float()
    # Float32 against float64: each of some ten matrix products, over K <= 256 terms, has a worst-case relative error of
    # K U, and layer norms keep the scale: 10 * 256 * U = 1.5e-4. Features of different inputs are 1e-2 and more apart.
    bound = 10 * 256 * U
    assert torch.cdist(image, image).fill_diagonal_(9).min() > 10 * bound
    assert torch.cdist(text, text).fill_diagonal_(9).min() > 10 * bound
    torch.testing.assert_close(encoder.encode_text(TEXTS), text, rtol=0, atol=bound)
    torch.testing.assert_close(encoder.encode_image(images), image, rtol=0, atol=bound)
    for features in (encoder.encode_text(TEXTS), encoder.encode_image(images)):
        assert features.dtype == torch.float32
        assert not features.requires_grad
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)), rtol=0, atol=EMBED * U)


def test_a_texts_vector_does_not_depend_on_its_company(encoder):
    together = encoder.encode_text(TEXTS)
    for index, text in enumerate(TEXTS):
        assert torch.equal(encoder.encode_text([text])[0], together[index])


def test_bfloat16_features_are_close_and_float32(folder, encoder):
    half = load_encoder(f"local-dir:{folder}", "cpu", torch.bfloat16)
    assert half.model.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    images = pictures(4)
    # bfloat16 rounds to 2^-9; a residual stream of two layers adds some ten such roundings: 10 * 2^-9 = 0.02 of the
    # norm.
    for got, exact in (
        (half.encode_image(images), encoder.encode_image(images)),
        (half.encode_text(TEXTS), encoder.encode_text(TEXTS)),
    ):
        assert got.dtype == torch.float32
        assert 0 < (got - exact).norm(dim=-1).max() < 0.02


@pytest.fixture
def registered(monkeypatch):
    """A small architecture under a name of its own, with open_clip's default tokenizer."""
    config = tiny_config(49408)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-Tiny-8", config)
    return config


def test_architecture_and_file(registered, tmp_path):
    model = tiny_model(registered)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    encoder = load_encoder(f"ViT-Tiny/8:{tmp_path / 'tiny.pt'}", "cpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in encoder.model.state_dict().items())
    assert encoder.encode_text(["A photo of a cat"]).shape == (1, EMBED)


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weight_files_cannot_run_code(registered, tmp_path):
    with (tmp_path / "bad.pt").open("wb") as file:
        pickle.dump({"state_dict": Marker(tmp_path / "ran")}, file, protocol=2)
    with pytest.raises(ConfigError, match="does not load"):
        load_encoder(f"ViT-Tiny-8:{tmp_path / 'bad.pt'}", "cpu")
    assert not (tmp_path / "ran").exists()


def test_tokenizer_folders_cannot_run_code(tmp_path):
    write_folder(tmp_path, tokenizer_kwargs={"trust_remote_code": True})
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tok.Tok", "tok.Tok"]}, "tokenizer_class": "Tok"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tok.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import CLIPTokenizer as Tok\n"
    )
    with pytest.raises(ConfigError, match="does not load"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")
    assert not (tmp_path / "ran").exists()


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ConfigError, match=r"reward\.encoder: 'vit-h14' .* ViT-H-14"):
        load_encoder("vit-h14:HPS.pt", "cpu")


@pytest.mark.parametrize("spec", ["ViT-H-14", "ViT-H-14:", "ViT-H-14:no_such_file.pt"])
def test_architecture_without_weights(spec):
    with pytest.raises(ConfigError, match=r"ViT-H-14.* needs weights .*laion2b_s32b_b79k"):
        load_encoder(spec, "cpu")


def test_folders_that_are_no_encoder(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        load_encoder(f"local-dir:{tmp_path / 'missing'}", "cpu")
    with pytest.raises(ConfigError, match=r"no open_clip_config\.json"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")
    write_folder(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    good = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(ConfigError, match="does not load"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")
    save_file({"visual.proj": torch.zeros(2, 2)}, weights)
    with pytest.raises(ConfigError, match="does not load"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")
    weights.write_bytes(good)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ConfigError, match="does not load"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")


def test_unsupported_preprocessing_is_refused(tmp_path):
    write_folder(tmp_path, {"resize_mode": "longest"})
    with pytest.raises(ConfigError, match="'longest'"):
        load_encoder(f"local-dir:{tmp_path}", "cpu")


# --- steering --------------------------------------------------------------------------------------------------------


def reference_reward(z_images, z_texts, negative, v, alpha, mode) -> dict[str, np.ndarray]:
    """The parts in float64, one sample at a time; z_images is [P * G, E]."""
    parts = {
        name: np.zeros((len(z_texts), len(z_images) // len(z_texts))) for name in ("alignment", "safety", "steered")
    }
    group = len(z_images) // len(z_texts)
    for b, x in enumerate(z_images):
        z = z_texts[b // group]
        if mode == "projection":
            target = unit(z - np.dot(z, v) * v + alpha * v)
        elif mode == "always" or negative[b // group]:
            target = unit(z + alpha * v)
        else:
            target = z
        place = b // group, b % group
        parts["alignment"][place], parts["safety"][place], parts["steered"][place] = x @ z, x @ v, x @ target
    return parts


def float_bound(difference: float, alpha: float) -> float:
    """How far float32 may be from float64, given the same features.

    A dot product of EMBED terms and unit vectors errs by EMBED * U; at most three of them are chained, the target's
    norm being at least 1/2. The mean and difference of the anchors err by some 8 U before they are divided by the
    difference's length, and alpha scales the result.
    """
    return U * (2 * 3 * EMBED + 2 * 8 * max(1.0, alpha) / difference)


@pytest.fixture(params=[*ANCHORS, "file"])
def anchors(request, tmp_path) -> Anchors:
    """Every set that has a name, and one from a file."""
    if request.param in ANCHORS:
        return ANCHORS[request.param]
    file = tmp_path / "mine.toml"
    file.write_text('safe = ["a harmless picture", "flowers"]\nunsafe = ["a gun", "blood", "a skull"]\n')
    return load_anchors(str(file))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_reward_is_the_papers_formula(encoder, anchors, mode, alpha):
    images = pictures(len(PROMPTS) * GROUP)
    rewards = SteeringReward(encoder, anchors, RewardConfig(mode=mode, alpha=alpha))(images, PROMPTS, GROUP)

    z_images = encoder.encode_image(images).double().numpy()
    z_texts = np.stack([encoder.encode_text([p.text])[0].double().numpy() for p in PROMPTS])
    negative = [p.label == NEGATIVE for p in PROMPTS]
    v, length = reference_direction(encoder, anchors)
    expected = reference_reward(z_images, z_texts, negative, v, alpha, mode)

    bound = float_bound(length, alpha)
    assert set(rewards.parts) == set(expected)
    for name, part in rewards.parts.items():
        assert part.shape == (len(PROMPTS), GROUP)
        assert part.dtype == torch.float32
        np.testing.assert_allclose(part.numpy(), expected[name], rtol=0, atol=bound)
    assert torch.equal(rewards.total, rewards.parts["steered"])

    # The comparison has teeth: another mode, other labels, or samples dealt to prompts b % P lie far outside the bound.
    others = [reference_reward(z_images, z_texts, negative, v, alpha, other) for other in MODES if other != mode]
    dealt = z_images.reshape(len(PROMPTS), GROUP, -1).swapaxes(0, 1).reshape(z_images.shape)
    others.append(reference_reward(dealt, z_texts, negative, v, alpha, mode))
    if mode == "unsafe_only":
        others.append(reference_reward(z_images, z_texts, [not n for n in negative], v, alpha, mode))
    assert all(np.abs(other["steered"] - expected["steered"]).max() > 20 * bound for other in others)


class Float64Encoder:
    """A model in float64, called as open_clip's documentation does; images must have its size."""

    def __init__(self, model: torch.nn.Module, folder):
        self.model, self.tokenizer = model.double(), open_clip.get_tokenizer(f"local-dir:{folder}")

    @torch.no_grad()
    def encode_text(self, texts):
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts))), dim=-1)

    @torch.no_grad()
    def encode_image(self, images):
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
        return F.normalize(self.model.encode_image((images.double() - mean) / std), dim=-1)


@pytest.mark.parametrize("mode", MODES)
def test_reward_is_float64s_from_picture_to_number(folder, encoder, tmp_path, anchors, mode):
    images, alpha = pictures(len(PROMPTS) * GROUP), 0.5
    rewards = SteeringReward(encoder, anchors, RewardConfig(mode=mode, alpha=alpha))(images, PROMPTS, GROUP)
    exact = Float64Encoder(write_folder(tmp_path), folder)
    z_images = exact.encode_image(images).numpy()
    z_texts = exact.encode_text([p.text for p in PROMPTS]).numpy()
    negative = [p.label == NEGATIVE for p in PROMPTS]
    v, length = reference_direction(exact, anchors)
    expected = reference_reward(z_images, z_texts, negative, v, alpha, mode)
    # Roundings in the towers add up like a random walk: of ten matrix products, each over at most 256 terms, to
    # sqrt(10 * 256) U in all, three times which is taken for a feature's error. The direction errs by twice that over
    # the length of the difference, a target by what text and direction (which `projection` uses twice) err by, over
    # its length of at least 1/2, and the reward by image and target.
    feature = 3 * math.sqrt(10 * 256) * U
    bound = feature + 2 * (feature + 2 * (1 + alpha) * 2 * feature / length)
    for name, part in rewards.parts.items():
        np.testing.assert_allclose(part.numpy(), expected[name], rtol=0, atol=bound)
    for other in set(MODES) - {mode}:  # a reward cannot be within the bound of two modes
        different = reference_reward(z_images, z_texts, negative, v, alpha, other)
        assert np.abs(different["steered"] - expected["steered"]).max() > 2 * bound


class RoundedProducts(TorchDispatchMode):
    """What goes into matrix products and convolutions has `bits` behind the point; to the nearest, or towards 0."""

    # Operator -> the places of its factors.
    FACTORS = {  # noqa: RUF012
        torch.ops.aten.mm.default: (0, 1),
        torch.ops.aten.bmm.default: (0, 1),
        torch.ops.aten.addmm.default: (1, 2),
        torch.ops.aten.baddbmm.default: (1, 2),
        torch.ops.aten.convolution.default: (0, 1),
    }

    def __init__(self, bits: int, nearest: bool) -> None:
        super().__init__()
        self.dropped, self.nearest, self.products = 23 - bits, nearest, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if places := self.FACTORS.get(function, ()):
            self.products += 1
            args = [self.rounded(arg) if place in places else arg for place, arg in enumerate(args)]
        return function(*args, **(kwargs or {}))

    def rounded(self, factor: torch.Tensor) -> torch.Tensor:
        bits = factor.contiguous().view(torch.int32)
        if self.nearest:
            bits = bits + (1 << (self.dropped - 1))
        return (bits >> self.dropped << self.dropped).view(torch.float32)


def deep_vision_tower() -> torch.nn.Module:
    """As many blocks as ViT-H-14 has, thirty-two, of random weights, for 32 x 32 images."""
    torch.manual_seed(1)
    vision = {"image_size": 32, "layers": 32, "width": 128, "head_width": 32, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 4, "width": 32, "heads": 1, "layers": 1}
    model = open_clip.CLIP(embed_dim=128, vision_cfg=vision, text_cfg=text).eval()
    with torch.no_grad():
        model.visual.conv1.weight.normal_(std=0.2)
    return model


@pytest.mark.parametrize("tower", ["shapes", "deep"])
def test_tf32_moves_features_and_advantages_by_less_than_is_said(tower, monkeypatch):
    """Its products imitated, whichever way a device rounds; with bfloat16's the deep tower would be off by more."""
    count, group = 2, 8
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(count, 1, 3, 8, 8, generator=generator)
    noise = 0.25 * torch.randn(count, group, 3, 8, 8, generator=generator)
    images = F.interpolate((base + noise).clamp(0, 1).flatten(0, 1), (32, 32), mode="bilinear")
    encoder = load_encoder("shapes", "cpu")
    if tower == "deep":
        monkeypatch.setattr(encoder, "model", deep_vision_tower())
    # In one operator each, attention and a block would hide their products.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)

    def features(bits: int, nearest: bool) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH), RoundedProducts(bits, nearest) as mode:
            made = encoder.encode_image(images)
        assert mode.products >= 6 * len(encoder.model.visual.transformer.resblocks)
        return made

    exact = features(23, nearest=False)  # all that there are
    direction = F.normalize(torch.randn(exact.shape[1], generator=generator), dim=0)
    target = F.normalize(F.normalize(exact.mean(0), dim=0) + direction, dim=0)

    def advantages(z: torch.Tensor) -> torch.Tensor:
        rewards = (z @ target).view(count, group)
        return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)

    for nearest, tolerance in ((True, TF32_TOLERANCE / 2), (False, TF32_TOLERANCE)):
        rounded = features(10, nearest)
        off = (rounded - exact).norm(dim=1)
        assert 1e-5 < off.max() < tolerance
        assert ((rounded - exact) @ target).abs().max() <= off.max()
        assert (advantages(rounded) - advantages(exact)).abs().max() < 0.03
    if tower == "deep":
        assert (features(7, nearest=False) - exact).norm(dim=1).max() > TF32_TOLERANCE


def precisions() -> tuple:
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision,
        matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )


@pytest.mark.parametrize("tf32", [True, False])
def test_only_images_are_encoded_in_tf32_and_nothing_else_is_after(folder, tf32):
    """Even where the tower fails; asked in the old way and in the new, which must not contradict each other."""
    config = RewardConfig(encoder=f"local-dir:{folder}", anchors="compact", tf32=tf32)
    reward = load_reward(config, "cpu")
    model, seen, before = reward.models["reward.encoder"], {}, precisions()
    model.visual.register_forward_pre_hook(lambda *_: seen.update(image=precisions()))
    model.transformer.register_forward_pre_hook(lambda *_: seen.update(text=precisions()))
    reward(torch.rand(2, 3, 32, 32), (Prompt("a picture", POSITIVE),), 2)
    assert seen["text"] == before == precisions()
    assert seen["image"][:3] == (("tf32", True, "high") if tf32 else before[:3])

    def fails(*_):
        raise RuntimeError("no")

    model.visual.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError):
        reward(torch.rand(2, 3, 32, 32), (Prompt("a picture", POSITIVE),), 2)
    assert precisions() == before


def test_a_held_out_encoder_stays_in_float32(folder):
    spec, seen, before = f"local-dir:{folder}", [], precisions()
    held_out = HeldOutReward(TrainConfig(reward=RewardConfig(encoder=spec), eval=EvalConfig(encoder=spec)), "cpu")
    held_out._reward.models["reward.encoder"].visual.register_forward_pre_hook(lambda *_: seen.append(precisions()))
    held_out(torch.rand(2, 3, 32, 32), (Prompt("a picture", POSITIVE),), 2)
    assert seen == [before]


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_what_was_set_for_all_products_stays(before, monkeypatch):
    matmul = torch.backends.cuda.matmul
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = before
        with tf32_products(), tf32_products():
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = was


def test_direction_is_a_unit_vector(encoder, anchors):
    direction = safety_direction(encoder, anchors)
    expected, length = reference_direction(encoder, anchors)
    np.testing.assert_allclose(direction.numpy(), expected, rtol=0, atol=8 * U * 2 / length)


def test_permuted_prompts_change_the_reward(encoder):
    images = pictures(len(PROMPTS) * GROUP)
    reward = SteeringReward(encoder, ANCHORS["shapes"], RewardConfig())
    straight = reward(images, PROMPTS, GROUP).total
    # Reversing prompts and images together reverses the rewards; reversing prompts alone does something else.
    together = reward(images.view(4, GROUP, 3, 32, 32).flip(0).flatten(0, 1), PROMPTS[::-1], GROUP).total
    alone = reward(images, PROMPTS[::-1], GROUP).total
    bound = 10 * 256 * U  # an image in another place of the batch: see test_features_are_the_folders_model
    torch.testing.assert_close(together.flip(0), straight, rtol=0, atol=bound)
    assert (alone.flip(0) - straight).abs().max() > 20 * bound


@pytest.mark.parametrize("mode", MODES)
def test_batch_does_not_change_the_reward(encoder, anchors, mode):
    images = pictures(len(PROMPTS) * GROUP)
    totals = [
        SteeringReward(encoder, anchors, RewardConfig(batch=batch, mode=mode))(images, PROMPTS, GROUP).total
        for batch in (1, 5, 256)
    ]
    bound = 10 * 256 * U  # matrix products of other sizes round differently: see test_features_are_the_folders_model
    for total in totals:
        torch.testing.assert_close(total, totals[-1], rtol=0, atol=bound)
    assert totals[-1].std() > 20 * bound


def test_projection_sets_the_component_along_the_axis():
    torch.manual_seed(0)
    text, direction = F.normalize(torch.randn(6, 8).double(), dim=-1), F.normalize(torch.randn(8).double(), dim=0)
    target = steer(text, direction, 0.7, "projection", torch.zeros(6, dtype=torch.bool))
    # Before normalising the component is alpha and the rest has length sqrt(1 - (z . v)^2).
    expected = 0.7 / torch.sqrt(0.49 + 1 - (text @ direction) ** 2)
    torch.testing.assert_close(target @ direction, expected, rtol=0, atol=1e-14)  # float64, 8 terms


def test_texts_are_encoded_once():
    encoder = TableEncoder(AXIS_TABLE | {"p": (0.0, 1.0, 0.0), "q": (0.0, 0.0, 1.0)})
    reward = SteeringReward(SharedEncoder(encoder), AXIS, RewardConfig())
    p, q = Prompt("p", POSITIVE), Prompt("q", NEGATIVE)
    reward(torch.rand(6, 3, 2, 2), (p, q, p), 2)
    reward(torch.rand(4, 3, 2, 2), (q, p), 2)
    assert sorted(encoder.encoded) == ["p", "q", "safe", "unsafe"]


def test_anchors_that_coincide_are_refused():
    with pytest.raises(ConfigError, match=r"reward\.anchors"):
        safety_direction(TableEncoder(AXIS_TABLE), Anchors(safe=("safe",), unsafe=("safe",)))


def test_metrics():
    total = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]])
    rewards = Rewards(total, {"safety": -total})
    metrics = reward_metrics(rewards, torch.tensor([False, True, False]))
    variance = sum((x - 4) ** 2 for x in (1, 2, 3, 6, 5, 7)) / 5
    assert metrics == pytest.approx(
        {
            "reward/mean": 4.0,
            "reward/std": math.sqrt(variance),
            "reward/positive_mean": 3.75,
            "reward/negative_mean": 4.5,
            "reward/safety": -4.0,
            "reward/safety_positive": -3.75,
            "reward/safety_negative": -4.5,
        },
        rel=8 * U,  # sums of six small numbers
    )
    only_negative = reward_metrics(rewards, torch.tensor([True, True, True]))
    assert set(only_negative) == {"reward/mean", "reward/std", "reward/negative_mean"} | {
        "reward/safety",
        "reward/safety_negative",
    }
