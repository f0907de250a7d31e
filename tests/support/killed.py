"""A training that is killed at random moments: python -m support.killed SEED KILLS MARKS LOG ARGUMENTS.

Each of its first KILLS starts has one process killed, of which SEED decides: in one of the first MARKS pieces of work,
or while it loads. LOG gets a line, WHAT RANK SECONDS, for every start and kill, and `marks RANK COUNT` of the
work that a process has come to the end of.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

BEGAN = time.time()  # the libraries, which take seconds, are imported below


def main(argv: Sequence[str]) -> int:
    seed, kills, most, log, *rest = argv
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    _note(log, "start", rank, BEGAN)
    from fastgrpo import train
    from fastgrpo.system.pulse import PULSE

    chance = random.Random(f"{seed} {restart}")
    victim, moment, delay = chance.randrange(count), chance.randrange(-int(most) // 8, int(most)), chance.random()
    done, mark, begin = 0, PULSE.mark, PULSE.restart

    def kill() -> None:
        _note(log, "kill", rank, time.time())
        os.kill(os.getpid(), signal.SIGKILL)

    def counted() -> None:
        nonlocal done
        done += 1
        if doomed and done == moment:
            threading.Timer(delay / 20, kill).start()  # not only between two pieces of work, but within one
        mark()

    def begun() -> None:
        begin()
        if doomed and moment <= 0:
            threading.Timer(0.3 + delay, kill).start()  # once the others know of this process

    doomed = restart < int(kills) and rank == victim
    PULSE.mark, PULSE.restart = counted, begun  # type: ignore[method-assign]
    code = train.main(rest)
    _note(log, "marks", rank, done)
    return code


def _note(log: str, what: str, rank: int, number: float) -> None:
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{what} {rank} {number}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
