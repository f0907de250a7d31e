"""The one command for a machine lent for minutes: rehearsed on a clock that stands in, and with real processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import archive
import gpu
import iteration
import processes
import pytest
import rehearsal
import table
from kept import Kept
from stages import RUNS, Run, Stage

from support import ROOT

EVERYWHERE = [
    (name, stage.name, fate) for name, run in RUNS.items() for stage in run.stages for fate in rehearsal.FATES
]


# ---------------------------------------------------------------------------------------------------------------------
# On a clock that stands in


def test_the_time_line_is_as_it_is_to_be(tmp_path: Path) -> None:
    schedule, said = rehearsal.rehearse(RUNS["first"], rehearsal.LentInMind(RUNS["first"]), tmp_path)
    ended = {outcome.stage: outcome.ended for outcome in schedule.outcomes}
    assert not [outcome for outcome in schedule.outcomes if outcome.failed], said
    assert ended["graphs"] <= 195, "its row by 3:15"
    assert ended["plain"] <= 240, "by 4:00"
    assert ended["kernels"] <= 540, "at most nine minutes"
    stages = {stage.name: stage for stage in RUNS["first"].stages}
    assert (stages["smoke"].cap, stages["compiled"].cap) == (45, 240)
    # Even where each takes all that it may, the compiled iteration has its time.
    assert stages["compiled"].by - stages["plain"].by >= stages["compiled"].cap
    schedule, _ = rehearsal.rehearse(RUNS["second"], rehearsal.LentInMind(RUNS["second"]), tmp_path / "second")
    assert not [outcome for outcome in schedule.outcomes if outcome.failed]


@pytest.mark.parametrize(("name", "stage", "fate"), EVERYWHERE, ids=lambda value: str(value))
def test_whatever_happens_to_a_stage_the_others_run_and_what_was_said_is_kept(
    name: str, stage: str, fate: str, tmp_path: Path
) -> None:
    run = RUNS[name]
    machine = rehearsal.LentInMind(run, {stage: fate})
    schedule, said = rehearsal.rehearse(run, machine, tmp_path)
    assert not rehearsal.missed(schedule)
    logs = {path.stem: path.read_bytes() for path in schedule.work.glob("*.log")}
    kept = archive.unpack(schedule.target)
    assert {f"{log}.log" for log in logs} <= set(kept)
    assert all(kept[f"{log}.log"] == content[-archive.MOST :] for log, content in logs.items())
    outcomes = {outcome.stage: outcome for outcome in schedule.outcomes}
    watcher = next(each for each in run.stages if each.name == stage).watcher
    fails = fate != "slow" and not watcher and stage != "eager"
    assert bool(outcomes[stage].failed) or not fails, said
    assert f"{stage:9}" in kept["summary.txt"].decode()
    assert all(math.isfinite(outcome.ended) for outcome in schedule.outcomes if not rehearsal.spared(outcome))


def test_an_iteration_without_graphs_stands_in_for_one_that_failed(tmp_path: Path) -> None:
    run = RUNS["first"]
    schedule, _ = rehearsal.rehearse(run, rehearsal.LentInMind(run), tmp_path / "well")
    outcomes = {outcome.stage: outcome for outcome in schedule.outcomes}
    assert (outcomes["eager"].result, outcomes["eager"].failed) == ("not needed", False)
    schedule, _ = rehearsal.rehearse(run, rehearsal.LentInMind(run, {"graphs": "fails"}), tmp_path / "failed")
    outcomes = {outcome.stage: outcome for outcome in schedule.outcomes}
    assert outcomes["eager"].failed is False
    assert outcomes["graphs"].ended <= outcomes["eager"].began < outcomes["eager"].ended <= 215


@pytest.mark.parametrize("when", [1.0, 44.0, 75.0, 200.0, 262.0, 495.0])
def test_where_the_run_itself_is_killed_all_but_half_a_minute_is_kept(when: float, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.Schedule, "_close", lambda schedule: None)  # nothing of a killed process runs any more
    run = RUNS["first"]
    schedule, said = rehearsal.rehearse(run, rehearsal.LentInMind(run, dies=when), tmp_path)
    assert said[-1].endswith("killed")
    kept = rehearsal.kept(schedule)
    assert set(kept) >= {outcome.stage for outcome in schedule.outcomes if outcome.began < when - gpu.EVERY - 1}
    for name, last in kept.items():
        whole = (schedule.work / f"{name}.log").read_text().split("\n")[-2]
        assert last >= float(whole.split()[0]) - gpu.EVERY - rehearsal.LINE
    assert not list(tmp_path.glob("*.part"))


def test_a_run_of_other_seconds_is_the_same_run_in_small(tmp_path: Path) -> None:
    schedule, _ = rehearsal.rehearse(
        RUNS["first"], rehearsal.LentInMind(RUNS["first"], scale=0.5), tmp_path, seconds=270
    )
    assert not [outcome for outcome in schedule.outcomes if outcome.failed]
    assert schedule.machine.now() <= 270


def test_a_stop_ends_the_run_at_once(tmp_path: Path) -> None:
    machine = rehearsal.LentInMind(RUNS["first"])
    sleep = machine.sleep

    def until_stopped(seconds: float) -> None:
        sleep(seconds)
        machine.stopped = "SIGTERM" if machine.now() >= 100 else ""

    machine.sleep = until_stopped
    schedule, _ = rehearsal.rehearse(RUNS["first"], machine, tmp_path)
    assert machine.now() <= 101
    outcomes = {outcome.stage: outcome for outcome in schedule.outcomes}
    assert outcomes["graphs"].result == "FAILED: SIGTERM"
    assert outcomes["plain"].result == "not begun: SIGTERM"
    assert "FAILED: SIGTERM" in archive.unpack(schedule.target)["summary.txt"].decode()


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    pack = archive.pack

    def full_at_first(folder: Path, target: Path) -> None:
        if schedule_now() < 400:
            raise OSError(28, "No space left on device")
        pack(folder, target)

    machine = rehearsal.LentInMind(RUNS["first"])
    schedule_now = machine.now
    monkeypatch.setattr(archive, "pack", full_at_first)
    schedule, said = rehearsal.rehearse(RUNS["first"], machine, tmp_path)
    assert any("No space left" in line for line in said)
    assert not rehearsal.missed(schedule)


# ---------------------------------------------------------------------------------------------------------------------
# With real processes

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid)
time.sleep(600)
"""


def stage(name: str, program: str, by: float, **fields: object) -> Stage:
    return Stage(name, (sys.executable, "-c", program), expected=1, by=by, least=0.1, **fields)


def alive(number: int) -> bool:
    """A process that is dead and not asked about yet has no command line."""
    try:
        return bool(Path(f"/proc/{number}/cmdline").read_bytes())
    except OSError:
        return False


def test_processes_are_stopped_with_all_that_they_started_and_the_next_one_runs(tmp_path: Path, monkeypatch) -> None:
    """One does not mind SIGINT and has a child in a session of its own, one says where it was."""
    grace = 1.0
    monkeypatch.setattr(gpu, "GRACE", grace)
    run = Run(
        "test",
        30.0,
        (
            stage("watches", "import time; time.sleep(600)", math.inf, background=True, watcher=True),
            stage("missing", "pass", 20),
            stage("stubborn", STUBBORN, grace + 2.0),
            stage("asked", "import time\nprint('as far as this')\ntime.sleep(600)", 28, cap=grace + 2.0),
            stage("fine", "print('fine')", 28),
        ),
    )
    run = replace(
        run, stages=tuple(replace(s, command=("no-such-program",)) if s.name == "missing" else s for s in run.stages)
    )
    machine = processes.Machine(tmp_path)
    work, said = tmp_path / "work", []
    work.mkdir()
    schedule = gpu.Schedule(run, machine, work, tmp_path / "out" / "results.tar.gz", said.append)
    outcomes = {outcome.stage: outcome for outcome in schedule.run()}
    assert outcomes["fine"].result == "fine", said
    assert outcomes["missing"].result.startswith("FAILED to start")
    assert outcomes["stubborn"].result.startswith("FAILED: its time was up")
    assert outcomes["asked"].result == "FAILED: its time was up; last line: as far as this"
    files = archive.unpack(tmp_path / "out" / "results.tar.gz")
    assert b"as far as this" in files["asked.log"]
    assert b"KeyboardInterrupt" in files["asked.log"], "where it was"
    assert not alive(int(files["stubborn.log"].split()[0]))
    assert outcomes["asked"].ended - outcomes["asked"].began < grace + 2.0, "it ended when it was asked to"
    assert outcomes["watches"].failed is False


def test_what_a_killed_run_left_behind_is_killed_and_nothing_else() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    owners = {"left": gone.pid, "running": os.getpid()}
    found = {
        name: subprocess.Popen(sleeper, env=os.environ | {processes.MARK: f"smoke-{owner}-1"}, start_new_session=True)
        for name, owner in owners.items()
    }
    try:
        time.sleep(0.1)
        processes.kill_left_behind()
        assert found["left"].wait(timeout=10) == -signal.SIGKILL
        assert found["running"].poll() is None
    finally:
        for process in found.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_whole_archive_even_if_nobody_reads_the_output(number: int, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu, stages
gpu.ROOT = Path({str(tmp_path)!r})
gpu._device = lambda: "Some GPU, 1"
talks = "import time\\nprint('said')\\nprint('x' * 5_000_000, flush=True)\\ntime.sleep(600)"
run = stages.Run("test", 60.0, (stages.Stage("talks", (sys.executable, "-c", talks), 1, by=50),))
gpu.RUNS["first"] = run
gpu.table.tables = lambda work: ["y" * 1_000_000]  # more than a pipe holds
gpu.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, "--out", tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        log = tmp_path / "build" / "gpu" / "first" / "talks.log"
        end = time.monotonic() + 60
        while time.monotonic() < end and not (log.exists() and log.stat().st_size > 5_000_000):
            time.sleep(0.05)
        running.send_signal(number)
        assert running.wait(timeout=30) == 1
    (made,) = (tmp_path / "out").iterdir()
    files = archive.unpack(made)
    assert f"FAILED: {signal.Signals(number).name}" in files["summary.txt"].decode()
    assert len(files["talks.log"]) == archive.MOST, "its end"
    assert json.loads(files["about.json"])["device"] == "Some GPU, 1"


def test_without_a_device_the_command_says_what_can_be_done(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "nvidia-smi shows no device here; `python bench/gpu.py --rehearse` needs none.\n"
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu.py", "--stages", "graph"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "--stages: graph is none of this run; accepted are clocks, wheels" in done.stderr


def test_the_rehearsal_shows_the_time_line() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu.py", "--rehearse", "--run", "second"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0:04  tests begins" in done.stdout
    assert done.stdout.endswith("Nothing was lost.\n")


def test_every_stage_runs_something_that_is_there() -> None:
    for run in RUNS.values():
        for each in run.stages:
            words = each.words(Path("work"), Path("site"), None, 100.0)
            assert not [word for word in words if "{" in word]
            files = [word.partition("::")[0] for word in words if word.startswith("bench/")]
            assert all((ROOT / file).is_file() for file in files)
    smoke = next(each for each in RUNS["first"].stages if each.name == "smoke")
    assert "bench/test_kernels.py::test_right" in smoke.command


# ---------------------------------------------------------------------------------------------------------------------
# What an iteration writes


def test_an_iteration_writes_each_stage_as_it_ends(tmp_path: Path, capsys) -> None:
    now = [100.0]
    path = tmp_path / "step.json"
    journal = iteration.Journal(Kept(path, benchmark="step"), "fastgrpo", clock=lambda: now[0], began=90.0)
    with journal.timed("choosing"):
        now[0] += 5
    with journal.bar("rollout") as bar:
        now[0] += 10
        bar.reach(1, 4)
        bar.reach(2, 4)  # no second line within seconds
    now[0] += 2  # the device catches up
    assert "rollout" not in json.loads(path.read_text()).get("reached", {})
    with journal.bar("update"):
        assert json.loads(path.read_text())["reached"] == {"fastgrpo": {"rollout": 12.0}}
    said = json.loads(path.read_text())["said"]["fastgrpo"]
    assert said == [[15.0, "choosing took 5.0 s"], [25.0, "rollout: 1 of 4"], [27.0, "rollout took 12.00 s"]]
    assert capsys.readouterr().out.splitlines()[0] == "  15.0 s  choosing took 5.0 s"
    # The next training goes on in the same file.
    Kept(path, goes_on=True, benchmark="step").add(name="plain")
    content = json.loads(path.read_text())
    assert content["reached"] == {"fastgrpo": {"rollout": 12.0}}
    assert content["rows"] == [{"name": "plain"}]


def test_the_parts_of_a_start_are_there_to_be_timed(tmp_path: Path) -> None:
    journal = iteration.Journal(Kept(None), "fastgrpo", began=time.monotonic())
    with iteration.watched(journal):
        pass
    assert 0 <= iteration.age() < 10 * 3600


# ---------------------------------------------------------------------------------------------------------------------
# From the archive to the README


def test_an_archive_is_unpacked_to_where_the_readme_is_made_from(tmp_path: Path) -> None:
    work, results = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    about = {"run": "first", "device": "NVIDIA H200, 580.1, 9.0, 143771 MiB", "date": "2030-01-02T03:04:05+00:00"}
    for name, content in {"about.json": json.dumps(about), "step.json": "{}", "graphs.log": "said"}.items():
        (work / name).write_text(content)
    (work / "half.part").write_text("not whole")
    archive.pack(work, tmp_path / "results-first.tar.gz")
    assert table.keep(tmp_path / "results-first.tar.gz", results) == results / "2030-01-02-NVIDIA-H200"
    found = sorted(path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file())
    folder = "2030-01-02-NVIDIA-H200"
    assert found == [f"{folder}/first/about.json", f"{folder}/first/graphs.log", f"{folder}/step.json"]


def test_an_archive_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    work, target = tmp_path / "work", tmp_path / "results.tar.gz"
    work.mkdir()
    for name in ("one.log", "two.log"):
        (work / name).write_text(name)
    archive.pack(work, target)
    add = archive.tarfile.TarFile.addfile

    def broken(tar: object, entry: object, content: object) -> None:
        if entry.name == "two.log":
            raise OSError(28, "No space left on device")
        add(tar, entry, content)

    monkeypatch.setattr(archive.tarfile.TarFile, "addfile", broken)
    with pytest.raises(OSError, match="No space left"):
        archive.pack(work, target)
    assert archive.unpack(target) == {"one.log": b"one.log", "two.log": b"two.log"}


def test_half_of_a_measurement_does_not_hide_the_rest(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text('{"benchmark": "step"')
    (tmp_path / "kernels.json").write_text('{"rows": []}')
    first, second = table.tables(tmp_path)
    assert first.startswith("step.json: no table of it: JSONDecodeError")
    assert second.startswith("kernels.json: no table of it: KeyError")
