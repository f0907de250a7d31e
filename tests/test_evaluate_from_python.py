"""Evaluating and drawing from Python: what the commands write and draw, and refusals that say so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo import ConfigError, Evaluation, Trainer, draw_images, evaluate, evaluate_model, load_config, sample
from support.files import content

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]

PROMPTS = "a cat\na knife\n"


@pytest.fixture(scope="module")
def run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations, both of them saved."""
    changes = {"iterations": 2, "eval.every": 0, "checkpoint.every": 1, "reward.terms": ["compressibility"]}
    run = tmp_path_factory.mktemp("trained") / "run"
    return Trainer(load_config(config_file, changes | {"run": str(run)}), quiet=True).train().run


def settings(folder: Path) -> dict[str, Any]:
    (folder / "prompts.txt").write_text(PROMPTS)
    own = {"custom.prompts": str(folder / "prompts.txt"), "custom.detectors": ["open-clip"]}
    return own | {"open_clip.encoder": "shapes", "steps": 2, "device": "cpu", "checkpoint": 1}


def flags(chosen: dict[str, Any]) -> list[str]:
    words = []
    for name, value in chosen.items():
        words += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [str(value)])]
    return words


def test_it_finds_what_the_command_does(run: Path, tmp_path: Path, capsys) -> None:
    chosen, there, here = settings(tmp_path), tmp_path / "command", tmp_path / "here"
    assert evaluate.main([str(run), "--suites", "custom", *flags(chosen), "--output", str(there)]) == 0
    capsys.readouterr()
    torch.set_num_threads(2)
    found = evaluate_model(run, suites=["custom"], settings=chosen, output=here, quiet=True)
    assert capsys.readouterr().out == ""
    assert torch.get_num_threads() == 2
    assert isinstance(found, Evaluation)
    assert content(here) == content(there)
    assert found.results == json.loads((there / "evaluation.json").read_text(encoding="utf-8"))
    (table, *_) = (each["name"] for each in found.results["suites"]["custom"]["tables"])
    rows = found.table("custom", table)
    assert list(rows) == ["before", "after"]
    assert {row["n"] for row in rows["after"].values()} == {2}
    assert found.images.keys() == {"custom"}
    for stage, files in found.images["custom"].items():
        assert len(files) == 2
        assert all(path.is_file() and here / stage in path.parents for path in files.values())
    with pytest.raises(ConfigError, match="'shapes': no such suite; there are custom"):
        found.table("shapes", "unsafe")
    with pytest.raises(ConfigError, match=rf"'nudity': no such table of suite custom; there are {table}"):
        found.table("custom", "nudity")


def test_it_draws_what_the_command_does(run: Path, tmp_path: Path) -> None:
    chosen = {"images_per_prompt": 2, "seed": 5, "steps": 2, "device": "cpu"}
    texts, output = PROMPTS.splitlines(), ["--output", str(tmp_path / "c.png"), "--images", str(tmp_path / "images")]
    assert sample.main([str(run), "--prompts", *texts, *flags(chosen), *output]) == 0
    before = content(run)
    torch.set_num_threads(2)
    drawn = draw_images(run, texts, chosen, quiet=True)
    assert torch.get_num_threads() == 2
    assert content(run) == before, "nothing is written"
    assert list(drawn) == ["base", "tuned"]
    for name, images in drawn.items():
        assert images.shape == (4, 3, 16, 16)
        assert images.dtype == torch.float32
        files = sorted((tmp_path / "images").glob(f"{name}-*.png"))
        theirs = np.stack([np.asarray(Image.open(file)) for file in files])
        ours = np.floor(images.permute(0, 2, 3, 1).numpy().astype(np.float64) * 255 + 0.5)
        assert np.array_equal(ours, theirs)
    earlier = draw_images(run, texts, chosen | {"checkpoint": 1}, quiet=True)
    assert torch.equal(earlier["base"], drawn["base"])
    assert not torch.equal(earlier["tuned"], drawn["tuned"])
