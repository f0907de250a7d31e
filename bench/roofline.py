"""The floor under an iteration: what its phases compute and move, over the rates that the device was measured at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from throughput import learned_steps
from throughput_table import OURS, median_of

from fastgrpo.costs.throughput import Accounting, Rows, rollout_rows
from fastgrpo.settings.schema import TrainConfig

OPTIMIZER_BYTES = 4 * 4 + 3 * 4 + 4
"""For each trained parameter: weight, gradient and two moments are read, the others written, and the gradient set
to 0.
"""


@dataclass(frozen=True)
class Phase:
    """One phase of an iteration. flop, bytes: what it computes and moves; only the optimizer's bytes are counted.

    floor: seconds that takes at the measured rates. reached: seconds it took.
    """

    name: str
    flop: float
    bytes: float
    floor: float
    reached: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def phases(
    config: TrainConfig, accounting: Accounting, parameters: int, rows: Sequence[Mapping[str, Any]]
) -> tuple[Phase, ...]:
    """Of our iteration as `rows` have it. parameters: that are trained. Decoding is part of the rollout."""
    images = config.prompts_per_iteration * config.group_size
    pairs = images * learned_steps(config) * config.rollout.halves
    work = {
        "rollout": (rollout_rows(config, images), 0.0),
        "reward": (Rows(encoded=images), 0.0),
        "update": (
            Rows(forward=pairs if config.grpo.kl > 0 else 0, forward_backward=pairs),
            float(OPTIMIZER_BYTES * parameters * config.updates_per_iteration),
        ),
    }
    found = []
    for name, (done, moved) in work.items():
        flop = float(accounting.flop(done))
        floor = flop / accounting.rates.matmul + moved / accounting.rates.copy
        found.append(Phase(name, flop, moved, floor, median_of(rows, OURS, f"time/{name}_s")))
    return tuple(found)
