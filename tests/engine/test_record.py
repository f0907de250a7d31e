"""What the engine has decided is kept in the run, and a resumed run goes on with it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastgrpo import train
from fastgrpo.assembly import load_training
from fastgrpo.costs.rates import device_name
from fastgrpo.engine import setup
from fastgrpo.engine.record import EngineRecord
from fastgrpo.settings.schema import TrainConfig
from support.training import FIXED, altered


def test_a_record_of_before_there_was_a_setting_decides_nothing_anew(base: TrainConfig) -> None:
    record = load_training(base, threads=1, say=lambda line: None).record
    old = {name: value for name, value in record.to_json().items() if name != "gradient_checkpointing"}
    del old["settings"]["engine.gradient_checkpointing"]
    kept, said = EngineRecord(**old | {"old_log_prob": "replay"}), []
    assert load_training(base, threads=1, record=kept, say=said.append).record.old_log_prob == "replay"
    assert said == []


@pytest.mark.slow
def test_a_resumed_run_decides_nothing_anew(base: TrainConfig, monkeypatch) -> None:
    config = altered(base, {"engine.graphs": "on", "engine.attention": "flash", "engine.reuse": "on", "micro_batch": 0})
    record = load_training(config, threads=1, say=lambda line: None).record
    assert record.micro_batch == 32
    kept = EngineRecord(**record.to_json())

    def again(*_, **__):
        raise AssertionError("decided again")

    for name in ("choose_backends", "_shares_first_step"):
        monkeypatch.setattr(setup, name, again)
    assert load_training(config, threads=1, record=kept, say=lambda line: None).record == kept


def test_a_resumed_run_goes_on_with_a_halved_micro_batch(base: TrainConfig, monkeypatch) -> None:
    config = altered(base, {"engine.graphs": "on", "engine.attention": "flash", "micro_batch": 8})
    record = load_training(config, threads=1, say=lambda line: None).record
    plan = record.attention
    record.micro_batch, record.rollout_batch = 4, 2
    monkeypatch.setattr(setup, "choose_backends", lambda *_: pytest.fail("decided again"))
    training = load_training(config, threads=1, record=EngineRecord(**record.to_json()), say=lambda line: None)
    assert (training.engine.micro_batch, training.engine.rollout_batch) == (4, 2)
    assert training.record.attention == plan


def test_another_device_decides_for_itself(base: TrainConfig) -> None:
    said: list[str] = []
    kept = EngineRecord(
        "some GPU", None, 3, True, {"text": True, "times": True, "first": True}, "replay", {"a": "native"}
    )
    record = load_training(base, threads=1, record=kept, say=said.append).record
    here = device_name(torch.device("cpu"))
    assert record.device == here
    assert (record.micro_batch, record.compiled, record.old_log_prob) == (base.micro_batch, False, "rollout")
    assert record.reuse == {"first": False}
    assert said[0] == f"this run was on some GPU before and is on {here} now: the engine decides anew"


def test_settings_that_a_resumed_run_changes_are_decided_upon_anew(base: TrainConfig) -> None:
    record = load_training(altered(base, {"micro_batch": 8}), threads=1, say=lambda line: None).record
    assert (record.micro_batch, record.compiled, record.reuse) == (8, False, {"first": False})
    said: list[str] = []
    config = altered(base, {"micro_batch": 3, "engine.reuse": "on", "rollout.initial_noise": "shared"})
    training = load_training(config, threads=1, record=EngineRecord(**record.to_json()), say=said.append)
    assert said[0] == "micro_batch and engine.reuse are not as before: the engine decides anew"
    assert training.engine.micro_batch == training.record.micro_batch == 3
    assert training.record.reuse == {"first": True}
    again = load_training(config, threads=1, record=EngineRecord(**training.record.to_json()), say=said.append)
    assert again.record == dataclasses.replace(training.record, group_norm={})
    old = EngineRecord(**(record.to_json() | {"settings": None}))  # as older checkpoints have it
    assert load_training(config, threads=1, record=old, say=said.append).record.micro_batch == 8
    assert sum("decides anew" in line for line in said) == 1


@pytest.mark.slow
def test_a_resumed_run_of_fixed_shapes_goes_on_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    options = [
        "--eval.every",
        "0",
        "--checkpoint.every",
        "1",
        "--grpo.std-floor",
        "1e-9",
        "--engine.attention",
        "flash",
    ]
    options += [part for name, value in FIXED.items() for part in (f"--{name}", value)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([str(config_file), "--run", str(whole), "--iterations", "2", *options]) == 0
    assert train.main([str(config_file), "--run", str(cut), "--iterations", "1", *options]) == 0
    assert train.main(["--resume", str(cut), "--iterations", "2"]) == 0
    last = Path("checkpoints") / "iter-000002"
    for name in ("unet/diffusion_pytorch_model.safetensors", "trainer/optimizer.safetensors"):
        assert (whole / last / name).read_bytes() == (cut / last / name).read_bytes(), name
    decided = [json.loads((run / "engine.json").read_text()) for run in (whole, cut)]
    assert decided[0] == decided[1] == json.loads((cut / last / "trainer/state.json").read_text())["engine"]
    assert decided[0]["attention"]["wanted"] == "flash"
    assert decided[0]["reuse"] == {"first": False}  # each sample begins with noise of its own


def test_every_decision_is_plain_data() -> None:
    record = EngineRecord(attention={"a": 1}, micro_batch=3, compiled=True, reuse={"text": True}, old_log_prob="replay")
    assert EngineRecord(**record.to_json()) == dataclasses.replace(record, group_norm={})
