"""A training whose sinks fail in every way is the training that it would have been without them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import train
from fastgrpo.run.logs import worker
from fastgrpo.run.logs.base import Entry
from fastgrpo.run.logs.registry import SINKS
from fastgrpo.run.metrics import read_metrics
from support.logs import Recorded
from support.training import TIMED

WEIGHTS = "checkpoints/iter-000003/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def untimed(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in each.items() if not name.startswith(TIMED)} for each in records]


@pytest.mark.slow
def test_sinks_cost_no_step_and_change_no_bit_and_a_resumed_run_goes_on(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gate: threading.Event,
) -> None:
    def broken(entry: Entry) -> None:
        raise ConnectionResetError(f"gone at {entry.step}")

    def shut() -> None:
        raise RuntimeError("no such server")

    seen, more = Recorded(where="https://example.org/seen"), Recorded()
    sinks = {"seen": seen, "broken": Recorded(broken), "stuck": Recorded(lambda entry: gate.wait())}
    sinks |= {"shut": Recorded(opening=shut), "more": more}
    for name, sink in sinks.items():
        monkeypatch.setitem(SINKS, name, sink.kind)
    monkeypatch.setattr(worker, "CLOSING", 0.5)
    plain, logged = tmp_path / "plain", tmp_path / "logged"
    argv = [str(config_file), "--iterations", "3", "--eval.every", "2", "--engine.threads", "1"]
    argv += ["--guard.action", "off", "--log.to"]
    assert train.main([*argv, "--run", str(plain)]) == 0
    assert capsys.readouterr().err == ""
    names = ["seen", "broken", "stuck", "shut", "tensorboard"]
    assert train.main([*argv, *names, "--log.name", "tried", "--run", str(logged)]) == 0
    out, err = capsys.readouterr()

    assert (logged / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert untimed(logged) == untimed(plain)
    top = {path.name for path in plain.iterdir()}
    assert {path.name for path in logged.iterdir()} == {*top, "tensorboard"}
    assert seen.steps == [0, 1, 2, 3]
    assert seen.closed == [False]
    (run,) = seen.runs
    assert (run.name, run.folder, run.finished, run.config["iterations"]) == ("tried", logged, 0, 3)
    for entry, record in zip(seen.entries[1:], read_metrics(logged / "metrics.jsonl"), strict=True):
        assert entry.values == {name: record[name] for name in record if name not in ("iteration", "seconds")}
    pictured = [{name: path.name for name, path in entry.pictures.items()} for entry in seen.entries]
    both = {"samples": "after.png", "before_after": "before_after.png"}
    assert pictured == [{"samples": "before.png"}, {}, {"samples": "iter-000002.png"}, both]
    assert all(path.is_file() for entry in seen.entries for path in entry.pictures.values())
    assert "seen      https://example.org/seen" in out
    told = sorted(err.splitlines())
    assert [line.removeprefix("fastgrpo: warning: log.to ") for line in told] == [
        "broken: 4 of 4 iterations are not there; metrics.jsonl has them all.",
        "broken: iteration 0 could not be logged (ConnectionResetError: gone at 0); training goes on.",
        "shut: 4 of 4 iterations are not there; metrics.jsonl has them all.",
        "shut: cannot be opened (RuntimeError: no such server); training goes on, and it is tried again.",
        "stuck: 4 of 4 iterations are not there; metrics.jsonl has them all.",
        "stuck: was not done 0 s after the end; it is left as it is.",
    ]

    assert train.main(["--resume", str(logged), "--iterations", "4", "--log.to", "more"]) == 0
    assert (more.steps, more.runs[0].finished, more.runs[0].name) == ([0, 4], 3, "tried")


@pytest.mark.slow
def test_a_training_that_fails_ends_its_logs_as_failed(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorded()
    monkeypatch.setitem(SINKS, "seen", seen.kind)
    argv = [str(config_file), "--run", str(tmp_path / "run"), "--iterations", "2", "--eval.every", "0"]
    assert train.main([*argv, "--optim.lr", "1e30", "--log.to", "seen"]) == 1
    assert (seen.steps, seen.closed) == ([0], [True])
