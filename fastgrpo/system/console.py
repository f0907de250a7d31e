"""What a command shows: progress bars, one line per iteration, tables. Without a terminal there are no bars."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastgrpo.system.errors import ConfigError
from fastgrpo.system.finite import BrokenPicture
from fastgrpo.system.output import steady_output
from fastgrpo.system.progress import Clock, Lines, Pace, Phase, clock_text, fitting
from fastgrpo.system.pulse import PULSE

# What the line of an iteration shows, where it was logged and as far as there is room: label, metric, format.
_COLUMNS = (
    ("reward", "reward/mean", "{:+.3f}".format),
    ("unsafe", "eval/unsafe", "{:.1%}".format),
    ("|ratio-1|", "ratio/max_abs_dev_first", lambda value: f"{value:.0e}" if value else "0    "),
    ("clip", "clip/fraction", "{:4.0%}".format),
    ("diversity", "guard/diversity_within", "{:.0%}".format),
    ("composition", "eval/composition", "{:.1%}".format),
    ("diversity", "eval/diversity_vendi", "{:.0%}".format),
    ("pos", "reward/positive_mean", "{:+.3f}".format),
    ("neg", "reward/negative_mean", "{:+.3f}".format),
    ("kl", "kl/mean", "{:.1e}".format),
    ("grad", "grad/norm", "{:.3f}".format),
)


def cut_middle(text: str, most: int = 2000) -> str:
    """The text, shortened in its middle: a sentence says first what is wrong and last what to do."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"


def complain(sentence: str) -> None:
    """Print one line with a sentence on standard error, whatever words of libraries are in it."""
    line = cut_middle(" ".join(part.strip() for part in sentence.splitlines()))
    print(f"fastgrpo: {line.rstrip('.')}.", file=sys.stderr)


def warn(sentence: str) -> None:
    """Print a warning on standard error."""
    complain(f"warning: {sentence}")


def reason(error: OSError) -> str:
    """The system's own words for an OSError, after the path where it names one."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


class Stopped(KeyboardInterrupt):
    """A signal arrived before there was anything to go on from. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number  # what a shell reports for a process that the signal ended


def memory_full(error: BaseException) -> str:
    """Which memory is full, as a clause, where that is what an exception says; else nothing.

    torch has a class of its own for the GPU's memory. For the CPU's, a RuntimeError says so in words.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory is full"
    words = ("not enough memory", "can't allocate memory", "std::bad_alloc")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return "the memory is full" if said or isinstance(error, MemoryError) else ""


@steady_output()
def run_command(body: Callable[[], int | None], undone: str) -> int:
    """Run a command's body and turn its exceptions into a sentence and an exit code.

    The code is 0 for done, 1 failed, 2 refused, 130 stopped by Ctrl-C, 128 + n by another signal n.
    body: returns an exit code, or None for 0. undone: a clause on what a failure or a stop leaves undone; "" is none.
    """
    so = f"; {undone}" if undone else ""
    try:
        return body() or 0
    except ConfigError as error:
        complain(str(error))
        return 2
    except BrokenPicture as error:
        complain(error.sentence("--dtype") + so)
        return 1
    except OSError as error:
        complain(reason(error) + so)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not (full := memory_full(error)):
            raise
        complain(full + so)
        return 1
    except KeyboardInterrupt as stop:
        complain("stopped" + so)
        return stop.exit_code if isinstance(stop, Stopped) else 130


@dataclass(frozen=True)
class Bar:
    """One progress bar."""

    progress: Progress
    task: TaskID

    def advance(self, count: int) -> None:
        """Note that `count` more are done."""
        PULSE.mark()
        self.progress.advance(self.task, count)

    def reach(self, done: int, total: int) -> None:
        """Note that `done` of `total` are done."""
        PULSE.mark()
        self.progress.update(self.task, completed=done, total=total)


class _Count(MofNCompleteColumn):
    """A column with how many of how many are done, where that is known."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class Console:
    """Standard output, with bars where it is a terminal, and lines about progress where it is none."""

    def __init__(self, quiet: bool = False, every_phase: bool = False, clock: Clock = time.monotonic) -> None:
        """quiet: say nothing at all. every_phase: without a terminal, short phases have a line too."""
        self._rich = rich.console.Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
        self._lines = Lines(self.say, every_phase, clock)

    def say(self, *things: object) -> None:
        """Print text or rich tables, each on lines of its own."""
        self._lines.heard()
        for thing in things:
            self._rich.print(thing)

    def follow(self, pace: Pace) -> None:
        """Say from now on where a training is, and how long it still takes."""
        self._lines.pace = pace

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Bar | Phase]:
        """A bar that vanishes when its block ends; without a total it only shows that something is going on."""
        if not self._moves():
            with PULSE.phase(label), self._lines.phase(label, total) as phase:
                yield phase
            return
        place = f"{self._lines.pace.place} {label}" if self._lines.pace else label
        columns = TextColumn("{task.description:>10}"), BarColumn(30), _Count(), TimeRemainingColumn()
        with PULSE.phase(label), Progress(*columns, console=self._rich, transient=True) as progress:
            yield Bar(progress, progress.add_task(place, total=total))

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Like a bar without a total, for a block in which libraries show bars of their own, such as downloads."""
        if self._moves():
            self.say(label)
            yield
        else:
            with self._lines.phase(label):
                yield

    def iteration(
        self, iteration: int, iterations: int, seconds: float, values: Mapping[str, float], speed: bool = False
    ) -> None:
        """Say an iteration's line, 0 being before training. seconds: since the run began. speed: shows it below."""
        self.say(iteration_line(iteration, iterations, seconds, values, self._lines.pace))
        if speed:
            self.say(*speed_lines(values))

    def _moves(self) -> bool:
        """Whether the output is a terminal on which lines can be overwritten."""
        return self._rich.file.isatty() and not self._rich.is_dumb_terminal and not self._rich.quiet


def iteration_line(
    iteration: int, iterations: int, seconds: float, values: Mapping[str, float], pace: Pace | None = None
) -> str:
    """An iteration's line of 80 columns, what matters most first. Arguments are those of `Console.iteration`."""
    left = pace.left() if pace else None
    when = "before training" if not iteration else f"{clock_text(seconds)} in all" if iteration == iterations else ""
    if not when and left is not None:
        when = f"{clock_text(left)} left"
    shown = [f"{label} {form(values[name])}" for label, name, form in _COLUMNS if name in values]
    count = f"{iteration:{len(str(iterations))}d}/{iterations}"
    return fitting([count, *filter(None, [when]), *shown]).rstrip()


def speed_lines(values: Mapping[str, float]) -> list[str]:
    """Lines with each stage's images/s, TFLOP/s and their share of what the device can do, and the memory's peak."""
    lines = [
        f"  {stage:8}{values[f'throughput/{stage}_images_per_s']:.3g} images/s, "
        f"{values[f'throughput/{stage}_tflops']:.3g} TFLOP/s ({values[f'throughput/{stage}_share']:.0%})"
        for stage in ("rollout", "update")
        if f"throughput/{stage}_tflops" in values
    ]
    return lines + ([f"  memory  {values['memory/peak_gb']:.1f} GB at most"] if "memory/peak_gb" in values else [])
