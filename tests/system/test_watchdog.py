"""Of several processes one is killed, stopped or stuck: one line says which, all end, and a resume is exact."""

import re
import signal
import time
from pathlib import Path

import pytest

from support.processes import by_hand, torchrun

WEIGHTS = "checkpoints/iter-000003/unet/diffusion_pytorch_model.safetensors"
MOMENTS = "checkpoints/iter-000003/trainer/optimizer.safetensors"


@pytest.fixture(scope="module")
def options(config_file: Path) -> list[str]:
    """Of a run of three iterations, each of which is saved."""
    flags = ["--iterations", "3", "--engine.threads", "1", "--checkpoint.every", "1", "--checkpoint.keep", "0"]
    return [str(config_file), *flags, "--eval.every", "0", "--guard.action", "off"]


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("watchdog") / "undisturbed"
    done = torchrun(2, *options, "--run-folder", str(run))
    assert done.returncode == 0, done.stderr
    assert said(done.stderr) == []
    return run


def said(stderr: str) -> list[str]:
    """The lines that are ours."""
    return re.findall(r"^fastgrpo: (.*)$", stderr, flags=re.MULTILINE)


def assert_same_run(run: Path, expected: Path) -> None:
    for name in (WEIGHTS, MOMENTS):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "limit", "why"),
    [
        ("1:2:rollout:SIGKILL", "120", r"was killed or crashed in iteration 2 \(rollout\)"),
        ("0:3:update:SIGKILL", "120", r"was killed or crashed in iteration 3 \(update\)"),
        ("1:3:update:SIGSTOP", "5", r"has not answered for \d+ s in iteration 3 \(update\)"),
        ("0:2:checkpoint:SIGSTOP", "2", r"has not answered for \d+ s in iteration 2 \(checkpoint\)"),
        ("1:3:reward:sleep", "5", r"has made no progress for \d+ s in iteration 3 \(reward\)"),
    ],
)
def test_a_dead_process_ends_the_job_with_one_line(
    trouble: str, limit: str, why: str, options: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run, (rank, iteration) = tmp_path / "run", trouble.split(":")[:2]
    flags = ["--run-folder", str(run), "--engine.stuck-after", limit]
    began = time.monotonic()
    done = torchrun(2, trouble, *options, *flags, module="support.signalled")
    print(f"{time.monotonic() - began:.1f} s\n{done.stderr}")
    assert done.returncode != 0
    newest = run / "checkpoints" / f"iter-00000{int(iteration) - 1}"
    line = rf"the process of rank {rank} on \S+ {why}: the job ends; the newest checkpoint is {newest}\."
    lines = [line for line in said(done.stderr) if not line.startswith("SIGTERM")]
    assert len(lines) == 1, lines
    assert re.fullmatch(line, lines[0])
    done = torchrun(2, "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, undisturbed)
