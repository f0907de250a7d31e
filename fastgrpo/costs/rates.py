"""What the device can do at best, measured in a fraction of a second: products of large matrices, and copies.

A stage's share of the matmul rate says how much of the device it uses; the copy rate bounds what only moves memory.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.system.workers import Workers

_MATRIX = {"cuda": 8192, "cpu": 512}
# On the GPU well beyond any cache. On the CPU shared out among the workers, so that many of them need no more memory.
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
_SECONDS = 0.15  # for each of the two rates
_PRODUCTS = 8  # in a round on the GPU, so that launching them does not count


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device.

    device: its name. dtype: of the matrices, such as "torch.bfloat16". workers: CPU cores, each with a matrix of its
    own; 1 on a GPU. matmul: FLOP/s, multiplications and additions. copy: bytes/s, read and written.
    """

    device: str
    dtype: str
    workers: int
    matmul: float
    copy: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        where = f"{self.workers} cores of {self.device}" if self.workers > 1 else self.device
        matmul = f"{self.matmul / 1e12:.3g} TFLOP/s of {self.dtype.removeprefix('torch.')} matmul"
        return f"{where}: {matmul}, {self.copy / 1e9:.3g} GB/s of copies, measured"


def measure_rates(device: torch.device, dtype: torch.dtype, workers: Workers) -> Rates:
    """Measures now: the best of several rounds, so that what else runs on the machine counts least.

    dtype: what the UNet computes in; float32 on CUDA as torch.set_float32_matmul_precision says. workers: all at once.
    Needs 1.2 GB of a GPU's memory or 0.3 GB of a CPU's at most at a time, and frees it.
    """
    matmul, copy = _matmul_rate(device, dtype, workers), _copy_rate(device, workers)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Rates(device_name(device), str(dtype), workers.count, matmul, copy)


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or what torch knows of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


def _matmul_rate(device: torch.device, dtype: torch.dtype, workers: Workers) -> float:
    size, products = _MATRIX[device.type], _PRODUCTS if device.type == "cuda" else 1
    # Not zeros: a GPU that multiplies zeros draws less power and clocks higher than it ever will in training.
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(size, size, generator=generator, device=device).to(dtype)

    operands = [(random(), random(), random()) for _ in range(workers.count)]

    def multiply(some: tuple[Tensor, Tensor, Tensor]) -> None:
        left, right, out = some
        for _ in range(products):
            torch.mm(left, right, out=out)

    return workers.count * products * 2 * size**3 / best_seconds(lambda: list(workers.map(multiply, operands)), device)


def _copy_rate(device: torch.device, workers: Workers) -> float:
    size = _COPY_BYTES[device.type] // workers.count
    buffers = [torch.ones(2, size, dtype=torch.int8, device=device) for _ in range(workers.count)]

    def copy(pair: Tensor) -> None:
        pair[0].copy_(pair[1])

    return workers.count * 2 * size / best_seconds(lambda: list(workers.map(copy, buffers)), device)


@torch.no_grad()
def best_seconds(
    call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the seconds of the fastest of the calls that fill 0.15 s, after one that does not count."""
    seconds_of(call, device, clock)
    times = [seconds_of(call, device, clock)]
    while sum(times) < _SECONDS:
        times.append(seconds_of(call, device, clock))
    return min(times)


def seconds_of(
    call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the seconds of one call; the device is waited for."""
    began = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
