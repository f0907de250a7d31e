"""`python -m fastgrpo.estimate`: the command line of computing what a training costs; costs/estimate.py does it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.settings.command_line import WithPreset, parse_with_preset
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import require, require_at_least

PROGRAM = "python -m fastgrpo.estimate"


@dataclass(frozen=True)
class Estimate(WithPreset):
    """Compute what a training costs: FLOPs by stage, GPU memory by part. Nothing is measured, no weights are loaded.

    All settings of training are accepted. What is counted is a GPU's work, in bf16 where engine.dtype is auto.
    """

    tflops: float = 0.0
    """TFLOP/s that each GPU sustains, to turn FLOPs into hours; 0 shows the hours for 100 TFLOP/s."""
    processes: int = 1
    """GPUs that share the work, as torchrun's --nproc-per-node."""
    link_gb_s: float = 50.0
    """GB/s that each GPU sends to the others: 50 is InfiniBand NDR with a port for each, 450 an H100's NVLink."""
    gpu_gb: float = 80.0
    """Memory of each GPU in GB, for the micro-batch where micro_batch is 0: the largest that is predicted to fit."""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Estimate as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_with_preset(Estimate, sys.argv[1:] if argv is None else argv, program)
        from fastgrpo.validation import validate  # only now: it needs NumPy

        validate(asked.config)
        _check(asked)
        from fastgrpo.costs.estimate import estimate  # only now: it takes seconds

        estimate(asked.config, asked.tflops, asked.processes, asked.link_gb_s, asked.gpu_gb, Console())

    return run_command(command, "")


def _check(command: Estimate) -> None:
    tflops, processes, prompts = command.tflops, command.processes, command.config.prompts_per_iteration
    require(0 <= tflops < math.inf, "--tflops", tflops, "a number above 0, or 0 for the hours per 100 TFLOP/s")
    require(0 < command.link_gb_s < math.inf, "--link-gb-s", command.link_gb_s, "a number above 0")
    require(0 < command.gpu_gb < math.inf, "--gpu-gb", command.gpu_gb, "a number above 0")
    require_at_least(1, "--processes", processes)
    shared = f"a multiple of the {processes} processes, which share them"
    require(prompts % processes == 0, "prompts_per_iteration", prompts, shared)


if __name__ == "__main__":
    sys.exit(main())
