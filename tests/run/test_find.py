"""What `sample` and `export` refuse of a run, before a weight is loaded."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fastgrpo import export, sample
from fastgrpo.run.checkpoint import load_unet
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.errors import ConfigError
from support.runs import UNET, newest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that must refuse: one sentence with these words, exit code 2, no weight loaded."""

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("fastgrpo.run.export.load_components", unwanted)
    monkeypatch.setattr("fastgrpo.run.sample.load_policy", unwanted)

    def check(command: Callable[[list[str]], int], argv: list[object], *words: str) -> None:
        capsys.readouterr()
        code = command([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("fastgrpo: ")
        for word in words:
            assert word in err

    return check


@pytest.fixture(params=["sample", "export"])
def refused(request: pytest.FixtureRequest, refuse: Callable[..., None], tmp_path: Path) -> Callable[..., None]:
    """`refuse` for both commands, given a run and flags that both have."""
    flags = ["--format", "diffusers", "--output", tmp_path / "new"] if request.param == "export" else []
    command = {"sample": sample.main, "export": export.main}[request.param]

    def check(run: Path, flags_of_both: list[object], *words: str) -> None:
        refuse(command, [run, *flags, *flags_of_both], *words)
        assert not (tmp_path / "new").exists()
        assert not (run / "samples" / "compare.png").exists()

    return check


def test_a_folder_that_is_no_run_is_refused(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(tmp_path / "none", [], str(tmp_path / "none"), "no such folder")
    refused(tmp_path, [], str(tmp_path), "no config.toml")
    (tmp_path / "config.toml").write_text("iterations = 'many'")
    refused(tmp_path, [], "config.toml", "iterations")


def test_a_checkpoint_that_is_not_there_is_refused(refused: Callable[..., None], copied: Path) -> None:
    refused(copied, ["--checkpoint", "9"], "--checkpoint 9", "there are 1, 2")
    shutil.rmtree(copied / "checkpoints")
    refused(copied, [], str(copied), "no checkpoint in it yet")


def test_a_damaged_checkpoint_is_refused(refused: Callable[..., None], copied: Path) -> None:
    weights = newest(copied) / UNET
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(copied, [], f"{weights} is damaged", "the last good one is --checkpoint 1.")
    (copied / "checkpoints" / "iter-000001" / "trainer" / "state.json").unlink()
    refused(copied, [], f"{weights} is damaged", "there is no good checkpoint.")
    refused(copied, ["--checkpoint", "1"], "state.json is missing", "there is no good checkpoint.")


def test_an_average_that_was_not_kept_is_refused(refused: Callable[..., None], runs: dict[str, Path]) -> None:
    refused(runs["plain"], ["--weights", "ema"], "--weights ema", "optim.ema")


def test_a_base_model_that_is_gone_is_refused(refused: Callable[..., None], copied: Path, tiny_pipeline: Path) -> None:
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace(str(tiny_pipeline), "/gone"))
    refused(copied, [], f"{copied / 'config.toml'}: model.path", "'/gone'")


def test_a_base_model_of_other_shapes_is_refused(runs: dict[str, Path], tiny_pipeline: Path) -> None:
    config = UNet2DConditionModel.load_config(tiny_pipeline / "unet")
    for kind, weights in (("full", "trained"), ("full", "ema"), ("lora", "trained"), ("lora", "ema")):
        model = replace(load_toml(runs[kind] / "config.toml").model, path="other")
        for changes in (
            {"block_out_channels": (8, 16)},
            {"layers_per_block": 2},
            {"down_block_types": ("DownBlock2D",) * 2},  # fewer attentions than adapters
        ):
            unet = UNet2DConditionModel.from_config(config | changes)
            with pytest.raises(ConfigError, match=r"model\.path is 'other', whose UNet has other shapes"):
                load_unet(unet, newest(runs[kind]), weights, model)


def test_exports_that_come_to_nothing_are_refused(
    refuse: Callable[..., None], runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "a.safetensors").write_text("mine")
    for kind, form, output, words in (
        ("full", "lora", "new", ["--format lora", "no adapters", "diffusers and single-file"]),
        ("full", "diffusers", "full", ["--output", "there already", "new or empty"]),
        ("full", "diffusers", "a.safetensors", ["there already"]),
        ("lora", "lora", "full", ["there already"]),
        ("full", "single-file", "a.safetensors", ["there already", "a new file"]),
        ("full", "single-file", "new", ["ends in .safetensors"]),
        ("full", "diffusers", "none/new", ["cannot write in", "none", "No such file"]),
        ("full", "diffusers", "a.safetensors/new", ["cannot write in", "Not a directory"]),
        ("full", "diffusers", "/proc/new", ["cannot write in '/proc'"]),
    ):
        refuse(export.main, [runs[kind], "--format", form, "--output", tmp_path / output], *words)
    kohya = ["--layout", "kohya", "--output"]
    refuse(export.main, [runs["lora"], "--format", "lora", *kohya, tmp_path / "new"], "ends in .safetensors")
    refuse(export.main, [runs["lora"], "--format", "lora", *kohya, tmp_path / "a.safetensors"], "a new file")
    for form in ("diffusers", "single-file"):
        refuse(
            export.main, [runs["lora"], "--format", form, *kohya, tmp_path / "b.safetensors"], "--layout kohya", form
        )
    refuse(export.main, [runs["full"], "--format", "onnx", "--output", tmp_path / "new"], "onnx", "single-file")
    refuse(export.main, [runs["full"], "--formatt", "lora"], "--formatt: no such flag")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "full"]
    assert (tmp_path / "a.safetensors").read_text() == (tmp_path / "full" / "a").read_text() == "mine"


def test_samples_that_come_to_nothing_are_refused(
    refuse: Callable[..., None], runs: dict[str, Path], tmp_path: Path
) -> None:
    run = runs["full"]
    (tmp_path / "file.txt").write_text("\n")
    (tmp_path / "there.png").write_text("mine")
    for flags, words in (
        (["--images-per-prompt", 0], ["--images-per-prompt 0", "1 or more"]),
        (["--batch", 0], ["--batch 0"]),
        (["--steps", 0], ["--steps 0", "1 to 1000"]),
        (["--steps", 1001], ["--steps 1001"]),
        (["--guidance", 0.5], ["--guidance 0.5"]),
        (["--guidance", "inf"], ["--guidance inf"]),
        (["--guidance", "nan"], ["--guidance nan"]),
        (["--eta", 0], ["--eta 0.0", "above 0"]),
        (["--seed", -1], ["--seed -1"]),
        (["--output", tmp_path / "a.jpg"], ["--output", ".png"]),
        (["--output", tmp_path / "none" / "a.png"], ["--output", "cannot write in", "No such file"]),
        (["--output", tmp_path / "there.png"], ["--output", "there.png: it is there already; accepted is a new file"]),
        (["--images", tmp_path / "file.txt"], ["--images", "it is there already; accepted is a folder"]),
        (["--images", run], ["--images", "it is there already; accepted is a folder that is new or empty"]),
        (["--images", tmp_path / "none" / "images"], ["--images", "No such file"]),
        (["--prompt-file", tmp_path / "none.txt"], ["fastgrpo: --prompt-file: cannot read", "none.txt"]),
        (["--prompt-file", tmp_path / "file.txt"], ["--prompt-file", "holds no prompt"]),
        (["--weights", "best"], ["best"]),
    ):
        refuse(sample.main, [run, *flags], *words)
        refuse(sample.main, [run, "--images", tmp_path / "new", *flags], *words)  # which is not made
    if not torch.cuda.is_available():
        refuse(sample.main, [run, "--device", "cuda"], "--device cuda", "auto and cpu")
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "there.png"]
    assert (tmp_path / "there.png").read_text() == "mine"


def test_prompts_of_the_run_that_are_gone_are_refused_and_others_are_not_asked_for(
    refuse: Callable[..., None], copied: Path
) -> None:
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace("negative.txt", "gone.txt"))
    refuse(sample.main, [copied], f"{copied / 'config.toml'}: prompts.negative", "gone.txt")
    with pytest.raises(AssertionError, match="something was loaded"):
        sample.main([str(copied), "--prompts", "a cat"])
