"""Keeps a page up to date while trainings go on: what `report --watch` does."""

import fcntl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastgrpo.run.metrics import read_metrics
from fastgrpo.run.page.document import write_report
from fastgrpo.settings.toml import load_known

EVERY = 10.0  # seconds after which a page reads itself again
_LOOK_EVERY = 2.0  # seconds between two looks at what a training has written
_READ = ("*", "samples/*", "checkpoints/best.json", "evaluation/*/evaluation.*")  # of a run's folder, by the page


def watch(
    runs: Sequence[Path],
    output: Path | None,
    say: Callable[[str], object] = print,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Write the page of these runs again whenever they have written something, until none of them trains any more.

    Returns whether it came to that; otherwise it was ended by Ctrl-C. Either way the last page does not read itself
    again. Raises ConfigError as `write_report`.
    """
    while any(not (run / "config.toml").is_file() and is_live(run) for run in runs):
        sleep(_LOOK_EVERY)  # these have only just begun
    seen, said = None, False
    try:
        while True:
            live = any(map(is_live, runs))  # asked before the page is written: what comes last is on it
            now = _written(runs)
            if now != seen or not live:
                path = write_report(*runs, output=output, again=EVERY if live else None)
                seen = now
                if not said:
                    say(str(path))
                    said = True
            if not live:
                return True
            sleep(_LOOK_EVERY)
    except KeyboardInterrupt:
        write_report(*runs, output=output)
        return False


def is_live(run: Path) -> bool:
    """Whether a process trains in this folder.

    Where the file system has no locks that would say so: whether iterations are missing.
    """
    try:
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        records = read_metrics(run / "metrics.jsonl")
        return (records[-1]["iteration"] if records else 0) < load_known(run / "config.toml")[0].iterations


def _written(runs: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Every file that the page reads, with when it was written and its size."""
    files = {path for run in runs for pattern in _READ for path in run.glob(pattern) if path.name != "report.html"}
    found = []
    for path in sorted(files):
        try:
            about = path.stat()
        except FileNotFoundError:
            continue
        found.append((str(path), about.st_mtime_ns, about.st_size))
    return found
