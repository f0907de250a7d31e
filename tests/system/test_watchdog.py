"""Of several processes one is killed, stopped or stuck: one line says which, all end, and a resume is exact."""

import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.system.launch import Launch
from fastgrpo.system.pulse import PATIENCE, Pulse
from fastgrpo.system.watchdog import Beat, Sign, judge, watching
from support import signalled
from support.processes import Ended, together

WEIGHTS = "checkpoints/iter-000007/unet/diffusion_pytorch_model.safetensors"
MOMENTS = "checkpoints/iter-000007/trainer/optimizer.safetensors"


@pytest.fixture(scope="module")
def options(config_file: Path) -> list[str]:
    """Of a run of seven iterations, each of which is saved."""
    flags = ["--iterations", "7", "--engine.threads", "1", "--checkpoint.every", "1", "--checkpoint.keep", "0"]
    return [str(config_file), *flags, "--eval.every", "0", "--guard.action", "off"]


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("watchdog") / "undisturbed"
    both = together(2, *options, "--run-folder", str(run))
    assert_finished(both)
    assert said(both) == []
    return run


def said(processes: Sequence[Ended]) -> list[str]:
    """The lines that are ours, but for the one of who waits without torchrun."""
    lines = re.findall(r"^fastgrpo: (.*)$", "".join(each.stderr for each in processes), flags=re.MULTILINE)
    return [line for line in lines if not line.startswith("warning: WORLD_SIZE is ")]


def assert_finished(processes: Sequence[Ended]) -> None:
    assert [each.returncode for each in processes] == [0] * len(processes), processes


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


@pytest.mark.slow(30)
def test_dead_processes_end_the_job_with_one_line(options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Three starts of one run, each with a trouble of its own, and a last one that comes to the end.

    Once the second process is at an update, the first has saved the iteration before.
    """
    run = tmp_path / "run"
    troubles = [
        ("1:2:update:SIGKILL", "120", 1, "was killed or crashed, last seen in .*"),
        ("0:2:checkpoint:SIGSTOP", "5", 1, r"has not answered for \d+ s, last seen in .*"),
        ("1:3:update:sleep", "5", 2, r"has made no progress for \d+ s in iteration 3 \(update\)"),
    ]
    start = [*options, "--run-folder", str(run)]
    for trouble, limit, finished, why in troubles:
        both = together(2, trouble, *start, "--engine.stuck-after", limit, main=signalled.main)
        start = ["--resume", str(run)]
        assert 0 not in [each.returncode for each in both], trouble
        newest = run / "checkpoints" / f"iter-00000{finished}"
        rank = trouble[0]
        line = rf"the process of rank {rank} on \S+ {why}: the job ends; the newest checkpoint is {newest}\."
        lines = said(both)
        assert len(lines) == 1, lines
        assert re.fullmatch(line, lines[0]), lines[0]
    assert_finished(together(2, *start))
    assert_same_run(run, undisturbed)


@pytest.mark.slow(15)
def test_a_dead_host_of_the_store_ends_the_job_with_one_line(options: list[str], tmp_path: Path) -> None:
    """As where another launcher than torchrun has started the processes."""
    flags = ["--run-folder", str(tmp_path / "run"), "--engine.stuck-after", "60"]
    both = together(2, "0:2:update:SIGKILL", *options, *flags, main=signalled.main, agent=False)
    assert [each.returncode for each in both] == [-signal.SIGKILL, 1], both
    (line,) = said(both)
    newest = tmp_path / "run" / "checkpoints" / "iter-000001"
    assert line.startswith("the process of rank 0 on ")
    assert " was killed or crashed, last seen in " in line
    assert line.endswith((f"the newest checkpoint is {newest}.", "there is no checkpoint yet."))


@pytest.mark.slow(10)
def test_sigterm_to_any_process_in_any_phase_saves_and_ends_all(
    options: list[str], undisturbed: Path, tmp_path: Path, faults: int
) -> None:
    """With --faults in all phases. Each start goes on where the one before has saved.

    A signal that comes while a checkpoint is written finds its iteration finished: the next one is the last.
    """
    run = tmp_path / "run"
    phases = {"1:1:reward": 1, "0:2:checkpoint": 3}
    phases |= {"0:4:rollout": 4, "0:5:evaluation": 5, "1:6:update": 6} if faults else {}
    start = [*options, "--run-folder", str(run), "--eval.every", "5"]
    for phase, finished in phases.items():
        both = together(2, f"{phase}:SIGTERM", *start, main=signalled.main)
        start = ["--resume", str(run)]
        assert [each.returncode for each in both] == [143, 143], (phase, both)
        assert sorted(path.name for path in (run / "checkpoints").glob("iter-*"))[-1] == f"iter-00000{finished}", phase
        assert "SIGTERM: finishing this iteration, then saving." in both[int(phase[0])].stderr
    assert_finished(together(2, *start))
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_process_that_fails_by_itself_says_so_alone(options: list[str], tmp_path: Path) -> None:
    flags = ["--run-folder", str(tmp_path / "run")]
    both = together(2, "1:2:update:fail", *options, *flags, main=signalled.main, agent=False)
    assert [each.returncode for each in both] == [1, 1], both
    newest = tmp_path / "run" / "checkpoints" / "iter-000001"
    assert said(both) == [f"it fails as asked: Input/output error; the newest checkpoint is {newest}."]
