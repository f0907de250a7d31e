"""Commands in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from support import ROOT

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(
    processes: int, *argv: str, module: str = "fastgrpo.train", restarts: int = 0, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """As README has it: torchrun's own parser takes our --run for its --run-path, so runs are named by --run-folder.

    restarts: how often torchrun may start them all again. folder: the working directory.
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


def by_hand(processes: int, *argv: str, module: str = "fastgrpo.train") -> list[subprocess.Popen[str]]:
    """As launchers other than torchrun do: the first process hosts the store. Their standard error is piped."""
    port = str(free_port())
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
