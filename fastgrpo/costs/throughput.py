"""What an iteration computed and how fast: FLOPs counted from the model times the rows that really went through it."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastgrpo.costs.counting import ModelFlop, count_encoders, count_flop
from fastgrpo.costs.rates import Rates, measure_rates
from fastgrpo.grpo.branches import Tree
from fastgrpo.models.check import describe
from fastgrpo.policy import Policy
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.types import UpdateStats

STAGES = ("rollout", "update")
"""The stages whose speed is reported."""


@dataclass(frozen=True)
class Rows:
    """What one stage computed on this process.

    forward: samples through the UNet without a backward pass, each half of guidance one (rollout, replay, a pass that
    looks for clipped pairs, the base model's). forward_backward: those with a backward pass.
    decoded: images through the VAE. encoded: images through the reward's encoders.
    Passes count whole, also where a rollout computes equal rows of its first step once (engine.reuse).
    """

    forward: int = 0
    forward_backward: int = 0
    decoded: int = 0
    encoded: int = 0


@dataclass(frozen=True)
class Accounting:
    """Turns rows and seconds into metrics. encode: FLOP of all the reward's encoders for one image."""

    model: ModelFlop
    encode: int
    rates: Rates

    def flop(self, rows: Rows) -> int:
        """Returns the FLOP of the rows, as costs/counting.py counts them."""
        return (
            rows.forward * self.model.forward
            + rows.forward_backward * self.model.forward_backward
            + rows.decoded * self.model.decode
            + rows.encoded * self.encode
        )

    def metrics(self, work: Mapping[str, Rows], seconds: Mapping[str, float], images: int) -> dict[str, float]:
        """Returns throughput/STAGE_tflops, _images_per_s and _share of rollout and update, where they took any time.

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


def count_and_measure(config: TrainConfig, policy: Policy) -> Accounting:
    """Counts the config's models and measures the device that `policy` is on; takes a second or two."""
    encoders, _ = count_encoders(config.reward)
    return Accounting(
        model=count_flop(describe(config.model), config.model, policy.computing.is_gradient_checkpointing),
        encode=sum(encoder.image for encoder in encoders.values()),
        rates=measure_rates(policy.device, policy.dtype, policy.workers),
    )


def rollout_rows(config: TrainConfig, images: int, scored: bool = False, tree: Tree | None = None) -> Rows:
    """Returns the rows of a rollout that drew this many images, and scored them if `scored`. tree: as it branched."""
    latents = images * config.rollout_steps if tree is None else images // tree.group_size * tree.denoised
    forward = latents * config.rollout.halves
    return Rows(forward=forward, decoded=images, encoded=images if scored else 0)


def update_rows(config: TrainConfig, stats: UpdateStats) -> Rows:
    """Returns the rows of an update. Those that only fill a micro-batch up do not count."""
    learned, halves = stats.forward_backward, config.rollout.halves
    base = learned if config.kl_term else 0
    return Rows(forward=(stats.forward + base) * halves, forward_backward=learned * halves)


def memory_peak(device: torch.device) -> dict[str, float]:
    """Returns memory/peak_gb, in units of 10^9 bytes.

    On CUDA it is the most that PyTorch's allocator held since the last call, with what CUDA graphs hold. On a CPU it is
    the most memory that the process ever had, libraries included: the system counts no other.
    """
    if device.type == "cuda":
        size = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Kilobytes on Linux, bytes on macOS.
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory/peak_gb": size / 1e9}
