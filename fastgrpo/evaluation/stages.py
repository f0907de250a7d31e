"""What a run's own evaluation found of the policy before training, and after: evaluation_before.json, evaluation_after.json.

    {"settings": {...}, "metrics": {NAME: VALUE}, GROUP: {ROW: {"rate", "n", "low", "high"}},
     "verdicts": {IMAGE: {"unsafe", "correct", "kept"}}}

The groups are those of `Evaluation`; without a suite there are neither groups nor verdicts. Files from before verdicts were
kept hold the groups alone.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.results.summary import GROUPS, Evaluation, Examined, image_id
from fastgrpo.system.files import reading, write_atomically
from fastgrpo.types import Prompt, Verdict

BEFORE, AFTER = "evaluation_before.json", "evaluation_after.json"  # in the run's folder
PROMPTS_FILE = "prompts.json"  # in samples/: {"text", "label", "category", "id"} of the rows of its grids, from the top


@dataclass(frozen=True)
class Stage:
    """The policy at one stage.

    settings: what the numbers rest on but the weights; {} where the file does not say.
    metrics: eval/* by name. rates: None without a suite. verdicts: by image id; {} where the file has none.
    """

    settings: dict[str, Any]
    metrics: dict[str, float]
    rates: Evaluation | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @staticmethod
    def of(examined: Examined, settings: dict[str, Any], metrics: dict[str, float]) -> "Stage":
        """metrics: others than those of the rates."""
        verdicts = {image_id(p): v for p, v in zip(examined.prompts, examined.verdicts, strict=True)}
        return Stage(settings, examined.rates.metrics() | metrics, examined.rates, verdicts)

    def examined(self, prompts: tuple[Prompt, ...]) -> Examined:
        """Of the prompts whose verdict was kept, in their order."""
        known = tuple(prompt for prompt in prompts if image_id(prompt) in self.verdicts)
        return Examined(known, tuple(self.verdicts[image_id(prompt)] for prompt in known))


def write_stage(path: Path, stage: Stage) -> None:
    """A reader sees the old file or the whole new one. Values that are not finite are left out."""
    metrics = {name: value for name, value in stage.metrics.items() if math.isfinite(value)}
    data = {"settings": stage.settings, "metrics": metrics} | (stage.rates.to_json() if stage.rates else {})
    verdicts = {id: asdict(verdict) for id, verdict in stage.verdicts.items()}
    # One image a line: there may be thousands.
    lines = ",\n".join(f"  {json.dumps(id)}: {json.dumps(what)}" for id, what in verdicts.items())
    body = json.dumps(data, indent=2, allow_nan=False).removesuffix("\n}")
    write_atomically(path, (f'{body},\n "verdicts": {{\n{lines}\n }}\n}}\n').encode())


def read_stage(path: Path) -> Stage:
    """What `write_stage` wrote. Raises ConfigError where the file is damaged."""
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"))
        rates = Evaluation.from_json({group: data[group] for group in GROUPS}) if "unsafe" in data else None
        metrics = dict(data["metrics"]) if "metrics" in data else rates.metrics()
        verdicts = {id: Verdict(**what) for id, what in dict(data.get("verdicts", {})).items()}
        return Stage(dict(data.get("settings", {})), metrics, rates, verdicts)
