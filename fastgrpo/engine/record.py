"""What an engine decided at its start, which checkpoints store and RUN/engine.json shows.

A resumed run follows it instead of measuring again, or its sums could round differently; on another kind of device it
decides anew. RUN/engine.json is the record for people, written at the start and with every checkpoint:

    device          what it was decided for, a GPU's name for instance
    settings        those it was decided for: a resumed run with others decides anew
    attention       for every shape of the UNet's attention who computes it, the milliseconds that each candidate took,
                    and why others were left out; null where PyTorch chooses for itself
    gradient_checkpointing  whether the UNet's blocks keep their inputs only, and are computed again on the way back
    shard           number of processes -> what they shared out (engine.shard) where that was decided
    micro_batch     pairs, as measured or set, and halved where memory ran out since
    compiled        whether the UNet is compiled
    reuse           first: whether a rollout computes equal rows of its first step once
    old_log_prob    grpo.old_log_prob, or "replay" where the update did not find the rollout's log-probs again
    group_norm      kind of call -> the implementation that was faster
    rollout_batch   rollout.batch where it was halved because memory ran out, else 0
    cudnn_benchmark whether cuDNN keeps the fastest algorithms for convolutions of fixed shapes, as on CUDA. It tries
                    them at every start: a resumed run may get others, and then rounds differently
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastgrpo.kernels.group_norm_silu import BACKENDS as GROUP_NORM
from fastgrpo.system.files import write_atomically

Say = Callable[[str], object]
"""Tells people one line."""


@dataclass
class EngineRecord:
    """What an engine decided, as in the module's docstring; empty before. attention: an AttentionPlan as JSON."""

    device: str = ""
    attention: dict[str, Any] | None = None
    micro_batch: int = 0
    compiled: bool | None = None
    reuse: dict[str, bool] | None = None
    old_log_prob: str = ""
    group_norm: dict[str, str] | None = None
    rollout_batch: int = 0
    settings: dict[str, Any] | None = None
    cudnn_benchmark: bool = False
    gradient_checkpointing: bool | None = None
    shard: dict[str, Literal["none", "optimizer"]] | None = None

    def to_json(self) -> dict[str, Any]:
        """With GroupNorm's choices so far: they are measured when a shape is first met."""
        return asdict(self) | {"group_norm": GROUP_NORM.choices()}

    def write(self, run: Path) -> None:
        """Into RUN/engine.json. Raises OSError where it cannot be written."""
        write_atomically(run / "engine.json", (json.dumps(self.to_json(), indent=2) + "\n").encode())
