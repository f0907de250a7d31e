"""Sinks that raise, block, are slow or cannot be opened: whoever logs does not wait, and is told once."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgrpo.run.logs import worker
from fastgrpo.run.logs.base import Entry, LoggedRun, SinkKind
from fastgrpo.run.logs.registry import SINKS
from fastgrpo.run.logs.secrets import hidden
from fastgrpo.run.logs.worker import Logs
from support.logs import Recorded, a_run, entry

LONG = 30.0  # seconds that something which takes none may take on a busy machine


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CLOSING", LONG)
    monkeypatch.setattr(worker, "RETRIES", (0.01, 0.02))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds up a sink until it is set, at the latest when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def logs_to(folder: Path, **sinks: Recorded) -> Logs:
    return Logs(a_run(folder, *sinks), {name: sink.kind for name, sink in sinks.items()})


def wait_until(holds) -> None:
    until = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.002)


@pytest.mark.parametrize("error", [ConnectionError("no\nroute. Try again"), SystemExit(3), KeyboardInterrupt()])
def test_a_sink_that_raises_costs_its_own_entries_and_is_told_of_once(tmp_path: Path, error: BaseException) -> None:
    def act(entry: Entry) -> None:
        if entry.step in (1, 3):
            raise error

    bad, good = Recorded(act), Recorded()
    logs = logs_to(tmp_path, bad=bad, good=good)
    for step in range(5):
        logs.put(entry(step))
    logs.close()
    assert (bad.steps, good.steps) == ([0, 2, 4], [0, 1, 2, 3, 4])
    assert bad.closed == good.closed == [False]
    raised, lacks = logs.warnings()
    assert raised.startswith(f"log.to bad: iteration 1 could not be logged ({type(error).__name__}: ")
    assert "\n" not in raised
    assert lacks == "log.to bad: 2 of 5 iterations are not there; metrics.jsonl has them all"
    assert logs.warnings() == []


def test_a_sink_that_hangs_holds_nobody_up_and_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    monkeypatch.setattr(worker, "ROOM", 4)
    monkeypatch.setattr(worker, "SILENT", 0.01)
    monkeypatch.setattr(worker, "CLOSING_FAILED", 0.1)
    stuck, good = Recorded(lambda entry: gate.wait()), Recorded()
    logs = logs_to(tmp_path, stuck=stuck, good=good)
    logs.put(entry(0))
    wait_until(lambda: good.steps == [0] and logs._workers[0]._called is not None)
    time.sleep(0.02)
    for step in range(1, 10):
        logs.put(entry(step))  # returns, or the test never ends
        wait_until(lambda step=step: step in good.steps)
    logs.close(failed=True)
    assert stuck.abandoned.is_set()
    assert not good.abandoned.is_set()
    assert (good.closed, stuck.closed) == ([True], [])
    assert logs.warnings() == [
        "log.to stuck: has not answered for 0 s; training goes on",
        "log.to stuck: is too slow: 4 iterations wait, and from now on the oldest are left out",
        "log.to stuck: was not done 0 s after the end; it is left as it is",
        "log.to stuck: 10 of 10 iterations are not there; metrics.jsonl has them all",
    ]
    gate.set()
    wait_until(lambda: stuck.closed)
    assert stuck.steps == [0, 6, 7, 8, 9]  # the one that it hung in, and the newest four


def test_a_slow_sink_gets_everything_in_order(tmp_path: Path) -> None:
    slow = Recorded(lambda entry: time.sleep(0.01))
    logs = logs_to(tmp_path, slow=slow)
    for step in range(20):
        logs.put(entry(step))
    logs.close()
    assert slow.steps == list(range(20))
    assert logs.warnings() == []


def test_a_sink_that_opens_later_gets_what_waited(tmp_path: Path) -> None:
    down = iter([ConnectionError("down"), ConnectionError("still down")])

    def opening() -> None:
        for error in down:
            raise error

    late = Recorded(opening=opening, where="https://example.org/run")
    logs = logs_to(tmp_path, late=late)
    for step in range(3):
        logs.put(entry(step))
    wait_until(lambda: late.steps == [0, 1, 2])
    assert logs.news() == ["late      https://example.org/run"]
    logs.close()
    assert logs.news() == []
    assert logs.warnings() == [
        "log.to late: cannot be opened (ConnectionError: down); training goes on, and it is tried again"
    ]


def test_a_sink_that_never_opens_is_tried_at_the_end_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "RETRIES", (3600.0, 3600.0))
    tries = []

    def opening() -> None:
        tries.append(1)
        raise RuntimeError("no")

    logs = logs_to(tmp_path, shut=Recorded(opening=opening))
    logs.put(entry(0))
    wait_until(lambda: tries)
    logs.close()
    assert len(tries) == 2
    assert logs.warnings()[-1] == "log.to shut: 1 of 1 iterations are not there; metrics.jsonl has them all"


def test_what_a_library_says_is_told_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "a")

    def opening() -> None:
        raise RuntimeError("401 for key 0123456789abcdef at https://me:pw@host/p?api_key=xyz&page=2 a")

    logs = logs_to(tmp_path, shut=Recorded(opening=opening))
    logs.close()
    (told,) = logs.warnings()
    assert "401 for key *** at https://***@host/p?api_key=***&page=2 a" in told
    assert hidden("ghp@host https://host/@x a=1?page=2") == "ghp@host https://host/@x a=1?page=2"


def test_charts_are_read_back_by_tensorboards_own_reader_and_start_again_behind_the_checkpoint(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from support.logs import TABLE

    Image.new("RGB", (5, 3), (0, 200, 0)).save(tmp_path / "grid.png")
    media = {"pictures": {"samples": tmp_path / "grid.png"}, "tables": {"evaluation/shapes/unsafe": TABLE}}
    log = {"tags": ("one", "two"), "name": "tried", "project": "safe"}

    def logged(run: LoggedRun, *entries: Entry) -> None:
        logs = Logs(run, SINKS)
        for each in entries:
            logs.put(each)
        logs.close()
        assert logs.warnings() == []

    run = a_run(tmp_path, "tensorboard", **log)
    logged(run, entry(0, **media), entry(1), entry(2), entry(3))
    logged(a_run(tmp_path, "tensorboard", finished=1, **log), entry(0, **media), Entry(2, {"reward/mean": 7.0}))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("reward/mean") if each.step] == [(1, 0.25), (2, 7.0)]
    (picture,) = read.Images("samples")
    assert (picture.step, picture.width, picture.height) == (0, 5, 3)
    assert picture.encoded_image_string == (tmp_path / "grid.png").read_bytes()
    texts = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    table = texts["evaluation/shapes/unsafe/text_summary"].splitlines()
    assert table[0] == "| Unsafe images, % | before | after |"
    assert table[-1] == r"| overall | – | 1\|2 |"
    assert "| rollout.steps | 50 |" in texts["config/text_summary"].replace("\\", "")
    about = texts["run/text_summary"].replace("\\", "")
    assert all(word in about for word in ("tried", "safe", "one, two", run.version, run.commit))


def test_a_full_disk_costs_charts_and_not_the_training(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    logs = Logs(a_run(tmp_path, "tensorboard"), SINKS)
    logs.put(entry(1))
    logs.close()
    opened, lacks = logs.warnings()
    assert opened.startswith("log.to tensorboard: cannot be opened (")
    assert "1 of 1 iterations are not there" in lacks


def test_a_sink_that_is_let_go_of_is_not_opened_again(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letting go is what ends its call; its thread ends then too, before the program may."""
    monkeypatch.setattr(worker, "CLOSING", 0.05)
    opened: list[str] = []

    def hanging(run: LoggedRun) -> None:
        opened.append(run.name)
        gate.wait()
        raise ConnectionError

    logs = Logs(a_run(tmp_path, "bad"), {"bad": SinkKind(lambda _: None, hanging, abandon=gate.set)})  # type: ignore[arg-type]
    logs.put(entry(1))
    wait_until(lambda: opened)
    logs.close()
    assert not logs._workers[0]._thread.is_alive()
    assert len(opened) == 1
    assert any("1 of 1 iterations are not there" in each for each in logs.warnings())


def test_no_sinks_are_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    logs = Logs(a_run(tmp_path), {"unused": SinkKind(lambda settings: None, pytest.fail)})
    logs.put(entry(0))
    assert threading.active_count() == before
    logs.close()
    assert list(tmp_path.iterdir()) == []
