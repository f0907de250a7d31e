"""Training from Python: the same numbers as the command's, with functions, prompts and callbacks handed over."""

import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastgrpo import ConfigError, Prompt, Result, Step, TrainConfig, Trainer, load_config, train
from fastgrpo.run.metrics import read_metrics
from support import ROOT
from support.training import TIMED

WEIGHTS = "diffusion_pytorch_model.safetensors"
FUNCTION = "def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n"


def redness(images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def tiny(runs: dict[str, Path]) -> str:
    return str(runs["full"].parent / "tiny.toml")


def settings(tiny: str, run: Path, **changes: object) -> TrainConfig:
    return load_config(tiny, {"reward.terms": ["given:redness"], "run": str(run), **changes})


def untimed(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in each.items() if not name.startswith(TIMED)} for each in metrics]


def test_it_learns_what_the_command_does(tiny: str, tmp_path: Path) -> None:
    """Byte for byte, though a callback draws in between."""
    (tmp_path / "own.py").write_text(FUNCTION)
    there = tmp_path / "command"
    assert train.main([tiny, "--run", str(there), "--reward.terms", f"{tmp_path / 'own.py'}:redness"]) == 0
    seen: list[tuple[int, float]] = []

    def look(step: Step) -> None:
        images = step.draw(["a dog", "a house", "a dog"], 3)
        assert images.shape[:2] == (3, 3)
        assert images.min() >= 0
        assert images.max() <= 1
        assert torch.equal(images[0], images[2]), "the same text and seed"
        seen.append((step.iteration, step.metrics["reward/redness"]))

    trainer = Trainer(settings(tiny, tmp_path / "here"), rewards={"redness": redness}, callbacks=[look], quiet=True)
    result = trainer.train()
    assert isinstance(result, Result)
    assert (result.run, result.iterations, result.finished) == (tmp_path / "here", 2, True)
    expected = read_metrics(there / "metrics.jsonl")
    assert untimed(result.metrics) == untimed(expected)
    assert seen == [(each["iteration"], each["reward/redness"]) for each in expected]
    assert (result.unet / WEIGHTS).read_bytes() == (
        there / "checkpoints" / "iter-000002" / "unet" / WEIGHTS
    ).read_bytes()


def test_a_callback_stops_it_and_it_goes_on(tiny: str, tmp_path: Path) -> None:
    rewards = {"redness": redness}
    whole = Trainer(settings(tiny, tmp_path / "whole"), rewards=rewards, quiet=True).train()
    changes = {"checkpoint.every": 10}
    stopping = Trainer(settings(tiny, tmp_path / "part", **changes), rewards=rewards, callbacks=[lambda step: True])
    part = stopping.train()
    assert (part.iterations, part.finished, part.evaluation) == (1, False, {})
    assert part.unet.is_dir(), "an iteration at which none was due"
    rest = Trainer(settings(tiny, tmp_path / "part"), rewards=rewards, quiet=True).resume(part.run)
    assert (rest.iterations, rest.finished) == (2, True)
    assert (rest.unet / WEIGHTS).read_bytes() == (whole.unet / WEIGHTS).read_bytes()


def test_what_a_callback_raises_comes_after_a_checkpoint(tiny: str, tmp_path: Path) -> None:
    def broken(step: Step) -> None:
        raise ZeroDivisionError("mine")

    changes = {"checkpoint.every": 10}
    trainer = Trainer(settings(tiny, tmp_path / "run", **changes), rewards={"redness": redness}, callbacks=[broken])
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "iter-000001" / "manifest.json").is_file()


class Growing:
    """One prompt more of the second kind in every iteration."""

    def __init__(self, count: int) -> None:
        self.asked: list[int] = []
        self._count = count

    def batch(self, iteration: int) -> list[Prompt]:
        self.asked.append(iteration)
        return [Prompt(f"prompt {min(iteration, k)}", "positive") for k in range(self._count)]


def test_a_source_says_what_is_drawn(tiny: str, tmp_path: Path) -> None:
    drawn: list[str] = []

    def noted(images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        drawn.extend(prompt.text for prompt in prompts)
        return redness(images, prompts)

    source = Growing(2)
    config = settings(tiny, tmp_path / "run", **{"guard.action": "off", "group_size": 2})
    Trainer(config, rewards={"redness": noted}, source=source, quiet=True).train()
    assert source.asked == [0, 1]
    assert drawn == ["prompt 0"] * 4 + ["prompt 0"] * 2 + ["prompt 1"] * 2
    wrong = Trainer(settings(tiny, tmp_path / "wrong"), rewards={"redness": redness}, source=Growing(3), quiet=True)
    with pytest.raises(ValueError, match="the prompt source gave 3 prompts for iteration 0; accepted are 2"):
        wrong.train()


def test_what_cannot_be_is_refused_at_once(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tiny, tmp_path / "run")
    with pytest.raises(ConfigError, match="'given:redness' is a function that a program hands to"):
        Trainer(config, rewards={})
    with pytest.raises(ConfigError, match="rewards: no term asks for 'green'"):
        Trainer(config, rewards={"redness": redness, "green": redness})
    with pytest.raises(ConfigError, match=r"cannot be called with \(images, prompts\)"):
        Trainer(config, rewards={"redness": lambda images: images})
    with pytest.raises(ConfigError, match=r"grpo\.kll: no such field"):
        load_config("shapes", {"grpo.kll": 0.1})
    with pytest.raises(ConfigError, match='iterations = "two": accepted is a whole number'):
        load_config("shapes", {"iterations": "two"})
    assert train.main([tiny, "--run", str(tmp_path / "run"), "--reward.terms", "given:redness"]) == 2
    assert "is a function that a program hands to fastgrpo.Trainer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_example_trains(tiny: str, tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "train_from_python.py"))
    changes = {"iterations": 4, "reward.terms": ["given:blueness"], "group_size": 2}
    config = load_config(tiny, {"run": str(tmp_path / "run"), **changes})
    result = Trainer(config, rewards={"blueness": example["blueness"]}, callbacks=[example["look"]], quiet=True).train()
    assert (result.run / "look-4.png").is_file() == (result.iterations == 4)
    assert "reward/blueness" in result.metrics[0]
