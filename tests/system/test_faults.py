"""Processes killed at random moments under torchrun, which starts them again: what is learned stays the same.

`pytest tests/system/test_faults.py --faults 20` kills twenty times; without the option it is once, and a full disk is
left out.
"""

import subprocess
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


def test_killed_at_random_moments_a_training_comes_to_the_same_end(
    config_file: Path, tmp_path: Path, faults: int
) -> None:
    """In the same folder, though it has a name that the first start has made, of the time."""
    kills, processes = faults or 1, 2 + (faults > 1)
    # No start comes further than one iteration and a half: there is something left for each.
    iterations = kills + 2
    given = [*options(config_file, iterations), "--prompts-per-iteration", str(processes)]
    counted = tmp_path / "counted"
    ended = together(processes, "0", "0", "1", str(counted), *given, "--run", str(tmp_path / "one"), main=killed.main)
    assert [each.returncode for each in ended] == [0] * processes, ended
    marks = [int(line.split()[2]) for line in counted.read_text().splitlines() if line.startswith("marks")]
    most = round(1.5 * min(marks) / iterations)

    log = tmp_path / "log"
    argv = ["1", str(kills), str(most), str(log), *given]
    done = torchrun(processes, *argv, module="support.killed", restarts=kills, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert_same(run, tmp_path / "one", iterations)
    lines = [line.split() for line in log.read_text().splitlines()]
    killed_at = [float(when) for what, _, when in lines if what == "kill"]
    assert len(killed_at) == kills
    starts = [float(when) for what, _, when in lines if what == "start"]
    for each in killed_at:
        # torchrun ends what is left and starts Python again: some seconds, on a busy machine some more.
        assert min(start for start in starts if start > each) - each < STUCK_AFTER + 30


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
    subprocess.run(["mount", "-o", f"remount,size={int(2.5 * size)}", disk], check=True)
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
