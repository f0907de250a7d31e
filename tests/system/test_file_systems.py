"""Runs on file systems that have no locks, cannot make folders durable, or are full."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.run import checkpoint
from fastgrpo.run.folder import claim
from fastgrpo.run.metrics import MetricsLog, read_metrics
from fastgrpo.run.recovery import recover
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import sync_folder, sync_tree, write_atomically


def failing(call: Callable, code: int, concerns: Callable[..., bool] = lambda *_: True) -> Callable:
    """A system call that fails with an error's number where its arguments are `concerned`."""

    def wrapped(*args, **kwargs):
        if concerns(*args):
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return wrapped


def is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_there_is_a_warning_and_a_claim(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, code))
    run = tmp_path / "run"
    with claim(run, resumed=False):
        (run / "config.toml").write_text("")
    warning = capsys.readouterr().err
    assert warning.startswith(f"fastgrpo: warning: {run / '.lock'} cannot be locked ({os.strerror(code)})")
    assert warning.count("\n") == 1


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_locked_folder_is_refused_whichever_way_the_system_says_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, code))
    with pytest.raises(ConfigError, match="another process is training"), claim(tmp_path / "run", resumed=False):
        pass


def test_another_failure_to_lock_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.EIO))
    with pytest.raises(OSError, match="output error") as failure, claim(tmp_path / "run", resumed=False):
        pass
    assert failure.value.filename == str(tmp_path / "run" / ".lock")


def test_what_cannot_be_removed_does_not_hide_why_a_start_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rmdir", failing(os.rmdir, errno.ENOTEMPTY))  # NFS keeps a file that is still open
    with pytest.raises(ConfigError, match="of a model"), claim(tmp_path / "run", resumed=False):
        raise ConfigError("of a model")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_folders_that_cannot_be_made_durable_are_gone_on_with(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code, is_folder))
    write_atomically(tmp_path / "a", b"content")
    sync_tree(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EISDIR])
def test_folders_that_cannot_even_be_opened_are_gone_on_with(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(os.open, code, lambda path, flags: os.path.isdir(path)))
    write_atomically(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_folder_that_a_disk_loses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
    with pytest.raises(OSError, match="output error") as failure:
        sync_folder(tmp_path)
    assert failure.value.filename == str(tmp_path)


def test_a_full_disk_is_said_of_the_metrics_and_earlier_lines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path, finished=0)
    log.write(1, 1.0, {"reward/mean": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, errno.ENOSPC))
        with pytest.raises(OSError, match="No space left on device") as failure:
            log.write(2, 2.0, {"reward/mean": 0.6})
    assert failure.value.filename == str(tmp_path / "metrics.jsonl")
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"iteration": 1, "seconds": 1.0, "reward/mean": 0.5}


class Weights:
    """Stands for what is trained, in a checkpoint of one small file."""

    def write(self, folder: Path, *_: object) -> None:
        (folder / "trainer").mkdir(parents=True)
        (folder / "trainer" / "weights").write_bytes(b"weights")
        checkpoint._write_json(folder / "manifest.json", {"sha256": checkpoint._digests(folder)})
        sync_tree(folder)


@pytest.fixture
def small_checkpoints(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, int], Path]:
    """Saves a checkpoint: run, iteration, how many to keep -> its folder."""
    monkeypatch.setattr(checkpoint, "_write", Weights().write)
    monkeypatch.setattr(checkpoint, "tensor_bytes", lambda trainable: len(b"weights"))

    def save(run: Path, iteration: int, keep: int = 0) -> Path:
        return checkpoint.save(run, None, checkpoint.TrainerState(iteration, 1, 1.0, 1, {}), keep)

    return save


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    small_checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_checkpoints(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.ENOSPC))
    # And the beginning of the new one cannot be removed.
    monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree, errno.EBUSY))
    with pytest.raises(OSError, match="No space left on device"):
        small_checkpoints(tmp_path, 2)
    assert recover(tmp_path) == first


def test_an_old_checkpoint_that_is_in_use_does_not_end_the_training(
    small_checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_checkpoints(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", failing(os.rmdir, errno.ENOTEMPTY))  # as on NFS while someone reads a file in it
        second = small_checkpoints(tmp_path, 2, keep=1)
    assert recover(tmp_path) == second
    third = small_checkpoints(tmp_path, 3, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == [third.name]
