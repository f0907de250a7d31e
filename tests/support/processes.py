"""Commands in several processes."""

import os
import socket
import subprocess
import sys

from support import ROOT


def torchrun(processes: int, *argv: str, module: str = "fastgrpo.train") -> subprocess.CompletedProcess[str]:
    """As README has it: torchrun's own parser takes our --run for its --run-path, so runs are named by --run-folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", module, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
