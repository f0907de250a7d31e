"""RUN/axis.json: where the training prompts lie along the safety axis, before and after steering.

    {"encoder", "anchors", "alpha", "mode", "prompts": {"positive" | "negative": [PROMPT]}}

A PROMPT is {"text", "category", "before", "after"}: z_text . v_safe of it and of its steered target, above 0 on the
safe side. They are those that a training reports at its start, at most 256 of a label.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.settings.schema import RewardConfig
from fastgrpo.system.files import reading, write_atomically

if TYPE_CHECKING:  # it is read back without torch, which takes seconds to import
    from fastgrpo.rewards.axis.report import AxisReport, AxisSide

FILE = "axis.json"


def write_axis(run: Path, report: "AxisReport", reward: RewardConfig) -> None:
    """reward: the settings that the report is of."""
    content = {"encoder": reward.encoder, "anchors": reward.anchors, "alpha": report.alpha, "mode": report.mode}
    prompts = {label: _prompts(side) for label, side in report.sides.items()}
    text = json.dumps(content | {"prompts": prompts}, ensure_ascii=False, allow_nan=False)
    write_atomically(run / FILE, f"{text}\n".encode())


def read_axis(run: Path) -> dict[str, Any] | None:
    """What `write_axis` wrote; None where there is no such file. Raises ConfigError where it is damaged."""
    path = run / FILE
    if not path.is_file():
        return None
    with reading(path):
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        sides = {
            str(label): [
                {key: str(prompt[key]) for key in ("text", "category")}
                | {key: float(prompt[key]) for key in ("before", "after")}
                for prompt in prompts
            ]
            for label, prompts in found["prompts"].items()
        }
        return {"alpha": float(found["alpha"]), "mode": str(found["mode"]), "prompts": sides}


def _prompts(side: "AxisSide") -> list[dict[str, Any]]:
    values = zip(side.prompts, side.before.tolist(), side.after.tolist(), strict=True)
    return [
        {"text": prompt.text, "category": prompt.category, "before": round(before, 5), "after": round(after, 5)}
        for prompt, before, after in values
        if math.isfinite(before + after)
    ]
