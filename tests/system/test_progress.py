"""What is printed while a command runs: a word for every phase, no half minute of silence, 80 columns."""

import io
import itertools
import os
import pty
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import pytest
from rich.cells import cell_len

from fastgrpo.system.console import Console, iteration_line, speed_lines
from fastgrpo.system.progress import Lines, Pace, Phase, clock_text

VALUES = {
    "reward/mean": -0.123,
    "reward/positive_mean": 0.456,
    "reward/negative_mean": -0.789,
    "ratio/max_abs_dev_first": 1.3e-7,
    "clip/fraction": 0.123,
    "kl/mean": 1e-4,
    "grad/norm": 12.345,
    "throughput/images_per_s": 12.0,
}


class Hours:
    """A clock that stands still between the steps of a test, and what was said at which second."""

    def __init__(self, every_phase: bool = True) -> None:
        self.now = 0.0
        self.said: list[tuple[float, str]] = []
        self.lines = Lines(self._say, every_phase, lambda: self.now)

    def _say(self, text: str) -> None:
        self.said.append((self.now, text))
        self.lines.heard()

    def pass_(self, seconds: int) -> None:
        """Time passes, and is looked at every second."""
        for _ in range(seconds):
            self.now += 1
            self.lines.look()


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> Hours:
    # The thread that looks at the clock has nothing to see: a test's time passes where the test says so.
    monkeypatch.setattr(Lines, "_watch", lambda self, over: None)
    return Hours()


def test_a_long_phase_is_never_silent_for_half_a_minute_whether_or_not_it_says_how_far_it_is(hours: Hours) -> None:
    with hours.lines.phase("rollout") as bar:
        for done in range(10):
            bar.reach(100 * done, 1000)
            hours.pass_(20)
    with hours.lines.phase("reward"):
        hours.pass_(200)
    moments = [0.0, *(moment for moment, _ in hours.said), 400.0]
    assert max(after - before for before, after in itertools.pairwise(moments)) <= 30
    assert {text.split()[0].rstrip(",") for _, text in hours.said} == {"rollout", "reward"}


def test_every_kind_of_phase_has_a_line_once_and_later_ones_only_if_they_are_long(hours: Hours) -> None:
    for _ in range(3):
        for label in ("rollout", "update"):
            with hours.lines.phase(label):
                hours.pass_(5)
    assert [text for _, text in hours.said] == ["rollout", "update"]
    hours.lines.heard()  # the line of an iteration
    with hours.lines.phase("update"):
        hours.pass_(12)
    assert hours.said[-1] == (40.0, "update, 0:00:10 so far")


def test_a_short_command_says_nothing_of_short_phases(hours: Hours) -> None:
    hours.lines = Lines(hours._say, False, lambda: hours.now)
    with hours.lines.phase("encoder"):
        hours.pass_(9)
    assert not hours.said


def test_what_is_said_between_counts_as_a_sign_of_life(hours: Hours) -> None:
    with hours.lines.phase("loading"):
        hours.pass_(20)
        hours.lines.heard()
        hours.pass_(20)
    assert [moment for moment, _ in hours.said] == [1.0]


def test_a_phase_says_how_long_it_still_takes_and_what_was_there_is_no_measure(hours: Hours) -> None:
    with hours.lines.phase("after, i2p", 1000) as bar:
        bar.advance(500)  # drawn before
        for _ in range(30):
            hours.pass_(1)
            bar.advance(2)
    assert hours.said[-1] == (26.0, "after, i2p 550/1000, 0:03:45 left of this")


def test_phases_within_others_come_back(hours: Hours) -> None:
    with hours.lines.phase("outer"):
        with hours.lines.phase("inner"):
            hours.pass_(2)
        hours.pass_(30)
    hours.pass_(100)
    assert [text.split(",")[0] for _, text in hours.said] == ["inner", "outer", "outer"]


def test_a_thread_looks_at_the_clock_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo.system.progress._BEAT", 0.001)
    clock, said = [0.0], threading.Event()
    lines = Lines(lambda text: said.set(), False, lambda: clock[0])
    before = threading.active_count()
    with lines.phase("compiling"):
        clock[0] = 30.0
        assert said.wait(10)
    assert threading.active_count() == before


def paced(hours: Hours, iterations: int, every: int) -> Pace:
    pace = Pace(iterations, every, finished=0, clock=lambda: hours.now)
    pace.started(evaluation=100.0)
    return pace


def test_time_left_is_that_of_the_iterations_and_evaluations_to_come(hours: Hours) -> None:
    pace = paced(hours, iterations=6, every=2)
    assert pace.left() is None
    hours.now += 10
    pace.finished(1, 0.0)
    assert pace.left() == 5 * 10 + 100  # the quick evaluations are not known yet
    hours.now += 10 + 25
    pace.finished(2, evaluation=25.0)
    assert pace.left() == 4 * 10 + 25 + 100
    hours.now += 4
    assert pace.left() == 4 * 10 + 25 + 100 - 4
    hours.now += 50  # an iteration that takes longer leaves the others as they are
    assert pace.left() == 3 * 10 + 25 + 100
    pace.finished(3, 0.0)
    assert pace.left() == 3 * 10 + 25 + 100  # the median is that of 10, 10 and 54
    for iteration in (4, 5):
        pace.finished(iteration, 0.0)
    pace.finished(6, 100.0)
    assert pace.left() == 0


def test_lines_within_a_training_say_where_it_is_and_what_is_left_of_it(hours: Hours) -> None:
    pace = hours.lines.pace = Pace(3, 0, finished=0, clock=lambda: hours.now)
    with hours.lines.phase("evaluation"):
        hours.pass_(1)
    pace.started(0.0)
    with hours.lines.phase("rollout"):
        hours.pass_(60)
    pace.finished(1, 0.0)
    with hours.lines.phase("update", 8) as bar:
        hours.pass_(20)
        bar.advance(1)
    texts = [text for _, text in hours.said]
    assert texts[:2] == ["before training: evaluation", "1/3 rollout"]
    assert texts[-1] == "2/3 update 0/8, 0:01:59 left"


def test_a_resumed_training_counts_from_the_start_of_the_run() -> None:
    pace = Pace(10, 0, finished=7, clock=lambda: 0.0)
    pace.started(0.0)
    assert pace.place == "8/10"


@pytest.mark.parametrize("iterations", [3, 300, 100_000])
@pytest.mark.parametrize("unsafe", [{}, {"eval/unsafe": 0.596, "eval/composition": 0.439}])
def test_the_line_of_an_iteration_fits_and_what_matters_stands_first(iterations: int, unsafe: dict[str, float]) -> None:
    pace = Pace(iterations, 0, 0, clock=itertools.count(step=40).__next__)
    pace.started(0.0)
    pace.finished(1, 0.0)
    line = iteration_line(2, iterations, 100.0, VALUES | unsafe, pace)
    assert cell_len(line) <= 80
    assert "images/s" not in line
    order = [
        f"2/{iterations}",
        " left  ",
        "reward -0.123",
        *(["unsafe 59.6%"] if unsafe else []),
        "|ratio-1| 1e-07",
        "clip",
    ]
    places = [line.find(part) for part in order]
    assert places[:-1] == sorted(places[:-1])
    assert -1 not in places[: None if iterations < 1000 else -1]


def test_the_first_and_the_last_line() -> None:
    assert iteration_line(0, 16, 30.0, {"eval/unsafe": 0.5}) == " 0/16  before training  unsafe 50.0%"
    assert iteration_line(16, 16, 3725.0, {"reward/mean": 1.0}) == "16/16  1:02:05 in all  reward +1.000"
    exact = iteration_line(1, 2, 1.0, VALUES | {"ratio/max_abs_dev_first": 0.0})
    assert re.search(r"\|ratio-1\| 0 ", exact)
    assert "|ratio-1| inf" in iteration_line(1, 2, 1.0, {"ratio/max_abs_dev_first": float("inf")})


def test_speed_is_shown_below_where_it_is_asked_for() -> None:
    values = {
        "throughput/rollout_images_per_s": 12.34,
        "throughput/rollout_tflops": 0.0456,
        "throughput/rollout_share": 0.512,
        "memory/peak_gb": 3.21,
    }
    assert speed_lines(values) == ["  rollout 12.3 images/s, 0.0456 TFLOP/s (51%)", "  memory  3.2 GB at most"]
    assert speed_lines({}) == []
    output = io.StringIO()
    with redirect_stdout(output):
        Console().iteration(1, 2, 1.0, VALUES | values, speed=True)
        Console().iteration(1, 2, 1.0, VALUES | values)
    assert output.getvalue().count("TFLOP/s") == 1


def test_clock_text() -> None:
    assert [clock_text(s) for s in (0.4, 59.6, 3599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


@contextmanager
def terminal(columns: int) -> Iterator[int]:
    """Standard output is a terminal; what it shows can be read from the descriptor."""
    ours, theirs = pty.openpty()
    os.environ["COLUMNS"] = str(columns)
    try:
        with open(theirs, "w", encoding="utf-8") as file, redirect_stdout(file):
            yield ours
    finally:
        del os.environ["COLUMNS"]
        os.close(ours)


def shown(descriptor: int) -> list[str]:
    """All lines that were there at some moment, without what only steers the terminal."""
    end, text = "nothing comes after this", b""
    print(end, flush=True)
    while end.encode() not in text:  # a terminal hands on what was written in pieces, and later
        text += os.read(descriptor, 1 << 16)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()))


def test_bars_of_a_terminal_fit_into_80_columns_and_know_no_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal(columns=80) as ours:
        console = Console()
        with console.bar("before, clip-score", 30_000) as bar:
            bar.advance(15_000)
        with console.bar("reward"):
            pass
        lines = shown(ours)
    assert any("15000/30000" in line for line in lines)
    assert any("reward" in line for line in lines)
    assert "?" not in "".join(lines)
    assert max(map(cell_len, lines)) <= 80


def test_a_dumb_terminal_and_coloured_logs_have_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal(columns=80), Console().bar("rollout") as bar:
        assert isinstance(bar, Phase)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # of many build servers
    with redirect_stdout(io.StringIO()), Console().bar("rollout") as bar:
        assert isinstance(bar, Phase)
