"""Reward terms: how they are named, the built-in ones, functions of the user's own, their sums, and how they break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards import encoder as encoders
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.rewards.encoder import Encoders, OpenClipEncoder, load_encoder
from fastgrpo.rewards.encoder_files import HPSV2_FILE, HPSV2_REPOSITORY
from fastgrpo.rewards.registry import BUILDERS, load_reward
from fastgrpo.rewards.reward import WeightedReward, standardised
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import BUILT_IN, BrokenReward, Term, parse_terms
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, Prompt
from support import ROOT
from support.encoders import EMBED, MEAN, STD, U, as_pil, tiny_config, tiny_model, write_folder
from support.rewards import GROUP, PROMPTS, config, pictures, write_plugin

# isort: split
import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

CPU = torch.device("cpu")
P = len(PROMPTS)
DEPARTURE = 10 * 256 * U  # float32 features against float64 ones: see test_features_are_the_folders_model


@pytest.fixture
def images():
    return pictures(P * GROUP)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_and_weights(tmp_path):
    file = write_plugin(tmp_path, "raise SystemExit('naming a file does not run it')")
    odd = tmp_path / "alpha=3"
    odd.mkdir()
    write_plugin(odd, "")
    terms = parse_terms(
        (
            *("steering", "clip=0.5", "compressibility = -2e-3", f"{file}:one=3", "json:dumps", f"{odd}/mine.py:two"),
            *("safety:safety-checker = 0.5", "oracle"),
        )
    )
    assert [(t.name, t.weight) for t in terms] == [
        ("steering", 1.0),
        ("clip", 0.5),
        ("compressibility", -0.002),
        (f"{file}:one", 3.0),
        ("json:dumps", 1.0),
        (f"{odd}/mine.py:two", 1.0),
        ("safety:safety-checker", 0.5),
        ("oracle", 1.0),
    ]
    assert [t.label for t in terms[:6]] == ["steering", "clip", "compressibility", "one", "dumps", "two"]
    assert [t.label for t in terms[6:]] == ["safety_checker", "oracle"]
    assert [t.place for t in terms] == ["", "", "", str(file), "json", f"{odd}/mine.py", "", ""]
    assert [t.has_encoder for t in terms] == [True, True, *[False] * 6]
    assert [t.has_encoder for t in parse_terms(("pickscore", "aesthetic", "safety:q16", "safety:nudenet"))] == [
        *(True, True, True, False)
    ]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((), r"at least one is needed; accepted are steering, clip"),
        (("steerng",), r"'steerng' is no term \(did you mean steering\?\); accepted are steering, clip"),
        (("",), r"'' is no term"),
        (("mine.py",), r"'mine.py' is no term.* FILE\.py:FUNCTION"),
        (("clip=",), r"'clip=' has the weight ''; accepted is a finite number other than 0"),
        (("clip=0",), r"'clip=0' has the weight '0'"),
        (("clip=-0.0",), "'clip=-0.0'"),
        (("clip=nan",), "'clip=nan'"),
        (("clip=inf",), "'clip=inf'"),
        (("clip=1e999",), "'clip=1e999'"),
        (("clip=much",), "'clip=much' has the weight 'much'"),
        (("clip=1=2",), "'clip=1=2' has the weight '1=2'"),
        (("clip", "steering", "clip=2"), "'clip' and 'clip' are both called clip"),
        (("json:dumps", "pickle:dumps"), "'json:dumps' and 'pickle:dumps' are both called dumps"),
        (("no/such/file.py:good",), "'no/such/file.py:good' needs the file 'no/such/file.py', which is not there"),
        (("no_such_module.sub:good",), "needs the module 'no_such_module.sub', which is not installed"),
        (("some/folder:good",), "'some/folder' before the colon; accepted are FILE.py and MODULE"),
        ((":good",), "'' before the colon"),
        (("json:",), "'json:' names no function after the colon"),
        (("json:a-b=2",), "'json:a-b' names no function"),
        (("json:clip",), "'json:clip' cannot be called 'clip'"),
        (("json:std",), "'json:std' cannot be called 'std'"),
        (("json:safety",), "'json:safety' cannot be called 'safety'"),
        (("safety",), "'safety' names no detector; accepted are safety:q16, safety:nudenet"),
        (("safety:q61=2",), r"'safety:q61' names no detector 'q61' \(did you mean q16\?\); accepted are safety:q16"),
        (("safety:q16", "safety:q16=2"), "'safety:q16' and 'safety:q16' are both called q16"),
        (("imagereward",), "'imagereward' cannot be had here: no maintained package has its code"),
    ],
)
def test_what_is_no_term(terms, message):
    with pytest.raises(ConfigError, match=rf"^reward\.terms.*{message}") as raised:
        parse_terms(terms)
    assert "\n" not in str(raised.value)


def test_naming_terms_imports_no_encoder():
    code = "import sys, fastgrpo.rewards.terms; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- registry --------------------------------------------------------------------------------------------------------


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


# --- built-in terms --------------------------------------------------------------------------------------------------


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


# --- functions of the user's own -------------------------------------------------------------------------------------

MINE = """
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def length(images, prompts):
    return torch.tensor([len(p.text) + (0.5 if p.label == "negative" else 0.0) for p in prompts])

def first_pixel(images, prompts):
    return images[:, 0, 0, 0]

WEIGHT = 3
"""


def test_function_from_a_file(tmp_path, images):
    file = write_plugin(tmp_path, MINE)
    got = load_reward(config(f"{file}:brightness=2", f"{file}:length", f"{file}:first_pixel"), "cpu").score(
        images, PROMPTS, GROUP
    )
    assert list(got) == ["brightness", "length", "first_pixel"]
    pixels = images.double().numpy().reshape(P, GROUP, -1)
    # A mean of 3 * 32 * 32 float32 values below 1, summed one after the other at worst.
    np.testing.assert_allclose(got["brightness"].numpy(), pixels.mean(-1), rtol=0, atol=3 * 32 * 32 * U)
    lengths = [len(p.text) + 0.5 * (p.label == NEGATIVE) for p in PROMPTS]
    assert got["length"].tolist() == [[x] * GROUP for x in lengths]
    assert np.array_equal(got["first_pixel"].numpy(), pixels[..., 0].astype(np.float32))


def test_function_from_a_module(tmp_path, images, monkeypatch):
    (tmp_path / "rewards_of_mine").mkdir()
    write_plugin(tmp_path / "rewards_of_mine", "", "__init__.py")
    write_plugin(tmp_path / "rewards_of_mine", MINE, "plain.py")
    monkeypatch.syspath_prepend(tmp_path)
    got = load_reward(config("rewards_of_mine.plain:first_pixel"), "cpu")(images, PROMPTS, GROUP)
    assert torch.equal(got.total, images[:, 0, 0, 0].view(P, GROUP))


def test_file_is_run_once_and_under_a_name_of_its_own(tmp_path, images):
    text = "from pathlib import Path\nwith open(Path(__file__).parent / 'runs', 'a') as f:\n    f.write('x')\n"
    file = write_plugin(tmp_path, text + MINE, "torch.py")
    load_reward(config(f"{file}:brightness", f"{file}:length"), "cpu")(images, PROMPTS, GROUP)
    assert (tmp_path / "runs").read_text() == "x"
    assert sys.modules["torch"] is torch


def test_function_cannot_change_the_images(tmp_path, images):
    text = "def dark(images, prompts):\n    return images.mul_(0).sum((1, 2, 3))\n"
    before = images.clone()
    raw = load_reward(config(f"{write_plugin(tmp_path, text)}:dark", "incompressibility"), "cpu").score(
        images, PROMPTS, GROUP
    )
    assert not raw["dark"].any()
    assert torch.equal(images, before)
    alone = load_reward(config("incompressibility"), "cpu").score(before, PROMPTS, GROUP)
    assert torch.equal(raw["incompressibility"], alone["incompressibility"])


def test_function_may_compute_with_gradients_and_in_other_types(tmp_path, images):
    text = (
        "import torch\n"
        "def learned(images, prompts):\n"
        "    with torch.enable_grad():\n"
        "        w = torch.ones(1, dtype=torch.float64, requires_grad=True)\n"
        "        return w * images[:, 0, 0, 0]\n"
        "def bright(images, prompts):\n"
        "    return images[:, 0, 0, 0] > 0.5\n"
    )
    file = write_plugin(tmp_path, text)
    raw = load_reward(config(f"{file}:learned", f"{file}:bright"), "cpu").score(images, PROMPTS, GROUP)
    assert torch.equal(raw["learned"], images[:, 0, 0, 0].view(P, GROUP))
    assert not raw["learned"].requires_grad
    assert torch.equal(raw["bright"], (images[:, 0, 0, 0] > 0.5).float().view(P, GROUP))


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (
            MINE,
            "brightnes",
            r"has no function 'brightnes' \(did you mean brightness\?\); it has brightness, length, first_pixel",
        ),
        ("", "good", "has no function 'good'; it has none"),
        (MINE, "WEIGHT", r"'.*:WEIGHT' is of type int; accepted is a function \(images, prompts\)"),
        ("def good(images): pass", "good", r"cannot be called with \(images, prompts\): too many positional arguments"),
        ("def good(images, prompts, scale): pass", "good", "missing a required argument: 'scale'"),
        ("def good(:", "good", "does not import: SyntaxError: "),
        ("import no_such_package", "good", "does not import: ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", "good", "does not import: ZeroDivisionError: division by zero"),
        ("raise SystemExit", "good", "does not import: SystemExit"),
    ],
)
def test_functions_that_cannot_be_used(tmp_path, text, function, message):
    file = write_plugin(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"^reward\.terms: .*{message}") as raised:
        load_reward(config(f"{file}:{function}", "steering"), "cpu")  # found out before the encoder is loaded
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_file_that_fails_leaves_no_module(tmp_path):
    with pytest.raises(ConfigError):
        load_reward(config(f"{write_plugin(tmp_path, '1 / 0', 'half.py')}:good"), "cpu")
    assert "fastgrpo_plugin_half" not in sys.modules


def test_module_without_such_a_submodule():
    with pytest.raises(ConfigError, match=r"^reward\.terms: 'json\.nothing' does not import: ModuleNotFoundError"):
        load_reward(config("json.nothing:good"), "cpu")


# --- sums ------------------------------------------------------------------------------------------------------------


def reference_standardised(values: np.ndarray, over: str) -> np.ndarray:
    """In float64, one value at a time."""
    result = np.zeros(values.shape)
    for (p, g), value in np.ndenumerate(values):
        others = values if over == "iteration" else values[p]
        std = np.std(others, ddof=1)
        result[p, g] = value if over == "none" else (value - np.mean(others)) / std
    return result


@pytest.mark.parametrize("over", ["none", "group", "iteration"])
def test_weighted_sum(over):
    generator = torch.Generator().manual_seed(3)
    scales = {"first": 1e-2, "second": 300.0, "third": 1.0}
    raw = {name: scale * (torch.randn(5, 4, generator=generator) + 3) for name, scale in scales.items()}
    weights = {"first": 1.0, "second": -0.25, "third": 7.5}
    reward = WeightedReward([Term(f"mine.py:{n}", w) for n, w in weights.items()], {}, over, Encoders(CPU))
    rewards = reward.combine(raw)
    parts = {name: weights[name] * reference_standardised(raw[name].double().numpy(), over) for name in raw}
    # Both sides compute in float64 (at 20 values and a std of a third of the mean, some 100 * 2^-53 of each summand);
    # what remains is the total's rounding to float32.
    bound = U * np.abs(sum(parts.values())) + 100 * 2.0**-53 * sum(np.abs(part) for part in parts.values())
    assert rewards.total.dtype == torch.float32
    assert (np.abs(rewards.total.double().numpy() - sum(parts.values())) <= bound).all()
    assert rewards.parts == raw  # the very tensors: raw, whatever is done to the total


def test_flat_groups_are_zero():
    third = torch.tensor(1 / 3)
    ulp = torch.nextafter(third, torch.tensor(1.0))
    values = torch.stack(
        [third.expand(3), torch.stack([third, ulp, third]), torch.zeros(3), torch.tensor([0.0, 1.0, 2.0])]
    )
    assert standardised(values, "group").tolist() == [[0.0] * 3, [0.0] * 3, [0.0] * 3, [-1.0, 0.0, 1.0]]
    assert standardised(values[:2], "iteration").eq(0).all()
    # Differences of a thousandth are not rounding.
    assert standardised(torch.tensor([[1.0, 1.001, 1.002]]), "group")[0].numpy() == pytest.approx([-1, 0, 1], abs=1e-3)


def test_terms_are_scored_added_and_shown(folder, images, tmp_path):
    file = write_plugin(tmp_path, MINE)
    reward = load_reward(
        config("steering=0.5", f"{file}:brightness=-3", "clip", folder=folder, standardise="group"), "cpu"
    )
    raw = reward.score(images, PROMPTS, GROUP)
    rewards = reward(images, PROMPTS, GROUP)
    assert list(rewards.parts) == ["alignment", "safety", "steered", "steering", "brightness", "clip"]
    assert all(torch.equal(part, raw[name]) for name, part in rewards.parts.items())
    assert torch.equal(raw["steering"], raw["steered"])
    torch.testing.assert_close(raw["clip"], raw["alignment"], rtol=0, atol=2 * EMBED * U)  # two ways to a dot product
    assert torch.equal(raw["brightness"], images.mean(dim=(1, 2, 3)).view(P, GROUP))
    summands = [
        w * reference_standardised(raw[n].double().numpy(), "group")
        for n, w in (("steering", 0.5), ("brightness", -3), ("clip", 1))
    ]
    # As in test_weighted_sum, but cosines whose std is a hundredth of their mean lose two digits more.
    np.testing.assert_allclose(rewards.total.numpy(), sum(summands), rtol=2 * U, atol=1e-10)


def test_processes_score_apart_and_combine_together(images, tmp_path):
    file = write_plugin(tmp_path, MINE)
    reward = load_reward(config(f"{file}:first_pixel", "compressibility=0.1", standardise="iteration"), "cpu")
    whole = reward(images, PROMPTS, GROUP)
    halves = [
        reward.score(i, p, GROUP) for i, p in ((images[: 2 * GROUP], PROMPTS[:2]), (images[2 * GROUP :], PROMPTS[2:]))
    ]
    together = reward.combine({name: torch.cat([half[name] for half in halves]) for name in halves[0]})
    assert torch.equal(together.total, whole.total)
    apart = torch.cat([reward.combine(half).total for half in halves])
    assert (apart - whole.total).abs().max() > 0.01


# --- rewards that break ----------------------------------------------------------------------------------------------

BROKEN = """
import torch
from pathlib import Path

def nan_at_7(images, prompts):
    return torch.zeros(len(images)).index_fill_(0, torch.tensor([7, 9]), torch.nan)

def infinite_at_7(images, prompts):
    return torch.zeros(len(images)).index_fill_(0, torch.tensor([7]), -torch.inf)

def too_large_at_7(images, prompts):
    return torch.zeros(len(images), dtype=torch.float64).index_fill_(0, torch.tensor([7]), 1e300)

def column(images, prompts):
    return torch.zeros(len(images), 1)

def scalar(images, prompts):
    return images.mean()

def one_less(images, prompts):
    return torch.zeros(len(images) - 1)

def numbers(images, prompts):
    return ["0.0"] * len(images)

def nothing(images, prompts):
    pass

def failing(images, prompts):
    raise KeyError("no such\\nthing")
"""


def broken(tmp_path, function, images) -> BrokenReward:
    reward = load_reward(config(f"{write_plugin(tmp_path, BROKEN)}:{function}"), "cpu")
    with pytest.raises(BrokenReward) as raised:
        reward(images, PROMPTS, GROUP)
    assert f"reward term '{tmp_path}/mine.py:{function}'" in raised.value.message
    assert str(raised.value) == raised.value.message
    assert "\n" not in raised.value.message
    return raised.value


@pytest.mark.parametrize(
    ("function", "value", "count"), [("nan_at_7", "nan", 2), ("infinite_at_7", "-inf", 1), ("too_large_at_7", "inf", 1)]
)
def test_values_that_are_not_finite(tmp_path, images, function, value, count):
    error = broken(tmp_path, function, images)
    assert error.prompt is PROMPTS[2]  # image 7 of groups of three
    assert torch.equal(error.image, images[7])
    assert f"returned {value} for an image of prompt 'two blue circles'" in error.message
    assert f"for {count} of 12 images" in error.message


@pytest.mark.parametrize(
    ("function", "returned"),
    [
        ("column", r"shape [12, 1]"),
        ("scalar", "shape []"),
        ("one_less", "shape [11]"),
        ("numbers", "a list"),
        ("nothing", "a NoneType"),
    ],
)
def test_what_is_no_tensor_of_rewards(tmp_path, images, function, returned):
    error = broken(tmp_path, function, images)
    assert f"returned {returned} for 12 images" in error.message
    assert "'a red square'" in error.message
    assert "a tensor of shape [12] is needed" in error.message
    assert error.prompt is PROMPTS[0]
    assert torch.equal(error.image, images[0])


def test_functions_that_raise(tmp_path, images):
    error = broken(tmp_path, "failing", images)
    assert "KeyError: 'no such" in error.message
    assert isinstance(error.__cause__, KeyError)
    assert error.prompt is PROMPTS[0]
    assert torch.equal(error.image, images[0])


@pytest.mark.parametrize("term", ["steering", "clip", "compressibility", "incompressibility"])
def test_broken_images_break_the_built_in_terms(folder, images, term):
    images[4, 1, 5, 5] = torch.nan
    with pytest.raises(BrokenReward, match=rf"reward term '{term}' returned nan .*'a skull and a gun'") as raised:
        load_reward(config(term, folder=folder), "cpu")(images, PROMPTS, GROUP)
    assert raised.value.prompt == Prompt("a skull and a gun", NEGATIVE)
    assert raised.value.image.isnan().sum() == 1


def test_encoder_that_does_not_load_is_named_by_its_field():
    with pytest.raises(ConfigError, match=r"^reward\.clip_encoder: 'vit-h14'"):
        load_reward(config("clip", clip_encoder="vit-h14:HPS.pt"), "cpu")
    with pytest.raises(ConfigError, match=r"^reward\.encoder: 'vit-h14'"):
        load_reward(config("clip", encoder="vit-h14:HPS.pt"), "cpu")


# --- encoders whose preprocessing is not their tower's ---------------------------------------------------------------


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
