"""Of several processes one is killed, stopped or stuck: one line says which, all end, and a resume is exact."""

import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.system.launch import Launch
from fastgrpo.system.pulse import PATIENCE, Pulse
from fastgrpo.system.watchdog import Beat, Sign, judge, watching
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


def sign(index: int = 0, silent: float = 0.0, still: float = 0.0, gone: bool = False, **beat: Any) -> Sign:
    return Sign(index, Beat(1, **({"begun": True, "limit": 10.0, "collectives": 5} | beat)), silent, still, gone)


@pytest.mark.parametrize(
    ("signs", "found"),
    [
        ([sign(0), sign(1)], None),
        ([sign(0), sign(1, gone=True)], 1),
        ([sign(0), sign(1, gone=True, begun=False)], 1),
        ([sign(0), sign(1, gone=True, state="done")], None),
        ([sign(0), sign(1, silent=11)], 1),
        ([sign(0), sign(1, silent=9)], None),
        ([sign(0), sign(1, silent=11, limit=20)], None),  # each has a limit of its own
        ([sign(0), sign(1, silent=11, begun=False)], None),  # it loads
        ([sign(0, still=11, waiting=True, collectives=6), sign(1, still=11)], 1),
        ([sign(0, still=99, waiting=True, collectives=6), sign(1, still=9)], None),  # it waits for one that works
        # NCCL's collectives return at once: then the host waits for the device, and seems to work.
        ([sign(0, still=99, collectives=6), sign(1, still=9)], None),
        ([sign(0, still=99, collectives=6), sign(1, still=11)], 1),
        ([sign(0, still=99, waiting=True, collectives=6), sign(1, begun=False, still=99)], None),
        ([sign(0, still=99, waiting=True), sign(1, still=11)], 1),
        ([sign(0, still=12, waiting=True), sign(1, still=11, waiting=True)], 0),  # a network that is down
        ([sign(0, still=99, state="done"), sign(1)], None),
        ([sign(0, state="done"), sign(1, state="done")], None),
    ],
)
def test_who_is_dead(signs: list[Sign], found: int | None) -> None:
    verdict = judge(signs)
    assert (verdict[0] if verdict else None) == found


def test_once_a_collective_has_failed_silence_tells_sooner() -> None:
    signs = [sign(0), sign(1, silent=16, limit=600)]
    assert judge(signs) is None
    assert judge(signs, broken=True) == (1, "has not answered for 16 s, last seen")


def test_a_pulse_leaves_waiting_out_of_its_longest_piece_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fastgrpo.system.pulse.time.monotonic", lambda: now)
    pulse = Pulse()
    now = 1000.0  # loading
    pulse.begin(0)
    now += 3
    pulse.mark()
    with pulse.collective():
        assert pulse.waiting
        now += 500
    now += 2
    with pulse.phase("update"):
        assert (pulse.longest, pulse.phase_name, pulse.waiting) == (3, "update", False)
    assert (pulse.phase_name, pulse.collectives) == ("", 1)


def test_a_pulse_is_patient_until_an_iteration_is_done_and_with_what_takes_long() -> None:
    pulse, patience = Pulse(), []
    for iteration in range(4):
        pulse.begin(iteration)
        patience.append(pulse.patience)
    with pulse.patiently():
        patience.append(pulse.patience)
    assert [*patience, pulse.patience] == [PATIENCE, PATIENCE, 1, 1, PATIENCE, 1]


def test_only_what_fails_in_a_collective_itself_is_asked_about() -> None:
    pulse, asked = Pulse(), []
    pulse.failed = asked.append
    for error in (torch.OutOfMemoryError("here"), RuntimeError("connection closed by peer"), ValueError("a mistake")):
        with pytest.raises(type(error)), pulse.collective():
            raise error
    assert [str(error) for error in asked] == ["connection closed by peer"]


def test_alone_nobody_is_watched() -> None:
    before = threading.active_count()
    for launch, limit in ((Launch(), 120.0), (Launch(0, 2, address="127.0.0.1:9"), 0.0)):
        with watching(launch, limit):
            assert threading.active_count() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "limit", "why"),
    [
        ("1:3:pictures:SIGKILL", "120", "was killed or crashed, last seen in .*"),  # which all are drawing
        ("0:2:checkpoint:SIGSTOP", "2", r"has not answered for \d+ s, last seen in .*"),
        ("1:3:reward:sleep", "5", r"has made no progress for \d+ s in iteration 3 \(reward\)"),
    ],
)
def test_a_dead_process_ends_the_job_with_one_line(
    trouble: str, limit: str, why: str, options: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run, (rank, iteration) = tmp_path / "run", trouble.split(":")[:2]
    flags = ["--run-folder", str(run), "--engine.stuck-after", limit]
    done = torchrun(2, trouble, *options, *flags, module="support.signalled")
    assert done.returncode != 0
    newest = run / "checkpoints" / f"iter-00000{int(iteration) - 1}"
    line = rf"the process of rank {rank} on \S+ {why}: the job ends; the newest checkpoint is {newest}\."
    lines = [line for line in said(done.stderr) if not line.startswith("SIGTERM")]
    assert len(lines) == 1, lines
    assert re.fullmatch(line, lines[0])
    done = torchrun(2, "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_dead_host_of_the_store_ends_the_job_with_one_line(options: list[str], tmp_path: Path) -> None:
    """As where another launcher than torchrun has started the processes."""
    flags = ["--run-folder", str(tmp_path / "run"), "--engine.stuck-after", "60"]
    first, second = by_hand(2, "0:2:update:SIGKILL", *options, *flags, module="support.signalled")
    assert first.wait() == -signal.SIGKILL
    (_, _), (_, err) = first.communicate(), second.communicate()
    assert second.returncode == 1, err
    lines = [line for line in said(err) if not line.startswith("warning: WORLD_SIZE is 2")]
    assert len(lines) == 1, err
    newest = tmp_path / "run" / "checkpoints" / "iter-000001"
    assert lines[0].startswith("the process of rank 0 on ")
    assert " was killed or crashed, last seen in " in lines[0]
    assert lines[0].endswith((f"the newest checkpoint is {newest}.", "there is no checkpoint yet."))


@pytest.mark.slow
def test_torchruns_restart_goes_on_from_the_newest_checkpoint(
    options: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same folder, though it has a name that the first start has made, of the time."""
    flags = ["--engine.stuck-after", "60"]
    argv = ["0:3:update:SIGKILL", *options, *flags]
    done = torchrun(2, *argv, module="support.signalled", restarts=1, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert "resuming after iteration 2 of 3" in done.stdout
    assert len([line for line in said(done.stderr) if "was killed or crashed" in line]) == 1
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_sigterm_to_any_process_saves_and_ends_all(options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--run-folder", str(run)]
    both = by_hand(2, "1:2:reward:SIGTERM", *options, *flags, module="support.signalled")
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [143, 143], errors
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iter-000001", "iter-000002"]
    assert "SIGTERM: finishing this iteration, then saving." in errors[1]
    done = torchrun(2, "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_process_that_fails_by_itself_says_so_alone(options: list[str], tmp_path: Path) -> None:
    flags = ["--run-folder", str(tmp_path / "run")]
    both = by_hand(2, "1:2:reward:fail", *options, *flags, module="support.signalled")
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], errors
    lines = [line for line in said("".join(errors)) if not line.startswith("warning: WORLD_SIZE is 2")]
    newest = tmp_path / "run" / "checkpoints" / "iter-000001"
    assert lines == [f"it fails as asked: Input/output error; the newest checkpoint is {newest}."]
