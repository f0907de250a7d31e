"""Commands in several processes."""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from fastgrpo import train
from support import ROOT

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
PATIENCE = 300.0  # seconds until processes that do not end are killed, which fails a test
# Starts processes like those of the command line, forked from one that has the libraries imported and has run nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fastgrpo.training", "torch.utils.tensorboard", "matplotlib.colors", "tyro"])

Main = Callable[[Sequence[str]], int]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(
    processes: int, *argv: str, module: str = "fastgrpo.train", restarts: int = 0, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """As README has it: torchrun's own parser takes our --run for its --run-path, so runs are named by --run-folder.

    restarts: how often torchrun may start them all again. folder: the working directory.
    Each process imports torch and the rest, which takes longer than what most tests need it for: `together` does not.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher += [f"--master-port={free_port()}", f"--max-restarts={restarts}"]
    return subprocess.run(
        [*launcher, "-m", module, *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT,
    )


@dataclass(frozen=True)
class Ended:
    """A process that has ended; returncode is -N where signal N has ended it."""

    returncode: int
    stdout: str
    stderr: str


def together(processes: int, *argv: str, main: Main = train.main, agent: bool = True, restart: int = 0) -> list[Ended]:
    """Run a command in several processes that are told of each other as by torchrun, or as by other launchers.

    agent: as torchrun's does, the caller hosts the store that they meet through; else the first process does. Nobody
    ends the others when one fails, as torchrun would. restart: how often torchrun has started them again before.
    """
    with TemporaryDirectory() as told:
        meeting = ENVIRONMENT | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        if agent:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
            meeting |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "none"}
            meeting |= {"TORCHELASTIC_RESTART_COUNT": str(restart)}
            meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        else:
            meeting |= {"MASTER_PORT": str(free_port())}
        files = [Path(told, str(rank)) for rank in range(processes)]
        started = [
            SERVER.Process(target=_member, args=(main, argv, file, meeting | {"RANK": rank, "LOCAL_RANK": rank}))
            for rank, file in zip(map(str, range(processes)), files, strict=True)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(PATIENCE)
        late = [rank for rank, process in enumerate(started) if process.exitcode is None]
        for rank in late:
            started[rank].kill()
            started[rank].join()
        assert not late, f"the processes {late} do not end"
        said = [[file.with_suffix(end).read_text() for end in (".out", ".err")] for file in files]
        return [Ended(process.exitcode or 0, *texts) for process, texts in zip(started, said, strict=True)]


def _member(main: Main, argv: Sequence[str], file: Path, environment: dict[str, str]) -> None:
    """A process of its own."""
    gc.freeze()  # the libraries' objects: to look at them all would copy the memory that forked processes share
    for number, end in ((1, ".out"), (2, ".err")):
        with open(file.with_suffix(end), "w") as output:
            os.dup2(output.fileno(), number)
    os.environ.update(environment)
    sys.exit(main(argv))
