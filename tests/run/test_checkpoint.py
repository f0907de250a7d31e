"""Checkpoints: complete or absent, verified, readable by diffusers, and continued from bit for bit."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgrpo.run import checkpoint, recovery
from fastgrpo.run.checkpoint import TrainerState
from fastgrpo.run.folder import claim
from fastgrpo.run.metrics import MetricsLog, read_metrics
from fastgrpo.run.recovery import recover
from fastgrpo.system.console import reason
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from support.checkpoints import Training

FILES = (
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "trainer/optimizer.safetensors",
    "trainer/ema.safetensors",
    "trainer/state.json",
)


@pytest.fixture
def training(tiny_pipeline: Path) -> Training:
    training = Training(tiny_pipeline)
    training.step(0)
    return training


def test_diffusers_reads_the_unet_back_exactly(training: Training, tmp_path: Path) -> None:
    folder = training.save(tmp_path, 1)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    assert "_name_or_path" not in json.loads((folder / "unet" / "config.json").read_text())
    assert dict(unet.config) | {"_name_or_path": ""} == dict(training.unet.config) | {"_name_or_path": ""}
    for name, tensor in training.unet.state_dict().items():
        assert unet.state_dict()[name].dtype == torch.float32
        assert torch.equal(unet.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_loaded_training_goes_on_bit_for_bit(lora_rank: int, tiny_pipeline: Path, tmp_path: Path) -> None:
    training = Training(tiny_pipeline, lora_rank)
    for seed in (0, 1):
        training.step(seed)
    folder = training.save(tmp_path, 2)
    resumed = Training(tiny_pipeline, lora_rank)
    checkpoint.load(folder, resumed.trainable)
    before = {name: tensor.clone() for name, tensor in resumed.tensors().items()}
    for seed in (2, 3):
        training.step(seed)
        resumed.step(seed)
    for name, tensor in training.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name
    assert not all(torch.equal(before[name], tensor) for name, tensor in training.tensors().items())


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rest(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = training.save(tmp_path, 1)

    def no_space(tensors, path, metadata=None):
        Path(path).write_bytes(b"the beginning")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        training.save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == [first.name]
    assert recover(tmp_path) == first


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_room_for_a_checkpoint_is_that_of_its_files(lora_rank: int, tiny_pipeline: Path, tmp_path: Path) -> None:
    training = Training(tiny_pipeline, lora_rank)
    folder = training.save(tmp_path, 1)
    tensors = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert checkpoint.tensor_bytes(training.trainable) == pytest.approx(sum(t.nbytes for t in tensors), abs=2000)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, needed = training.save(tmp_path, 1), checkpoint.tensor_bytes(training.trainable) + 2**24
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(total=10**12, used=0, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: pytest.fail("it was begun"))
    free = needed - 1
    with pytest.raises(OSError, match="No space left on device") as failure:
        training.save(tmp_path, 2)
    sizes = f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
    expected = f"{tmp_path}/checkpoints/iter-000002: No space left on device, {sizes}"
    assert reason(failure.value) == expected
    assert asked == [tmp_path / "checkpoints"]
    assert os.listdir(tmp_path / "checkpoints") == [first.name]
    assert recover(tmp_path) == first
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = needed
    assert recover(tmp_path) != training.save(tmp_path, 2)


@pytest.mark.parametrize("says_nothing", [SimpleNamespace(total=0, used=0, free=0), OSError(38, "not implemented")])
def test_a_disk_that_does_not_say_how_large_it_is_has_room(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_nothing: object
) -> None:
    def usage(path: Path) -> object:
        if isinstance(says_nothing, OSError):
            raise says_nothing
        return says_nothing

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert training.save(tmp_path, 1).is_dir()


def test_the_trainers_state_comes_back(training: Training, tmp_path: Path) -> None:
    folder = training.save(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "iter-000007"
    assert checkpoint.read_state(folder) == TrainerState(7, 1, 2.5, 1, {"torch": "x"})


def test_a_state_of_before_there_were_inputs_is_read(training: Training, tmp_path: Path) -> None:
    folder = training.save(tmp_path, 7)
    file = folder / "trainer" / "state.json"
    state = json.loads(file.read_text())
    for name in ("inputs", "iterations", "evaluated"):
        del state[name]
    file.write_text(json.dumps(state))
    assert checkpoint.read_state(folder) == TrainerState(7, 1, 2.5, 1, {"torch": "x"}, inputs={}, iterations=0)


def test_moments_are_stored_under_the_parameters_names(training: Training, tmp_path: Path) -> None:
    stored = load_file(training.save(tmp_path, 1) / "trainer" / "optimizer.safetensors")
    names = {name for name, _ in training.unet.named_parameters()}
    assert {key.partition(".")[2] for key in stored} == names
    assert {key.partition(".")[0] for key in stored} == {"exp_avg", "exp_avg_sq", "step"}


def test_only_the_newest_are_kept(training: Training, tmp_path: Path) -> None:
    for iteration in (8, 9, 10, 11):
        training.save(tmp_path, iteration, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["iter-000010", "iter-000011"]
    training.save(tmp_path, 12, keep=0)
    assert len(os.listdir(tmp_path / "checkpoints")) == 3


def test_those_that_were_evaluated_are_kept_unless_it_is_not_wanted(training: Training, tmp_path: Path) -> None:
    def save(iteration: int, evaluated: bool, **rule: bool) -> list[str]:
        state = TrainerState(iteration, seed=1, seconds=2.5, threads=1, versions={}, evaluated=evaluated)
        checkpoint.save(tmp_path, training.trainable, state, keep=1, **rule)
        return sorted(name.removeprefix("iter-00000") for name in os.listdir(tmp_path / "checkpoints"))

    assert save(1, False) == ["1"]
    assert save(2, True) == ["2"]
    assert save(3, False) == ["2", "3"]
    assert save(4, True) == ["2", "4"]
    (tmp_path / "checkpoints" / "iter-000002" / "trainer" / "state.json").write_text("{")  # it can no longer say so
    assert save(5, False) == ["2", "4", "5"]
    (
        tmp_path / "checkpoints" / "iter-000002" / "trainer" / "state.json"
    ).unlink()  # as a deletion that was cut short leaves it
    assert save(6, False) == ["4", "6"]
    assert save(7, True, keep_evaluated=False) == ["7"]


def test_a_protected_one_is_kept(training: Training, tmp_path: Path) -> None:
    for iteration in (3, 5, 8):
        training.save(tmp_path, iteration, keep=0)
    until = [checkpoint.newest_until(tmp_path, iteration) for iteration in (-1, 2, 3, 4, 7, 9)]
    three, five, eight = (checkpoint.checkpoint_folder(tmp_path, iteration) for iteration in (3, 5, 8))
    assert until == [None, None, three, three, five, eight]
    checkpoint.save(tmp_path, training.trainable, TrainerState(9, 1, 2.5, 1, {}), keep=1, protected=[until[3]])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["iter-000003", "iter-000009"]


def test_the_manifest_lists_every_file(training: Training, tmp_path: Path) -> None:
    folder = training.save(tmp_path, 1)
    assert set(json.loads((folder / "manifest.json").read_text())["sha256"]) == set(FILES)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*FILES, "manifest.json"}


def flip_a_bit(file: Path) -> str:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "is damaged (its sha256 is not the manifest's)"


def cut_short(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-1])
    return "is damaged (its sha256 is not the manifest's)"


def remove(file: Path) -> str:
    file.unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, remove])
def test_damage_of_any_file_is_found(training: Training, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    folder = training.save(tmp_path, 1)
    for name in FILES:
        whole = (folder / name).read_bytes()
        assert checkpoint.find_damage(folder) is None
        what = damage(folder / name)
        assert checkpoint.find_damage(folder) == f"{folder / name} {what}"
        (folder / name).write_bytes(whole)


def test_of_damaged_checkpoints_none_is_gone_on_from_and_none_is_lost(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, worse = training.save(tmp_path, 1), training.save(tmp_path, 2), training.save(tmp_path, 3)
    what = flip_a_bit(worse / FILES[1])
    (bad / "manifest.json").unlink()
    files = {path.relative_to(worse): path.read_bytes() for path in worse.rglob("*") if path.is_file()}
    there = sorted(tmp_path.rglob("*"))
    damages = f"{worse / FILES[1]} {what} and {bad / 'manifest.json'} is missing or damaged"
    assert recovery.find_good(tmp_path) == (good, damages)
    assert sorted(tmp_path.rglob("*")) == there
    assert recover(tmp_path) == good
    aside = [folder.with_name(f"damaged-{folder.name}") for folder in (worse, bad)]
    assert capsys.readouterr().err == (
        f"fastgrpo: warning: {damages}: the run goes on from {good}; what is damaged was set aside and may be removed "
        f"({aside[0]}, {aside[1]}).\n"
    )
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted([good, *aside])
    assert files == {path.relative_to(aside[0]): path.read_bytes() for path in aside[0].rglob("*") if path.is_file()}
    assert checkpoint.newest(tmp_path) == good
    assert recover(tmp_path) == good
    assert capsys.readouterr().err == ""
    # The same iteration once more, damaged again: what was set aside before stays, and counts for no `keep`.
    cut_short(training.save(tmp_path, 3, keep=2) / FILES[1])
    assert recover(tmp_path) == good
    again = worse.with_name("damaged-iter-000003-2")
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted([good, *aside, again])


def test_without_a_good_checkpoint_it_is_said_what_to_remove(training: Training, tmp_path: Path) -> None:
    bad, worse = training.save(tmp_path, 1), training.save(tmp_path, 2)
    flip_a_bit(worse / FILES[1])
    remove(bad / FILES[2])
    with pytest.raises(ConfigError) as refusal:
        recover(tmp_path)
    assert str(refusal.value) == (
        f"{worse / FILES[1]} is damaged (its sha256 is not the manifest's); there is no earlier good checkpoint: to "
        f"start from the beginning, remove {worse} and {bad}."
    )
    assert sorted((tmp_path / "checkpoints").iterdir()) == [bad, worse]


def test_the_first_process_looks_and_all_go_on_from_the_same_or_refuse(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Told(Ranks):
        def agree(self, text: str) -> str:
            if self.first:
                told.append(text)
            return told[-1]

    def on_both() -> list[Path | str | None]:
        found: list[Path | str | None] = []
        for index in (0, 1):
            with monkeypatch.context() as patch:
                if index:  # it may be on another machine, and see later what was renamed
                    patch.setattr(recovery, "folders", lambda run: pytest.fail("it looked for itself"))
                try:
                    found.append(recover(tmp_path, Told(index, 2)))
                except ConfigError as error:
                    found.append(str(error))
        return found

    assert on_both() == [None, None]
    good = training.save(tmp_path, 1)
    remove(training.save(tmp_path, 2) / FILES[0])
    assert on_both() == [good, good]
    flip_a_bit(good / FILES[0])
    first, other = on_both()
    assert first == other
    assert f"{good / FILES[0]} is damaged" in first


@pytest.mark.parametrize("name", ["manifest.json", FILES[2]])
def test_what_cannot_be_read_now_is_not_damaged_but_what_the_disk_has_lost_is(
    training: Training, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, newest = training.save(tmp_path, 1), training.save(tmp_path, 2)
    read, hashed = Path.read_text, checkpoint.file_sha256

    def failing(call: Callable[..., str]) -> Callable[..., str]:
        def reads(path: Path, *args: object, **kwargs: object) -> str:
            if path == newest / name:
                raise OSError(code, os.strerror(code), str(path))
            return call(path, *args, **kwargs)

        return reads

    monkeypatch.setattr(Path, "read_text", failing(read))
    monkeypatch.setattr(checkpoint, "file_sha256", failing(hashed))
    for code in (errno.EACCES, errno.ESTALE):
        with pytest.raises(OSError, match=os.strerror(code)):
            recover(tmp_path)
        assert checkpoint.newest(tmp_path) == newest
    code = errno.EIO
    assert recover(tmp_path) == good


@pytest.mark.parametrize("manifest", [None, b"", b"{", b"[]", b"{}"])
def test_a_checkpoint_without_its_manifest_is_damaged(
    training: Training, tmp_path: Path, manifest: bytes | None
) -> None:
    folder = training.save(tmp_path, 1)
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_bytes(manifest)
    with pytest.raises(ConfigError, match=r"manifest\.json is missing or damaged; there is no earlier good checkpoint"):
        recover(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert recover(tmp_path) is None


class Killed(BaseException):
    """Stands for the process's end: nothing in the code under test may catch it."""


def test_a_save_killed_at_any_system_call_leaves_a_good_checkpoint(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = training.save(tmp_path, 1)
    calls, deadline = 0, 0

    def fatal(call):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == deadline:
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    # Whatever makes, fills, renames, syncs or deletes files passes through one of these.
    for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")):
        monkeypatch.setattr(module, name, fatal(getattr(module, name)))
    monkeypatch.setattr(checkpoint, "save_file", fatal(checkpoint.save_file))
    monkeypatch.setattr(checkpoint, "_write_json", fatal(checkpoint._write_json))

    outcomes = []
    for deadline in range(1, 1000):  # noqa: B007 (fatal reads it)
        calls = 0
        try:
            training.save(tmp_path, 2, keep=1)
        except Killed:
            found = recover(tmp_path)
            outcomes.append(found.name)
            if found != first:
                break
        else:
            pytest.fail("the save was never killed after its rename")
    assert outcomes[-1] == "iter-000002"
    assert set(outcomes[:-1]) == {"iter-000001"}
    assert len(outcomes) > 10  # every stage was hit, and every next save cleaned up after the one before


def test_a_folder_is_claimed_once_and_freed(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with claim(run, resumed=False):
        (run / "config.toml").write_text("")
        with pytest.raises(ConfigError, match="another process is training"), claim(run, resumed=True):
            pass
    with claim(run, resumed=True):
        pass
    advice = f"new or empty; to go on with the run in it, say --resume {run}"
    with pytest.raises(ConfigError, match=advice), claim(run, resumed=False):
        pass


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of a model"), claim(tmp_path / "a", resumed=False):
        raise ConfigError("of a model")
    assert os.listdir(tmp_path) == []


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match="this is a file"), claim(tmp_path / "a", resumed=False):
        pass


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, finished=0)
    for iteration in (1, 2, 3):
        log.write(iteration, 0.5 * iteration, {"reward/mean": 0.1 * iteration, "kl/mean": float("nan")})
    log.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b'{"iteration": 4, "sec')  # killed while writing
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(tmp_path, finished=2)
    assert path.read_bytes() == b"".join(lines[:2])
    log.write(3, 9.0, {})
    log.close()
    records = read_metrics(path)
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert records[1] == {"iteration": 2, "seconds": 1.0, "reward/mean": 0.2, "kl/mean": None}
    assert records[2] == {"iteration": 3, "seconds": 9.0}
