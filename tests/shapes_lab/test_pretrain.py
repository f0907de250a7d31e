"""The whole of pretraining, a few steps each, and killed in between."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastgrpo.policy import load_policy
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.shapes_lab import optimization, pretrain
from fastgrpo.shapes_lab.optimization import Stage

SIZES = ["--pictures", "96", "--drawn", "32", "--seed", "3"]
STEPS = ["--vae-steps", "1", "--diffusion-steps", "2", "--careless-steps", "1", "--encoder-steps", "2"]
STEPS += ["--held-out-steps", "1"]


class Killed(BaseException):
    pass


def trained(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(out), *SIZES, *STEPS])
    pretrain.main()


def weights(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != "pretrain.json"
    }


@pytest.mark.slow(15)
def test_killed_between_and_within_stages_it_makes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "SNAPSHOT_EVERY", 1)
    trained(tmp_path / "whole", monkeypatch)
    plain, count = Stage.step, 0
    kills = {1 + 2, 1 + 2 + 1 + 1 + 2}  # at the last step of the diffusion stage, and of the encoder's

    def step(self: Stage, loss: torch.Tensor, **measured: float) -> None:
        nonlocal count
        count += 1
        if count in kills:
            raise Killed
        plain(self, loss, **measured)

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step)
        patch.setitem(pretrain.STAGES, "drawn", _killing(pretrain.STAGES["drawn"]))
        for _ in range(3):
            with pytest.raises(Killed):
                trained(stopped, patch)
        trained(stopped, patch)
    whole, resumed = weights(tmp_path / "whole"), weights(stopped)
    assert whole.keys() == resumed.keys()
    assert [name for name, data in whole.items() if resumed[name] != data] == []
    record = json.loads((stopped / "pretrain.json").read_text())
    assert record.keys() == pretrain.STAGES.keys()
    # What it made loads as what ships does.
    load_policy(ModelConfig(path=str(stopped / "pipeline")), torch.device("cpu"), torch.float32)
    for name in ("encoder", "held_out"):
        load_encoder(f"local-dir:{stopped / name}", "cpu")
    assert {Path(name).suffix for name in whole} <= {".safetensors", ".json", ".txt"}


def _killing(draw):
    """A stage that is killed when it begins for the first time."""
    begun = []

    def stage(config):
        begun.append(config)
        if len(begun) == 1:
            raise Killed
        return draw(config)

    return stage
