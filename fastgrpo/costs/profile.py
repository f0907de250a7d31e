"""Where the time of an iteration goes: a trace for a viewer, and a table of what costs most."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity

from fastgrpo.system.files import naming, write_atomically

COSTLIEST = 10


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel, or on a CPU of one operation without those that it calls. seconds: of all."""

    name: str
    calls: int
    seconds: float


@contextmanager
def profiled(run: Path, wanted: bool) -> Iterator[None]:
    """Records what the block does, in all threads, and writes it into RUN/profile:

        trace.json.gz    for chrome://tracing or ui.perfetto.dev
        kernels.md       the ten costliest kernels; on a CPU, operations

    Not wanted, it does nothing; a block that raises leaves no files. Raises OSError where they cannot be written.
    """
    if not wanted:
        yield
        return
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # The workers of a CPU are threads that were there before.
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(activities=activities, experimental_config=every_thread) as profiler:
        yield
        if cuda:
            torch.cuda.synchronize()
    folder = run / "profile"
    with naming(folder):
        folder.mkdir(exist_ok=True)
    _export(profiler, folder / "trace.json.gz")
    write_atomically(folder / "kernels.md", kernel_table(_kernels(profiler.key_averages())).encode())


def kernel_table(kernels: Sequence[Kernel]) -> str:
    """Returns a Markdown table, the costliest kernel first, each with its share of the time of all."""
    everything = sum(kernel.seconds for kernel in kernels)
    costliest = sorted(kernels, key=lambda kernel: (-kernel.seconds, kernel.name))[:COSTLIEST]
    rows = [
        f"| {_plain(kernel.name)} | {kernel.seconds / everything:.1%} | {1e3 * kernel.seconds:.2f} | {kernel.calls:,} "
        f"| {1e6 * kernel.seconds / kernel.calls:.1f} |"
        for kernel in costliest
        if kernel.seconds > 0
    ]
    together = f"{len(kernels)} kernels, which took {1e3 * everything:.1f} ms together; overlapping ones count each."
    header = ["| kernel | share | ms | calls | us a call |", "|---|---:|---:|---:|---:|"]
    return "\n".join([f"{COSTLIEST} costliest of {together}", "", *header, *rows, ""])


def _kernels(averages: Sequence[FunctionEventAvg]) -> list[Kernel]:
    """Lists what ran on the GPU, copies and fills included, or the CPU's operations where nothing did."""
    events = [event for event in averages if not event.is_user_annotation]
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    if on_gpu:
        return [Kernel(str(event.key), event.count, event.self_device_time_total / 1e6) for event in on_gpu]
    return [Kernel(str(event.key), event.count, event.self_cpu_time_total / 1e6) for event in events]


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    """Writes the trace, which appears once it is whole. The end of the name tells torch to compress it."""
    partial = path.with_name(f"partial-{path.name}")
    with naming(path):
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)


def _plain(name: str) -> str:
    """Makes a kernel's name fit one cell of a table: templates' arguments can be hundreds of characters."""
    name = name.replace("|", "\\|")
    return name if len(name) <= 100 else name[:99] + "…"
