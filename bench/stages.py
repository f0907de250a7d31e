"""What is done on a machine that is lent for minutes, in which order and until when: data, and nothing that runs it.

Times are seconds since the run began. What is expected is a prediction for one H200; a stage that ends sooner lets the
next begin, one that has not ended by its time is stopped, so that none can take another's.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable
GRACE = 6.0
"""Seconds between being asked to stop, which lets a program say where it was, and being killed."""


@dataclass(frozen=True)
class Stage:
    """One process, of a session of its own. Stages begin in their order and wait for no background ones.

    name: of its log. command: its words, in which {work}, {seconds}, {site} and {wheels} are filled in. expected:
    seconds that it should take. by: when it is killed at the latest. cap: seconds that it is given at most. margin: of
    these, those in which it is told to begin no further measurement. least: it is not begun for less. background:
    beside the others. watcher: it ends with the run, and that is no failure.
    """

    name: str
    command: tuple[str, ...]
    expected: float
    by: float
    cap: float = math.inf
    margin: float = 15.0
    least: float = 10.0
    background: bool = False
    watcher: bool = False
    instead_of: str = ""

    def words(self, work: Path, site: Path, wheels: Path | None, seconds: float) -> list[str]:
        """The command of a stage that is given `seconds`. wheels: a folder of them."""
        files = [str(path) for path in sorted(wheels.glob("*.whl"))] if wheels else []
        values = {"{work}": work, "{site}": site, "{seconds}": f"{max(seconds - self.margin, 1.0):.0f}"}
        words = [word for given in self.command for word in (files if given == "{wheels}" else [given])]
        for name, value in values.items():
            words = [word.replace(name, str(value)) for word in words]
        return words


@dataclass(frozen=True)
class Run:
    """seconds: for everything, the last archive included, where nothing else is said. about: what it brings."""

    about: str
    seconds: float
    stages: tuple[Stage, ...]


def _pytest(*words: str) -> tuple[str, ...]:
    return PYTHON, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *words


def _bench(name: str, *words: str) -> tuple[str, ...]:
    return _pytest(f"bench/test_{name}", "--benchmark-quiet", "--seconds={seconds}", *words)


def _iterations(name: str) -> tuple[str, ...]:
    return PYTHON, "bench/iteration.py", name, "--out={work}", "--seconds={seconds}"


_CLOCKS = (
    "nvidia-smi",
    "--query-gpu=timestamp,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,utilization.gpu,memory.used",
    "--format=csv",
    "--loop=5",
)
_UNPACK = (
    PYTHON,
    *["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target"],
    "{site}",
    "{wheels}",
)
_NATIVE = (PYTHON, "-c", "from fastgrpo.kernels import native; print(native.build())")

RUNS = {
    "first": Run(
        "whole iterations, in graphs and compiled, beside the plain trainer's; their kernels; the operators beside "
        "their rivals",
        540.0,
        (
            Stage("clocks", _CLOCKS, math.inf, math.inf, background=True, watcher=True),
            Stage("wheels", _UNPACK, 8, by=45, margin=0),
            Stage("native", _NATIVE, 25, by=120, background=True),
            Stage("prewarm", (PYTHON, "bench/prewarm.py"), 25, by=120, background=True),
            # Whether anything works at all; no longer than it takes until the above are done.
            Stage("smoke", _bench("kernels.py::test_right"), 32, by=95, cap=45, margin=8),
            # Its iteration is predicted to end at 2:55. What may follow it, waits in a trace, must not cost the next
            # stage its time.
            Stage("graphs", _iterations("graphs"), 137, by=215, margin=35),
            # Should a graph not be captured, there is an iteration all the same.
            Stage("eager", _iterations("eager"), 115, by=215, margin=35, instead_of="graphs"),
            Stage("plain", _iterations("plain"), 48, by=270, cap=60),
            Stage("compiled", _iterations("compiled"), 200, by=510, cap=240, margin=20),
            Stage("kernels", _bench("kernels.py::test_kernel", "--results={work}/kernels.json"), 70, by=530, margin=30),
        ),
    ),
    "second": Run(
        "the GPU tests; the UNet per attention backend; the ladder",
        240.0,
        (
            Stage("clocks", _CLOCKS, math.inf, math.inf, background=True, watcher=True),
            Stage("wheels", _UNPACK, 4, by=30, margin=0),
            Stage("tests", _pytest("-m", "gpu"), 90, by=120),
            Stage("unet", _bench("unet.py", "--throughput={work}"), 40, by=165),
            Stage("ladder", _bench("ladder.py", "--throughput={work}"), 75, by=232, margin=30),
        ),
    ),
}
