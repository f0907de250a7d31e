"""The files that measurements are written to, and what they say of the machine."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from measure import CUDA, copy_bandwidth

import fastgrpo  # noqa: F401  (must come before torch and diffusers: it prepares their import)
from fastgrpo.system.workers import available_cores


class Kept:
    """What was measured so far, with `rows`.

    The file is whole at any time, so that a run that is killed keeps its rows.
    """

    def __init__(self, path: Path | None, goes_on: bool = False, **content: Any) -> None:
        """path: None keeps nothing on disk. goes_on: after what another process of the same run has written there."""
        self.path = path
        self.content: dict[str, Any] = {**about_here(), **content, "rows": []}
        if goes_on and path and path.exists():
            self.content |= json.loads(path.read_text(encoding="utf-8"))

    def add(self, **row: Any) -> None:
        self.content["rows"].append(row)
        self._write()

    def say(self, **fields: Any) -> None:
        """Beside the rows."""
        self.content |= fields
        self._write()

    def note(self, field: str, name: str, value: Any) -> None:
        """What a field has of one training: the field is an object by trainings' names."""
        self.say(**{field: {**self.content.get(field, {}), name: value}})

    def fail(self, name: str, reason: str) -> None:
        """A row that there is not."""
        self.note("failed", name, reason)

    def _write(self) -> None:
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)


class Results(Kept):
    """Of the kernels, on a GPU."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, copy_bytes_per_second=copy_bandwidth())


def about_here() -> dict[str, str]:
    """The device, versions, the commit and the time."""
    cuda = {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
    }
    return {
        "device": torch.cuda.get_device_name() if CUDA else _processor(),
        **(cuda if CUDA else {}),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """How many cores of what, for instance "2 cores of AMD EPYC (AVX2)"."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{available_cores()} cores of {name} ({torch.backends.cpu.get_cpu_capability()})"


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it is absent or fails."""
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
