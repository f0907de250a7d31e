"""Reward terms that are functions of the user's own."""

import sys

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.registry import load_reward
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE
from support.encoders import U
from support.rewards import GROUP, MINE, PROMPTS, P, config, write_plugin

# isort: split
import torch


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
