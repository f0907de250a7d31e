"""How long a call takes on the device, how many launches it makes, and how fast the device copies memory."""

import gc
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgrpo.engine import graphs

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

_FLUSH_BYTES = 256 * 2**20  # twice the largest L2 cache (126 MB, B200); writing it takes longer than a launch does
_COPY_BYTES = 2**30
_WARMUP = 3
_CALLS = 20


class DeviceClock:
    """A timer for pytest-benchmark that stands still but for the time `timed` calls took between two CUDA events."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def timed(self, call: Callable[[], Any]) -> Callable[[], None]:
        """The call with a cold L2 cache. The flush also keeps the device busy until the call has been launched."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)

        def measured() -> None:
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3

        return measured


class RecordedClock:
    """A timer for pytest-benchmark that replays seconds measured elsewhere, such as those of trainings that took
    turns.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def replay(self, benchmark: Any, seconds: Sequence[float]) -> None:
        """One round for each number."""
        waiting = iter(seconds)

        def pass_by() -> None:
            self.seconds += next(waiting)

        benchmark.pedantic(pass_by, rounds=len(seconds))


def warm_up(call: Callable[[], Any]) -> None:
    """Compile, load and allocate whatever only the first calls do."""
    for _ in range(_WARMUP):
        call()
    if CUDA:
        torch.cuda.synchronize()


def captured(call: Callable[[], Any]) -> Callable[[], None] | None:
    """The replay of the call's CUDA graph: the device's work without Python's.

    None for a call that waits for the device.
    """
    pool = graphs.memory_pool(DEVICE)
    try:
        graphs.warm_up(call, DEVICE, pool)
        graph, _ = graphs.record(call, DEVICE, pool)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def seconds_called(call: Callable[[], Any]) -> float:
    """Mean seconds of calls made one after another from Python: what is waited for, be it Python or the device."""
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / _CALLS


def launches(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call starts on the device, as the profiler sees them."""
    return sum(event.get("cat") in _ON_DEVICE for event in traced(call))


def costliest(call: Callable[[], Any], most: int = 40) -> list[dict[str, Any]]:
    """Name, calls and seconds of the kernels, copies and fills of a call that take longest; on a CPU its operations."""
    return by_time(traced(call), _ON_DEVICE if CUDA else ("cpu_op",), most)


def by_time(events: Sequence[Mapping[str, Any]], kinds: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The same of a trace's events, of these kinds."""
    calls: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in kinds:
            calls[event["name"]] += 1
            micros[event["name"]] += event["dur"]
    return [
        {"name": name, "calls": calls[name], "seconds": took / 1e6}
        for name, took in sorted(micros.items(), key=lambda entry: (-entry[1], entry[0]))[:most]
    ]


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that a call takes with the device's work: the median of three, after one that does not count."""
    return statistics.median([_timed(call) for _ in range(4)][1:])


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def host_waits(call: Callable[[], Any]) -> dict[str, int]:
    """How often the host waited for the device within the call, by the name of what waits, as a trace has it."""
    if not CUDA:
        call()
        return {}
    torch.cuda.synchronize()
    return waits_within(traced(torch.profiler.record_function("watched")(call)), "watched")


@contextmanager
def waits_by_place() -> Iterator[Counter[str]]:
    """FILE:LINE -> how often PyTorch saw the host wait for the device there; filled when the block ends.

    Costs nothing, so that a whole iteration can be watched: how long it takes stays as it is.
    """
    found: Counter[str] = Counter()
    before = torch.cuda.get_sync_debug_mode() if CUDA else 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode(before)
    for warning in seen:
        if "called a synchronizing CUDA operation" in str(warning.message):
            found["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"] += 1
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def waits_within(events: list[dict[str, Any]], name: str) -> dict[str, int]:
    """The same of a trace's events: what the host did while the range `name` lasted."""
    watched = next(event for event in events if event.get("name") == name and event.get("cat") == "user_annotation")
    begin, end = watched["ts"], watched["ts"] + watched["dur"]
    inside = (event["name"] for event in events if event.get("cat") == "cuda_runtime" and begin <= event["ts"] < end)
    return dict(Counter(event for event in inside if event in _WAITS))


def traced(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The events of a trace of the call, and of the wait for the device that follows it."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if CUDA:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the fastest of ten large copies within the device."""
    source, target = torch.ones(2, _COPY_BYTES, dtype=torch.int8, device=DEVICE)
    clock = DeviceClock()
    copy = clock.timed(lambda: target.copy_(source))
    copy()
    times = []
    for _ in range(10):
        before = clock()
        copy()
        times.append(clock() - before)
    return 2 * _COPY_BYTES / min(times)


def free() -> None:
    """Give back what the last measurement held: SD 1.x's optimizer state leaves no room for two."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
