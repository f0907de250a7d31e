"""Inputs that are not what they were when a run began: a resume says which, and of nothing else."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgrpo import train
from fastgrpo.assembly import load_training
from fastgrpo.run.inputs import changed_inputs, input_digests, weights_digest
from fastgrpo.settings.command_line import changed_fields
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml

REWARD = "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
ANCHORS = 'safe = ["a safe picture"]\nunsafe = ["an unsafe picture"]\n'


@pytest.fixture
def config(config_file: Path, tiny_pipeline: Path, tmp_path: Path) -> TrainConfig:
    """Of adapters and every kind of input, each a copy in `tmp_path` that a test may change."""
    base = load_toml(config_file)
    model = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    encoder = shutil.copytree(base.reward.encoder.removeprefix("local-dir:"), tmp_path / "encoder")
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "anchors.toml").write_text(ANCHORS)
    prompts = {}
    for label in ("positive", "negative"):
        prompts[label] = str(shutil.copy(getattr(base.prompts, label), tmp_path))
    return replace(
        base,
        iterations=2,
        model=replace(base.model, path=str(model), lora_rank=2),
        prompts=replace(base.prompts, **prompts),
        reward=replace(
            base.reward,
            terms=("steering", f"{tmp_path / 'mine.py'}:brightness"),
            encoder=f"local-dir:{encoder}",
            anchors=str(tmp_path / "anchors.toml"),
        ),
    )


def digests(config: TrainConfig) -> dict[str, str]:
    return input_digests(config, load_training(config, threads=1))


def one_weight(file: Path) -> None:
    """The smallest change there is: one bit of one number."""
    tensors = load_file(file)
    first = next(tensor for _, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    kind = torch.int16 if first.element_size() == 2 else torch.int32
    first.view(-1).view(kind)[-1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def line_more(file: Path) -> None:
    file.write_text(file.read_text() + "one more\n")


def other(old: str, new: str) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


CHANGES = {
    "prompts.positive": ("positive.txt", line_more),
    "prompts.negative": ("negative.txt", line_more),
    "reward.anchors": ("anchors.toml", other("a safe picture", "a harmless picture")),
    "mine.py of reward.terms": ("mine.py", other("mean", "amax")),
    "the encoder of reward.encoder": ("encoder/open_clip_model.safetensors", one_weight),
    "the UNet of model.path, in float32": ("model/unet/diffusion_pytorch_model.safetensors", one_weight),
    "the VAE of model.path, in float32": ("model/vae/diffusion_pytorch_model.safetensors", one_weight),
    "the text encoder of model.path, in float32": ("model/text_encoder/model.safetensors", one_weight),
    "the scheduler of model.path": ("model/scheduler/scheduler_config.json", other("0.012", "0.0125")),
    "the tokenizer of model.path": ("model/tokenizer/tokenizer_config.json", other(": 8", ": 7")),
}


@pytest.mark.slow
def test_each_input_is_told_from_all_others(config: TrainConfig, tmp_path: Path) -> None:
    before = digests(config)
    assert set(before) == set(CHANGES)
    assert digests(config) == before
    for name, (file, change) in CHANGES.items():
        content = (tmp_path / file).read_bytes()
        change(tmp_path / file)
        assert changed_inputs(before, digests(config)) == [name]
        (tmp_path / file).write_bytes(content)


def test_a_unet_that_is_trained_itself_is_in_the_checkpoint_and_counts_only_for_the_kl(config: TrainConfig) -> None:
    whole = replace(config, model=replace(config.model, lora_rank=0))
    unet = "the UNet of model.path, in float32"
    assert unet in digests(whole)
    assert unet not in digests(replace(whole, grpo=replace(whole.grpo, kl=0.0)))


def test_what_only_one_side_knows_is_no_change() -> None:
    assert changed_inputs({}, {"a": "1"}) == []
    assert changed_inputs({"a": "1", "b": "2"}, {"a": "1"}) == []
    assert changed_inputs({"a": "1", "b": "2"}, {"b": "3", "a": "1"}) == ["b"]


def test_weights_are_told_apart_by_name_shape_type_and_order() -> None:
    def of(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    x = torch.arange(6.0)
    same = of(a=x, b=x + 1)
    assert of(b=x + 1, a=x.clone()) == same
    others = [of(a=x + 1, b=x), of(a=x.flip(0), b=x + 1), of(a=x.view(2, 3), b=x + 1), of(a=x.half(), b=x + 1), of(a=x)]
    assert len({same, *others}) == len(others) + 1
    assert of(a=x.bfloat16()) != of(a=x.half())
    assert of(a=torch.tensor(1.0)) == of(a=torch.tensor(1.0))
    layout = torch.randn(2, 3, 4, 5)
    assert of(a=layout) == of(a=layout.to(memory_format=torch.channels_last))


@pytest.mark.slow
def test_a_resume_says_what_has_changed_and_takes_what_may_change(
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, negative = tmp_path / "run", tmp_path / "negative.txt"
    shutil.copy(load_toml(config_file).prompts.negative, negative)
    flags = ["--run", str(run), "--iterations", "1", "--optim.schedule", "linear", "--prompts.negative", str(negative)]
    assert train.main([str(config_file), *flags]) == 0
    before = load_toml(run / "config.toml")

    def resume(*more: str) -> list[str]:
        capsys.readouterr()
        assert train.main(["--resume", str(run), *more]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    line_more(negative)
    more = ["--micro-batch", "2", "--engine.threads", "1", "--eval.every", "0", "--checkpoint.keep", "5"]
    warnings = resume("--iterations", "2", *more)
    assert warnings == [
        "warning: prompts.negative is another than until iteration 1, and so is what is learned from here on",
        "warning: with 2 iterations instead of 1, optim.schedule linear goes on at 0.0005, as if there had been so "
        "many from the start; what was learned until here followed the shorter one",
    ]
    after = load_toml(run / "config.toml")
    changed = {"iterations", "micro_batch", "engine.threads", "eval.every", "checkpoint.keep"}
    assert set(changed_fields(before, after)) == changed
    assert resume() == []  # it was said, and the new checkpoint is of the new prompts
