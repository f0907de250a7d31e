"""The model card of an export, and `--push`, against a hub of this machine that speaks the real one's protocol."""

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from fastgrpo import evaluate, export, sample, train
from fastgrpo.run import card
from fastgrpo.settings.commands import Export
from fastgrpo.settings.paths import without_folder
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.settings.toml import dump_toml, load_toml
from support.hub import Hub, running
from support.runs import UNET, newest

pytestmark = pytest.mark.slow

NAME = "somebody/safer-sd.1"
EVIL = "a cat](http://evil) <img src=x onerror=alert(1)> `code` | **bold**\n# heading ```\n$x$"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub(), monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run of adapters that was evaluated, one prompt of which is not meant well."""
    run = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    (run / "samples" / "prompts.json").write_text(
        json.dumps([{"text": EVIL, "label": "positive", "category": "", "id": 0}])
    )
    rate = {"name": "overall", "value": 0.5, "n": 40, "low": 0.4, "high": 0.6}
    table = {"name": "unsafe", "title": "Unsafe images", "unit": "percent", "better": "lower", "trained": []}
    table |= {"numbers": {"before": [rate], "after": [rate | {"value": 0.25}]}, "tests": {}}
    folder = run / "evaluation" / "in-training"
    folder.mkdir(parents=True, exist_ok=True)
    result = {"format": 1, "stages": {"before": {}, "after": {}}, "suites": {"shapes": {"tables": [table]}}}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Export adapters of a run to a place, and upload them. Returns the exit code and what was said."""

    def push(run: Path, output: Path, *flags: str, name: str = NAME) -> tuple[int, str, str]:
        code = export.main([str(run), "--format", "lora", "--output", str(output), "--push", name, *flags])
        return (code, *capsys.readouterr())

    return push


def test_what_is_pushed_is_the_export_and_its_card(run: Path, hub: Hub, tmp_path: Path, push: Callable) -> None:
    out = tmp_path / "out"
    code, said, _ = push(run, out)
    assert code == 0
    assert f"uploaded  {hub.url}/{NAME}" in said
    assert hub.visibility == {NAME: "private"}
    files = hub.repositories[NAME]
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert files.keys() == {"README.md", "before_after.png", "pytorch_lora_weights.safetensors"}
    assert files["before_after.png"] == (run / "samples" / "before_after.png").read_bytes()

    _, front, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["tags"] == ["fastgrpo", "stable-diffusion", "lora", "grpo"]  # its reward has nothing to do with safety
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "base_model" not in data  # which is a folder
    assert "| overall | 50.0 [40.0, 60.0] | 25.0 [40.0, 60.0] | -25.0 (-50%) | 40 |" in text
    assert f"pipe.load_lora_weights('{NAME}')" in text
    assert str(tmp_path) not in text
    assert str(tmp_path.parent) not in text  # nor the folder of the base model
    # Of what came from a file nothing has become Markdown or HTML.
    assert r"1. a cat\](http://evil) &lt;img src=x onerror=alert(1)&gt; \`code\` \| \*\*bold\*\* \# heading" in text
    config = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    whole = tomllib.loads((run / "config.toml").read_text())
    assert config["model"]["path"] == Path(whole["model"]["path"]).name
    assert config["optim"] == whole["optim"]

    # Once more, to the same repository, as one file and for everybody: what is there stays as it is.
    code, *_ = push(run, tmp_path / "tuned.safetensors", "--layout", "kohya", "--public")
    assert (code, hub.visibility) == (0, {NAME: "private"})
    assert f"pipe.load_lora_weights('{NAME}', weight_name='tuned.safetensors')" in files["README.md"].decode()
    assert files["tuned.safetensors"] == (tmp_path / "tuned.safetensors").read_bytes()
    assert any(key.endswith(".lora_up.weight") for key in load(files["tuned.safetensors"]))
    code, *_ = push(run, tmp_path / "b.safetensors", "--layout", "kohya", "--public", name="somebody/open")
    assert (code, hub.visibility["somebody/open"]) == (0, "public")


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"/api/repos/create": (401, "")}, "does not accept this machine's token"),
        ({"/api/repos/create": (403, "")}, "the token may not write there"),
        ({"/commit/main": (403, "")}, "the token may not write there"),
        ({"/preupload/main": (404, "RepoNotFound")}, "the token may not write there, or there is no such owner"),
        ({"/put/": (400, "BadOid")}, "told BadOid"),
    ],
)
def test_a_push_that_fails_leaves_the_export_and_says_so(
    runs: dict[str, Path], hub: Hub, tmp_path: Path, push: Callable, refused: dict[str, tuple[int, str]], words: str
) -> None:
    hub.refuse = refused
    out = tmp_path / "out"
    code, said, err = push(runs["lora"], out)
    assert code == 1
    assert "exported" in said
    assert "uploaded" not in said
    assert err.count("\n") == 1
    assert err.startswith(f"fastgrpo: --push {NAME}: ")
    assert words in err
    assert err.endswith(f"nothing was uploaded, and the export stays in {out}.\n")
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert not any(hub.repositories.values())


def test_a_hub_that_is_not_there_is_named(
    runs: dict[str, Path], hub: Hub, tmp_path: Path, push: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = push(runs["lora"], tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert "the Hugging Face hub cannot be reached" in err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = push(runs["lora"], tmp_path / "b")
    assert code == 1
    assert "HF_HUB_OFFLINE" in err
    assert sorted(os.listdir(tmp_path / "b")) == ["README.md", "before_after.png", "pytorch_lora_weights.safetensors"]


def test_what_cannot_be_pushed_is_refused_before_anything_is_exported(
    runs: dict[str, Path], hub: Hub, tmp_path: Path, push: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for name in ("me", "me/", "/x", "a/b/c", "me/a b", "me/a--b", "me/..", "me/x.", ".me/x", "me/" + "x" * 96, "me/ä"):
        code, _, err = push(runs["lora"], out, name=name)
        assert (code, err.count("\n")) == (2, 1)
        assert f"--push {name}: accepted is OWNER/NAME" in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = push(runs["lora"], out)
    assert code == 2
    assert "there is no token for the Hugging Face hub; `hf auth login` or HF_TOKEN gives one" in err
    assert export.main([str(runs["lora"]), "--format", "lora", "--output", str(out), "--public"]) == 2
    assert export.main([str(runs["lora"]), "--format", "lora", "--output", str(out), "--with-checkpoint"]) == 2
    assert not out.exists()
    assert not hub.asked


def test_a_pushed_checkpoint_goes_on_elsewhere_bit_for_bit(
    runs: dict[str, Path], hub: Hub, tmp_path: Path, push: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", "1", "--with-checkpoint"]
    assert push(runs["lora"], tmp_path / "out", *flags)[0] == 0
    files = hub.repositories[NAME]
    inside = newest(runs["lora"]).with_name("iter-000001")
    pushed = {f"run/checkpoints/iter-000001/{f.relative_to(inside)}" for f in inside.rglob("*") if f.is_file()}
    assert {name for name in files if name.startswith("run/")} == {"run/config.toml", *pushed}
    assert files["run/config.toml"] == (runs["lora"] / "config.toml").read_bytes()
    files |= {"run/evil.py": b"", "run/checkpoints/iter-000001/evil.pt": b""}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with chdir(elsewhere):
        assert train.main(["--resume", f"hf:{NAME}"]) == 0
        assert train.main(["--resume", f"hf:{NAME}"]) == 2
    assert "runs/safer-sd.1 is there already; --resume runs/safer-sd.1 goes on from it" in capsys.readouterr().err
    _used_from_the_hub(elsewhere, capsys)
    run = elsewhere / "runs" / "safer-sd.1"
    ours, theirs = load_file(newest(run) / UNET), load_file(newest(runs["lora"]) / UNET)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert not list(elsewhere.rglob("evil*"))

    # What its author has named is not called without a look at it.
    config = files["run/config.toml"].decode().replace('terms = ["compressibility"]', 'terms = ["os:system"]')
    hub.repositories |= {"a/evil": files | {"run/config.toml": config.encode()}, "a/empty": {"README.md": b""}}
    for name, words in (
        ("a/evil", "its reward calls os:system; read runs/evil/config.toml, then --resume runs/evil goes on"),
        ("a/empty", "there is no run in that repository"),
        ("a/none", "the Hugging Face hub has no such repository"),
        ("none", "accepted is hf:OWNER/NAME"),
    ):
        with chdir(elsewhere):
            assert train.main(["--resume", f"hf:{name}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"fastgrpo: --resume hf:{name}: ")
        assert words in err
        assert err.count("\n") == 1


def _used_from_the_hub(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sample, export and evaluate take the same name: they download the run too, to a folder that is new."""
    (folder / "prompts.txt").write_text("a cat\n")
    own = "--custom.detectors open-clip --open-clip.encoder shapes --steps 2 --device cpu --suites custom"
    drawn = "--prompts a --images-per-prompt 1 --steps 2 --device cpu"
    for number, (main, flags, made) in enumerate(
        (
            (sample.main, drawn, "runs/safer-sd.1/samples/compare.png"),
            (export.main, "--format lora --output adapters", "adapters/pytorch_lora_weights.safetensors"),
            (evaluate.main, f"{own} --custom.prompts ../prompts.txt --output found", "found/evaluation.json"),
        )
    ):
        there = folder / str(number)
        there.mkdir()
        with chdir(there):
            assert main([f"hf:{NAME}", *flags.split()]) == 0
            assert (there / made).is_file()
            assert not (there / "runs" / "safer-sd.1" / "evil.py").exists()
            capsys.readouterr()
            assert main([f"hf:{NAME}", *flags.split()]) == 2
            said = f"fastgrpo: hf:{NAME}: runs/safer-sd.1 is there already; runs/safer-sd.1 uses it.\n"
            assert capsys.readouterr().err == said
            assert main(["hf:a/none", *flags.split()]) == 2
            assert "fastgrpo: hf:a/none: the Hugging Face hub has no such repository" in capsys.readouterr().err


def described(run: Path, config: TrainConfig, form: str = "lora", **options: object) -> tuple[dict, str]:
    """The metadata and the text of a card."""
    made = card.model_card(Export(run, format=form, output=Path("out"), **options), config, newest(run))
    _, front, text = made.text.split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_card_says_what_is_known_and_nothing_else(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_toml(run / "config.toml")
    known = ModelConfig(path="CompVis/stable-diffusion-v1-4", lora_rank=3, revision="main")
    safe = replace(base, model=known, reward=replace(base.reward, terms=("steering=2", "/home/me/mine.py:term")))
    data, text = described(run, safe)
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert (data["base_model_relation"], data["license"]) == ("adapter", "creativeml-openrail-m")
    assert data["tags"] == ["fastgrpo", "stable-diffusion", "lora", "grpo", "safety", "not-for-all-audiences"]
    assert "Reward: steering=2, mine.py:term." in text
    assert "/home" not in text
    data, _ = described(run, replace(safe, model=replace(known, path="somebody/finetuned")), "diffusers")
    assert data["base_model_relation"] == "finetune"
    assert "license" not in data
    assert "lora" not in data["tags"]

    # The run's own table and picture are of its last iteration, and of the weights that it evaluated.
    for config, options in ((replace(base, iterations=3), {}), (base, {"weights": "ema"})):
        _, text = described(run, config, **options)
        assert "These weights have not been evaluated" in text
        assert ".png" not in text
    # But those of an evaluation of just these are.
    other = run / "evaluation" / "iter-000002-ema"
    shutil.copytree(run / "evaluation" / "in-training", other)
    _, text = described(run, base, weights="ema")
    assert "| overall | 50.0" in text

    # The lines to load it run where there is nothing but fastgrpo.
    _, text = described(run, replace(base, model=ModelConfig(path="shapes", lora_rank=3)))
    code = text.split("```python\n")[1].split("```")[0].splitlines()
    with chdir(run.parent):
        shutil.copytree(newest(run) / "lora", "out", dirs_exist_ok=True)
        exec("\n".join(line for line in code if "load_lora" not in line and "image" not in line), names := {})
    assert type(names["pipe"]).__name__ == "StableDiffusionPipeline"
    assert code[-2] == "pipe.load_lora_weights('out')"


def test_the_last_part_of_a_path_is_what_others_see() -> None:
    for text, shown in (
        ("/home/me/model", "model"),
        ("~/model/", "model"),
        ("ViT-H-14:/home/me/hps.pt", "ViT-H-14:hps.pt"),
        ("local-dir:/home/me/encoder", "local-dir:encoder"),
        ("/home/me/mine.py:term", "mine.py:term"),
        ("hf:OWNER/NAME:CONFIG@train", "hf:OWNER/NAME:CONFIG@train"),
        ("OWNER/NAME:step-300/unet", "OWNER/NAME:step-300/unet"),
        ("shapes", "shapes"),
    ):
        assert without_folder(text) == shown
    assert dump_toml(TrainConfig()) == dump_toml(card.without_folders(TrainConfig()))
