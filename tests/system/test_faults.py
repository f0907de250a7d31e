"""Processes killed at random moments and started again: what is learned stays the same.

`pytest -n0 tests/system/test_faults.py --faults 20` kills twenty times, and two times under torchrun, and fills a disk;
without the option it is one time, under torchrun.
"""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import killed
from support.processes import together, torchrun

pytestmark = pytest.mark.slow

STUCK_AFTER = 30  # seconds
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = (WEIGHTS, "trainer/optimizer.safetensors")


def options(config_file: Path, iterations: int) -> list[str]:
    flags = ["--iterations", str(iterations), "--engine.threads", "1", "--checkpoint.every", "1"]
    flags += ["--checkpoint.keep", "0", "--eval.every", "0", "--guard.action", "off"]
    return [str(config_file), *flags, "--engine.stuck-after", str(STUCK_AFTER)]


def assert_same(run: Path, expected: Path, iteration: int) -> None:
    for name in FILES:
        file = Path("checkpoints", f"iter-{iteration:06d}", name)
        assert (run / file).read_bytes() == (expected / file).read_bytes(), name


def counted(processes: int, iterations: int, given: list[str], folder: Path) -> int:
    """Trains undisturbed in folder/"one". Returns the pieces of work in an iteration and a half of any process."""
    log = folder / "counted"
    ended = together(processes, "0", "0", "1", str(log), *given, "--run", str(folder / "one"), main=killed.main)
    assert [each.returncode for each in ended] == [0] * processes, ended
    marks = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("marks")]
    return round(1.5 * min(marks) / iterations)


def moments(log: Path, what: str) -> list[float]:
    """When that happened, in seconds."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [float(when) for name, _, when in lines if name == what]


@pytest.mark.slow(40)
def test_torchrun_starts_a_killed_training_again(config_file: Path, tmp_path: Path, faults: int) -> None:
    """In the same folder, though it has a name that the first start has made, of the time."""
    kills, log = max(1, faults // 10), tmp_path / "log"
    # No start comes further than one iteration and a half: there is something left for each.
    given = options(config_file, kills + 2)
    most = counted(2, kills + 2, given, tmp_path)
    argv = ["1", str(kills), str(most), str(log), *given]
    done = torchrun(2, *argv, module="support.killed", restarts=kills, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert_same(run, tmp_path / "one", kills + 2)
    assert len(moments(log, "kill")) == kills
    for each in moments(log, "kill"):
        # torchrun ends what is left and starts Python again: some seconds, on a busy machine some more.
        assert min(start for start in moments(log, "start") if start > each) - each < STUCK_AFTER + 30


def test_killed_at_random_moments_a_training_comes_to_the_same_end(
    config_file: Path, tmp_path: Path, faults: int
) -> None:
    """Three processes, without an agent that would end the others: that is left to the watchdog."""
    if not faults:
        pytest.skip("for --faults")
    given = [*options(config_file, faults + 2), "--prompts-per-iteration", "3"]
    most, log, run = counted(3, faults + 2, given, tmp_path), tmp_path / "log", tmp_path / "run"
    argv = ["1", str(faults), str(most), str(log), *given, "--run", str(run)]
    for restart in range(faults):
        ended = together(3, *argv, main=killed.main, restart=restart)
        now, codes = time.time(), [each.returncode for each in ended]
        kills = moments(log, "kill")
        assert len(kills) == restart + 1, ended
        assert codes.count(-signal.SIGKILL) == 1, codes
        assert 0 not in codes
        assert now - kills[-1] < STUCK_AFTER + 30, f"kill {restart + 1} at {kills[-1]}, all ended at {now}"
    ended = together(3, *argv, main=killed.main, restart=faults)
    assert [each.returncode for each in ended] == [0, 0, 0], ended
    assert_same(run, tmp_path / "one", faults + 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 1 MB at first."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "fastgrpo-test", disk], check=False)
    if made.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_ends_all_processes_and_leaves_what_was_saved(
    config_file: Path, tmp_path: Path, faults: int, request: pytest.FixtureRequest
) -> None:
    if not faults:
        pytest.skip("for --faults")
    disk = request.getfixturevalue("small_disk")
    given, run = options(config_file, 3), disk / "run"
    ended = together(2, *given, "--run", str(tmp_path / "one"))
    assert [each.returncode for each in ended] == [0, 0], ended
    size = sum(file.stat().st_size for file in (tmp_path / "one" / "checkpoints" / "iter-000001").rglob("*.*"))
    # Room for two: before each there must be some 16 MB to spare, and a run has half a megabyte of other files.
    room = int(2.5 * size) + 2**24 + 500_000
    subprocess.run(["mount", "-o", f"remount,size={room}", disk], check=True)
    ended = together(2, *given, "--run", str(run))
    assert [each.returncode for each in ended] == [1, 1], ended
    said = "".join(each.stderr for each in ended)
    assert "No space left on device" in said
    newest = run / "checkpoints" / "iter-000002"
    assert f"the newest checkpoint is {newest}." in said
    assert not list(run.rglob("iter-000003*"))
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    ended = together(2, "--resume", str(run))
    assert [each.returncode for each in ended] == [0, 0], ended
    assert_same(run, tmp_path / "one", 3)
