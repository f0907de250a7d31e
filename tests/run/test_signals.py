"""Signals that ask a training to stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastgrpo import train
from fastgrpo.run.folder import StopSignal
from support.training import SERVER

pytestmark = pytest.mark.slow


@contextmanager
def training(processes: int = 1) -> Iterator[StopSignal]:
    """As while iterations are made."""
    with StopSignal(processes) as stop:
        stop.begin_iterations()
        yield stop


def _stop_twice() -> None:
    with training():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # not reached


def test_a_second_signal_stops_at_once() -> None:
    process = SERVER.Process(target=_stop_twice)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_slurms_warning_ask_for_a_stop_however_often(number: signal.Signals) -> None:
    with training() as stop:
        for _ in range(3):  # a shell and the system each tell of one lost terminal
            os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # which then is the first of those that end the process
        assert stop.exit_code == 128 + number


def test_of_several_processes_none_ends_at_a_second_signal() -> None:
    with training(processes=2) as stop:
        os.kill(os.getpid(), signal.SIGINT)  # of the terminal
        os.kill(os.getpid(), signal.SIGINT)  # of torchrun, which was told as well
        assert stop.exit_code == 130


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with training() as stop:
            os.kill(os.getpid(), number)
            assert not stop.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_the_handler_says_nothing_where_nobody_reads_it() -> None:
    read, write = os.pipe()
    os.close(read)
    standard_error = os.dup(2)
    os.dup2(write, 2)
    try:
        with training() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
    finally:
        os.dup2(standard_error, 2)
        for descriptor in (standard_error, write):
            os.close(descriptor)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with training() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_in_a_thread_leaves_signals_to_the_program(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, codes = signal.getsignal(signal.SIGTERM), []
    argv = [str(config_file), "--run", str(tmp_path / "run"), "--iterations", "1", "--eval.every", "0"]
    thread = threading.Thread(target=lambda: codes.append(train.main(argv)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "signals are handled in a program's main thread, and this is another" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "run" / "checkpoints" / "iter-000001" / "manifest.json").is_file()
