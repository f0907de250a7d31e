"""Weights of encoders, detectors and checkpoints: of the right size, activation and kind, and finite, or refused."""

import json
import shutil
from pathlib import Path

import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.encoder_files import wants_quick_gelu
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import load_unet, read_adapters
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError

# isort: split
import open_clip
import torch
from open_clip.factory import _MODEL_CONFIGS, _rescan_model_configs
from safetensors.torch import load_file, save_file

from support.checkpoints import Training
from support.encoders import tiny_config, tiny_model, write_folder
from support.models import NOT_WEIGHTS

VOCABULARY = 49408  # of open_clip's own tokenizer


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    """Registers tiny, tiny-quickgelu, tiny-64 (images of 64 pixels) and tiny-long (texts of 20 tokens).

    Returns the config of each name.
    """
    folder = tmp_path_factory.mktemp("architectures")
    plain = tiny_config(VOCABULARY)
    configs = {
        "tiny": plain,
        "tiny-quickgelu": plain | {"quick_gelu": True},
        "tiny-64": plain | {"vision_cfg": plain["vision_cfg"] | {"image_size": 64}},
        "tiny-long": plain | {"text_cfg": plain["text_cfg"] | {"context_length": 20}},
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield configs
    open_clip.factory._MODEL_CONFIG_PATHS.remove(Path(folder))
    for name in configs:
        del _MODEL_CONFIGS[name]
    _rescan_model_configs()


@pytest.fixture(scope="module")
def weights(architectures, tmp_path_factory):
    """Of `tiny`, under a name that tells nothing."""
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(tiny_model(architectures["tiny"]).state_dict(), file)
    return file


def refused(spec):
    with pytest.raises(ConfigError) as caught:
        load_encoder(spec, "cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_positions_of_another_size_are_not_interpolated(weights, tmp_path):
    with pytest.warns(UserWarning, match="QuickGELU"):
        assert load_encoder(f"tiny:{weights}", "cpu").transform.size == 32
    message = refused(f"tiny-64:{weights}")
    assert "weights for images of another size: visual.positional_embedding is [17, 64], and [65, 64]" in message
    message = refused(f"tiny-long:{weights}")
    assert "weights for texts of another length: positional_embedding is [16, 32], and [20, 32]" in message
    # As trainers save them, in a torch file.
    state = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "epoch_1.pt")
    assert "images of another size" in refused(f"tiny-64:{tmp_path / 'epoch_1.pt'}")
    # In a folder whose config has another size than its weights.
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "images of another size" in refused(f"local-dir:{folder}")


def test_a_file_that_is_known_to_want_the_other_activation_is_refused(weights, tmp_path, recwarn):
    quick = shutil.copy(weights, tmp_path / "vit_b_32-quickgelu-laion400m_e32-46683a32.safetensors")
    assert f"has weights for QuickGELU, which tiny does not compute; tiny-quickgelu:{quick}" in refused(f"tiny:{quick}")
    load_encoder(f"tiny-quickgelu:{quick}", "cpu")
    plain = tmp_path / "vit_b_32-laion2b_e16-af8dbd0c.pth"  # as open_clip publishes one with GELU
    torch.save(load_file(weights), plain)
    assert f"has weights for GELU, which tiny-quickgelu does not compute; tiny:{plain}" in refused(
        f"tiny-quickgelu:{plain}"
    )
    load_encoder(f"tiny:{plain}", "cpu")
    # A config beside the file tells it too, open_clip's or transformers'.
    beside = shutil.copy(weights, tmp_path / "open_clip_model.safetensors")
    for name, content in (
        ("config.json", {"text_config": {"hidden_act": "quick_gelu"}}),
        ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert "has weights for QuickGELU" in refused(f"tiny:{beside}")
        load_encoder(f"tiny-quickgelu:{beside}", "cpu")
        (tmp_path / name).unlink()
    assert not [warning for warning in recwarn if "QuickGELU" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "wants"),
    [
        ("ViT-B-32.pt", True),  # OpenAI's own
        ("b32_400m.pt", True),  # MetaCLIP's
        ("rn50-quickgelu-cc12m-f000538c.pt", True),
        ("vit_l_14-laion400m_e32-3d133497.pt", False),
        ("HPS_v2.1_compressed.pt", False),
        ("epoch_12.pt", None),
    ],
)
def test_published_files_are_known_by_their_names(name, wants, tmp_path):
    assert wants_quick_gelu(tmp_path / name) is wants


def test_files_that_are_no_weights_are_named_for_what_they_are(architectures, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(folder)
    for content, what in NOT_WEIGHTS.items():
        for name in ("weights.safetensors", "weights.pt"):
            (tmp_path / name).write_bytes(content)
            assert what in refused(f"tiny:{tmp_path / name}")
        (folder / "open_clip_model.safetensors").write_bytes(content)
        assert what in refused(f"local-dir:{folder}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_encoders_that_are_not_finite_are_refused(value, tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    state = load_file(file)
    state["visual.proj"][3, 5] = value
    save_file(state, file)
    assert "has numbers that are not finite in visual.proj (float32)" in refused(f"local-dir:{tmp_path}")


def test_encoders_that_a_precision_cannot_hold_are_refused(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    state = load_file(file)
    state["visual.proj"][3, 5] = 70000.0  # float16 ends at 65,504
    save_file(state, file)
    load_encoder(f"local-dir:{tmp_path}", "cpu", torch.bfloat16)
    with pytest.raises(ConfigError, match=r"not finite in visual\.proj \(float16\)"):
        load_encoder(f"local-dir:{tmp_path}", "cpu", torch.float16)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_checkpoints_that_are_not_finite_are_refused(lora_rank, tiny_pipeline, tmp_path):
    """Whether training goes on from them, or another command draws with them or exports them."""
    training = Training(tiny_pipeline, lora_rank)
    with torch.no_grad():
        first = next(parameter for parameter in training.unet.parameters() if parameter.requires_grad)
        first[(0,) * first.ndim] = torch.nan
    folder = training.save(tmp_path, 1)
    with pytest.raises(ConfigError, match="numbers that are not finite in"):
        checkpoint.load(folder, Training(tiny_pipeline, lora_rank).trainable)
    model = ModelConfig(path=str(tiny_pipeline), lora_rank=lora_rank)
    unet = Training(tiny_pipeline).unet
    with pytest.raises(ConfigError, match="numbers that are not finite in"):
        load_unet(unet, folder, "trained", model)
    if lora_rank:
        with pytest.raises(ConfigError, match="numbers that are not finite in"):
            read_adapters(folder, "trained", model)
