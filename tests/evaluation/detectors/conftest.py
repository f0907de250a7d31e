"""Pictures and models that several detectors' tests share."""

import json

import pytest
from safetensors.torch import save_file

from support.detectors import EMBED, PREPROCESS, SIZES, TEXT, VISION, clip_model, make_checker, noise, save_pipeline


@pytest.fixture(scope="module")
def pictures():
    return [noise(*SIZES[i % len(SIZES)], seed=i) for i in range(10)]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """`clip_model` as an open_clip folder."""
    folder = tmp_path_factory.mktemp("clip")
    model = clip_model()
    config = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def checker():
    return make_checker()


@pytest.fixture(scope="module")
def checker_folder(checker, tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"), checker)
