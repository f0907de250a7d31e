"""A training that is killed or stopped at any moment, and resumed, ends as one that nothing disturbed."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastgrpo.run.metrics import read_metrics
from fastgrpo.system.files import file_sha256
from support.training import ITERATIONS, assert_same_run, run_here, start

pytestmark = pytest.mark.slow


def wait_for_lines(process: multiprocessing.Process, run: Path, count: int) -> None:
    while process.is_alive() and len(read_metrics(run / "metrics.jsonl")) < count:
        time.sleep(0.005)


def finish(argv: Sequence[str], output: Path) -> None:
    process = start(argv, output)
    process.join()
    assert process.exitcode == 0, output.read_text()


@pytest.mark.slow(30)
def test_kill_at_three_random_moments_and_resume(config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    run, output = tmp_path / "killed", tmp_path / "killed.txt"
    records = read_metrics(undisturbed / "metrics.jsonl")
    iteration_seconds = (records[-1]["seconds"] - records[0]["seconds"]) / (ITERATIONS - 1)
    # At least three iterations and the last examination are left: the process is alive when the signal comes.
    for lines in sorted(moments.choices(range(ITERATIONS - 3), k=3)):
        fresh = not (run / "config.toml").exists()
        process = start([str(config_file), "--run", str(run)] if fresh else ["--resume", str(run)], output)
        wait_for_lines(process, run, lines)
        time.sleep(moments.uniform(0, iteration_seconds))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, output.read_text()
    fresh = not (run / "config.toml").exists()
    finish([str(config_file), "--run", str(run)] if fresh else ["--resume", str(run)], output)
    assert_same_run(run, undisturbed)


def test_sigterm_saves_says_how_to_go_on_and_exits_143(config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "stopped", tmp_path / "stopped.txt"
    process = start([str(config_file), "--run", str(run)], output)
    wait_for_lines(process, run, 1)
    process.terminate()
    process.join()
    assert process.exitcode == 143, output.read_text()
    finished = len(read_metrics(run / "metrics.jsonl"))
    assert 1 <= finished < ITERATIONS
    assert (run / "checkpoints" / f"iter-{finished:06d}" / "manifest.json").is_file()
    assert "SIGTERM: finishing this iteration, then saving." in output.read_text()
    advice = f"Stopped after {finished} iterations. To go on: python -m fastgrpo.train --resume {run}"
    assert advice in output.read_text().splitlines()
    finish(["--resume", str(run)], output)
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_before_the_first_iteration_a_signal_stops_at_once(
    number: signal.Signals,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the first examination, which takes minutes with a large model, begins."""
    before = signal.getsignal(number)

    def signalled(*_: object) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    monkeypatch.setattr("fastgrpo.training.RunRecorder", signalled)
    code, _, err = run_here([str(config_file), "--run", str(tmp_path / "run")], capsys)
    assert (code, err) == (128 + number, "fastgrpo: stopped; no iteration was begun.\n")
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run").exists()


def test_resuming_goes_on_from_the_newest_good_checkpoint(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one newer checkpoint a bit is another, in one a file is cut short, and one has no manifest."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    six, seven, eight, nine = (run / "checkpoints" / f"iter-00000{number}" for number in (6, 7, 8, 9))
    for stand_in in (seven, nine):  # as if more had been saved; what they hold beyond the damage is not to be read
        shutil.copytree(eight, stand_in)
    weights, moments = "unet/diffusion_pytorch_model.safetensors", "trainer/optimizer.safetensors"
    flipped = bytearray((seven / moments).read_bytes())
    flipped[-1] ^= 1
    (seven / moments).write_bytes(flipped)
    (eight / weights).write_bytes((eight / weights).read_bytes()[:-1])
    (nine / "manifest.json").unlink()
    spoilt = {folder.name: digests(folder) for folder in (seven, eight, nine)}

    code, out, err = run_here(["--resume", str(run)], capsys)
    assert code == 0, err
    (warning,) = (line for line in err.splitlines() if "the run goes on from" in line)
    for words in (f"{seven / moments} is damaged", f"{eight / weights} is damaged", f"{nine / 'manifest.json'} is "):
        assert words in warning
    assert f"the run goes on from {six};" in warning
    assert f"resuming after iteration 6 of {ITERATIONS}" in out.splitlines()
    assert_same_run(run, undisturbed)
    kept = {folder.name for folder in (run / "checkpoints").iterdir()}
    assert kept == {six.name, eight.name, *(f"damaged-{name}" for name in spoilt)}
    assert {name: digests(run / "checkpoints" / f"damaged-{name}") for name in spoilt} == spoilt


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}
