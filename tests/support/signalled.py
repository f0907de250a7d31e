"""A training of several processes, one of which gets into trouble: python -m support.signalled TROUBLE ARGUMENTS.

TROUBLE: RANK:ITERATION:PHASE:SIGNAL, a signal that the process sends itself when it comes to the phase of the
iteration; `sleep`, with which it does nothing more there; or `fail`. Only once: not when it is started again.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastgrpo import train, training
from fastgrpo.evaluation.samples import SampleGrids
from fastgrpo.run import checkpoint
from fastgrpo.system.pulse import PULSE

PLACES = {
    "rollout": (training, "rollout"),
    "reward": (training._Scores, "rewards"),
    "update": (training, "update"),
    "evaluation": (SampleGrids, "draw"),  # in which all share
    "checkpoint": (checkpoint, "save_file"),
}


def main(argv: Sequence[str]) -> int:
    trouble, *rest = argv
    rank, iteration, phase, kind = trouble.split(":")
    if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        place, name = PLACES[phase]
        setattr(place, name, _troubled(getattr(place, name), int(iteration), kind))
    return train.main(rest)


def _troubled(call: Callable[..., Any], iteration: int, kind: str) -> Callable[..., Any]:
    def troubled(*args: Any, **options: Any) -> Any:
        if PULSE.iteration == iteration:
            if kind == "sleep":
                time.sleep(10**6)
            if kind == "fail":
                raise OSError(errno.EIO, os.strerror(errno.EIO), "it fails as asked")
            os.kill(os.getpid(), signal.Signals[kind])
        return call(*args, **options)

    return troubled


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
