"""What a person sees: progress bars, one line per iteration, tables. Without a terminal, plain lines and no bars."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastgrpo.config import ConfigError
from fastgrpo.finite import BrokenPicture
from fastgrpo.output import steady_output
from fastgrpo.wording import cut_middle

# What the line of an iteration shows, where it was logged: label, metric, format.
_COLUMNS = (
    ("reward", "reward/mean", "{:+.3f}"),
    ("pos", "reward/positive_mean", "{:+.3f}"),
    ("neg", "reward/negative_mean", "{:+.3f}"),
    ("clip", "clip/fraction", "{:.0%}"),
    ("kl", "kl/mean", "{:.1e}"),
    ("grad", "grad/norm", "{:.3f}"),
    ("unsafe", "eval/unsafe", "{:.1%}"),
    ("composition", "eval/composition", "{:.1%}"),
)


def complain(sentence: str) -> None:
    """Say on standard error why a command ends, for instance: one line, a sentence, whatever libraries' words are in it."""
    line = cut_middle(" ".join(part.strip() for part in sentence.splitlines()))
    print(f"fastgrpo: {line.rstrip('.')}.", file=sys.stderr)


def warn(sentence: str) -> None:
    """Say on standard error what a command has to do without."""
    complain(f"warning: {sentence}")


def reason(error: OSError) -> str:
    """What the system says was in the way, and the path where it names one."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


class Stopped(KeyboardInterrupt):
    """A signal ended what had not come far enough to be gone on from. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number  # what a shell reports for a process that the signal ended


def memory_full(error: BaseException) -> str:
    """ "the GPU's memory is full" or "the memory is full" where that is what an exception says, else nothing.

    torch has a class of its own for the GPU's; where its CPU allocator gets nothing, a RuntimeError says so in words.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory is full"
    words = ("not enough memory", "can't allocate memory", "std::bad_alloc")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    ):
        return "the memory is full"
    return ""


@steady_output()
def run_command(body: Callable[[], int | None], undone: str) -> int:
    """Do what a command line asks for. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C, or
    128 + n by another signal n.

    body: returns an exit code, or None for 0. undone: what to say there is not, when it was stopped or the system was in the
    way; "" is nothing.
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
        """`count` more are done."""
        self.progress.advance(self.task, count)

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        self.progress.update(self.task, completed=done, total=total)


class Console:
    """Standard output, with bars where it is a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        """quiet: say nothing at all."""
        self._rich = rich.console.Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)

    def say(self, *things: object) -> None:
        """Print text or rich tables, each on lines of its own."""
        for thing in things:
            self._rich.print(thing)

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Bar]:
        """A bar that vanishes when its block ends; without a total it only shows that something is going on."""
        columns = TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self._rich, transient=True, disable=not self._rich.is_terminal) as progress:
            yield Bar(progress, progress.add_task(label, total=total))

    def iteration(self, iteration: int, iterations: int, seconds: float, values: Mapping[str, float]) -> None:
        """The line of a finished iteration, or of the policy before training, 0; `seconds` of wall clock since the run began."""
        shown = [f"{label} {form.format(values[name])}" for label, name, form in _COLUMNS if name in values]
        count = f"{iteration:{len(str(iterations))}d}/{iterations}"
        if iteration:
            shown += [f"{values['throughput/images_per_s']:.1f} images/s", speed_text(values)]
        else:
            shown.insert(0, "before training")
        self.say("  ".join([count, *shown, f"{seconds:.0f} s"]))


def speed_text(values: Mapping[str, float]) -> str:
    """For a progress line, from metrics: both stages' images/s, TFLOP/s and share, and the memory peak."""
    parts = [
        f"{stage} {values[f'throughput/{stage}_images_per_s']:.3g} images/s, "
        f"{values[f'throughput/{stage}_tflops']:.3g} TFLOP/s ({values[f'throughput/{stage}_share']:.0%})"
        for stage in ("rollout", "update")
        if f"throughput/{stage}_tflops" in values
    ]
    if "memory/peak_gb" in values:
        parts.append(f"{values['memory/peak_gb']:.1f} GB")
    return "  ".join(parts)
