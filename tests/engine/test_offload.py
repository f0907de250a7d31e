"""engine.offload: when it is on, and that a whole training with it learns the same to the bit and uses nothing away."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgrpo import assembly, policy, train
from fastgrpo.costs.counting import ModelCost
from fastgrpo.engine import batch_size
from fastgrpo.engine.batch_size import decide_offload
from fastgrpo.engine.host_average import HostAverage
from fastgrpo.engine.record import EngineRecord
from fastgrpo.rewards import encoder
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import EngineConfig, TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system import offload as offload_module
from fastgrpo.system.distributed import Ranks
from support.costs import ENCODERS, MODEL
from support.training import TIMED

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ROOMY, SHORT = 10**12, 0


class Others(Ranks):
    """Beside others, of which one has too little memory or none has. asked: how often they were."""

    def __init__(self, short: bool) -> None:
        super().__init__(0, 2)
        vars(self).update(short=short, asked=0)

    def any(self, flag: bool) -> bool:
        vars(self)["asked"] += 1
        return flag or self.short


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch):
    """(bytes that may be filled, None where nobody may look; what is said of engine; record; others) -> decision."""

    def decide(
        room: int | None, record: EngineRecord, others: Ranks, device: torch.device = CUDA, **engine: object
    ) -> tuple[bool, str]:
        def look(*_: object) -> int:
            assert room is not None, "the memory was looked into"
            return room

        def count(*_: object) -> ModelCost:
            assert room is not None, "the model was counted"
            return MODEL

        monkeypatch.setattr(batch_size, "memory_room", look)
        monkeypatch.setattr(batch_size, "describe", count)
        monkeypatch.setattr(batch_size, "count_model", count)
        monkeypatch.setattr(batch_size, "count_encoders", lambda *_: (ENCODERS, ()))
        monkeypatch.setattr(batch_size, "device_name", lambda device: f"a {device.type}")
        config = TrainConfig(engine=EngineConfig(**{"memory": 0.9} | engine))
        return decide_offload(config, device, torch.bfloat16, others, record)

    return decide


@pytest.mark.parametrize("short", [False, True])
def test_auto_is_on_where_any_process_is_short_of_memory(decided, short: bool) -> None:
    others = Others(short)
    on, why = decided(ROOMY, EngineRecord(), others)
    assert on == short
    assert why.startswith("offloading is on, as another process has less memory" if short else "offloading is off: of ")
    assert decided(SHORT, EngineRecord(), others)[0]
    assert others.asked == 2, "all were asked, whatever is so here: else they would wait for this one"
    assert decided(SHORT, EngineRecord(), Ranks())[0], "and alone"
    assert not decided(ROOMY, EngineRecord(), Ranks())[0]


@pytest.mark.parametrize("setting", ["on", "off"])
def test_a_setting_outranks_memory_others_and_record(decided, setting: str) -> None:
    opposite = EngineRecord("a cuda", settings={"engine.offload": "off" if setting == "on" else "on"})
    others = Others(short=True)
    expected = setting == "on", f"offloading is {setting}, as engine.offload says"
    assert decided(None, opposite, others, offload=setting) == expected
    assert others.asked == 0
    on_cpu = decided(None, opposite, others, CPU, offload=setting)
    assert on_cpu == (False, "offloading is off: a CPU's memory is the host's")


@pytest.mark.parametrize("before", ["on", "off"])
def test_a_resumed_run_goes_on_as_it_was_where_it_may_fill_as_much(decided, before: str) -> None:
    record = EngineRecord("a cuda", settings={"engine.offload": before, "engine.memory": 0.9})
    expected = before == "on", f"offloading is {before}, as the run had it before"
    assert decided(None, record, Others(short=before == "off")) == expected
    assert not decided(None, record, Others(True), CPU)[0]
    settings = record.settings or {}
    for other in (
        replace(record, device="another"),
        replace(record, settings=settings | {"engine.memory": 0.5}),
        replace(record, settings={"engine.memory": 0.9}),  # of a version that had no offloading
        replace(record, settings=None),
    ):
        # By what there is now, which says the opposite.
        room = ROOMY if before == "on" else SHORT
        assert decided(room, other, Ranks())[0] == (before == "off")


class Poisoned(offload_module._Offloaded):
    """Beside a CPU that stands for a GPU: what is away is not on the device, so that it is NaN for all that computes.

    used: how often they came.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self.used = -1
        super().__init__(tensors, device)

    def _put(self, buffer: Tensor) -> None:
        away = buffer is self._host
        self.used += away
        super()._put(torch.full_like(buffer, 0xFF) if away else buffer)


@pytest.mark.slow
def test_a_training_learns_the_same_to_the_bit_and_uses_nothing_that_is_away(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the guard, evaluations by the average, pictures, and an encoder that nothing is trained on."""
    moved: list[Poisoned] = []
    followed: list[int] = []
    follow = HostAverage.follow

    def away(tensors: Iterable[Tensor], of: nn.Module, device: torch.device) -> None:
        moved.append(Poisoned(tensors, device))
        offload_module._OFFLOADED[of] = moved[-1]

    def counted(self: HostAverage, weights: Tensor, left_out: Tensor) -> None:
        followed.append(len(weights))
        follow(self, weights, left_out)

    monkeypatch.setattr(policy, "offload", away)
    monkeypatch.setattr(encoder, "offload", away)
    monkeypatch.setattr(HostAverage, "follow", counted)
    # A CPU is never offloaded from: the decision is the only thing that is made up.
    monkeypatch.setattr(assembly, "decide_offload", lambda config, *_: (config.engine.offload == "on", ""))
    trained_on = load_toml(config_file).reward.encoder.removeprefix("local-dir:")
    held_out = f"local-dir:{shutil.copytree(trained_on, tmp_path / 'held-out')}"
    flags = ["--iterations", "2", "--optim.ema", "0.5", "--eval.weights", "ema", "--eval.every", "0"]
    flags += ["--prompts-per-iteration", "4", "--group-size", "2"]  # two of each kind: the guard has something to watch
    flags += ["--reward.terms", "steering", "clip", "--eval.encoder", held_out, "--engine.no-overlap"]
    runs = {setting: tmp_path / setting for setting in ("off", "on")}
    for setting, run in runs.items():
        assert train.main([str(config_file), *flags, "--engine.offload", setting, "--run", str(run)]) == 0
        if setting == "off":
            assert (moved, followed) == ([], [])
    assert len(moved) == 6, "VAE and text encoder, and two towers of two encoders each"
    assert all(each.used > 0 for each in moved)
    assert len(followed) == 2 * load_toml(config_file).updates_per_iteration

    one, other = runs.values()
    files = [path.relative_to(one) for path in one.rglob("*") if path.suffix in (".safetensors", ".png")]
    assert {path.stem for path in files} >= {"diffusion_pytorch_model", "optimizer", "ema", "base", "after"}
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    numbers = [
        [{name: value for name, value in record.items() if not name.startswith(TIMED)} for record in records]
        for records in (read_metrics(run / "metrics.jsonl") for run in (one, other))
    ]
    assert numbers[0] == numbers[1]
    assert "eval/held_out_mean" in numbers[0][-1]
