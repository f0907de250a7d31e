"""What an iteration computed and how fast: FLOPs counted from the model times the rows that really went through it."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastgrpo.costs import ModelCost
from fastgrpo.engine.rates import Rates

STAGES = ("rollout", "update")
"""What speeds are given for."""


@dataclass(frozen=True)
class Rows:
    """What one stage computed on this process.

    forward, forward_backward: samples through the UNet, each half of guidance one: forward only (rollout, replay, a pass
    that looks for clipped pairs, the base model's), and with the backward pass. decoded: images through the VAE. encoded:
    images through the reward's encoders. spared: FLOP of the forward passes that were not computed again, such as a
    text's keys and values.
    """

    forward: int = 0
    forward_backward: int = 0
    decoded: int = 0
    encoded: int = 0
    spared: int = 0


@dataclass(frozen=True)
class Accounting:
    """Turns rows and seconds into metrics.

    model: counted as it is trained. encode: FLOP of the reward's encoders for one image, all together. rates: the device's.
    """

    model: ModelCost
    encode: int
    rates: Rates

    def flop(self, rows: Rows) -> int:
        """What the rows cost: convolutions, linear layers and attention, as costs.py counts them."""
        return (
            rows.forward * self.model.forward
            + rows.forward_backward * self.model.forward_backward
            + rows.decoded * self.model.decode
            + rows.encoded * self.encode
            - rows.spared
        )

    def metrics(self, work: Mapping[str, Rows], seconds: Mapping[str, float], images: int) -> dict[str, float]:
        """throughput/STAGE_tflops, _images_per_s and _share for rollout and update, where they took any time.

        work, seconds: by stage; each stage's rows are what was computed within its seconds, on this process. So are
        TFLOP/s and the share, which is of the measured matmul rate. images: drawn in the iteration, on all processes.
        """
        values = {}
        for stage in STAGES:
            if seconds.get(stage, 0.0) > 0:
                speed = self.flop(work[stage]) / seconds[stage]
                values[f"throughput/{stage}_tflops"] = speed / 1e12
                values[f"throughput/{stage}_images_per_s"] = images / seconds[stage]
                values[f"throughput/{stage}_share"] = speed / self.rates.matmul
        return values


def memory_peak(device: torch.device) -> dict[str, float]:
    """memory/peak_gb, in units of 10^9 bytes.

    On CUDA the most that tensors took since the last call, which this one starts anew. On a CPU the most memory that the
    process ever had, libraries included: the system counts no other.
    """
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Kilobytes on Linux, bytes on macOS.
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory/peak_gb": size / 1e9}


def speed_text(values: Mapping[str, float]) -> str:
    """For a progress line, from metrics: both stages' images/s, TFLOP/s and share, and the memory peak."""
    parts = [
        f"{stage} {values[f'throughput/{stage}_images_per_s']:.3g} images/s "
        f"{values[f'throughput/{stage}_tflops']:.3g} TFLOP/s ({values[f'throughput/{stage}_share']:.0%})"
        for stage in STAGES
        if f"throughput/{stage}_tflops" in values
    ]
    if "memory/peak_gb" in values:
        parts.append(f"{values['memory/peak_gb']:.1f} GB")
    return "  ".join(parts)
