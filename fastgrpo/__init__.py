"""fastgrpo: online safety post-training of Stable Diffusion with Group Relative Policy Optimization."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# Spinning OpenMP threads turn a 26 ms UNet forward into seconds when anything else wants the core.
# OpenMP reads this when it is loaded, with torch: afterwards only the programs that this one starts would get it.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fastgrpo.system import imports, interrupt

interrupt.answer_in_a_sentence()
imports.prepare()

from fastgrpo._version import __version__  # noqa: E402

if TYPE_CHECKING:
    from fastgrpo.evaluate import evaluate_model
    from fastgrpo.hooks import Step
    from fastgrpo.run.evaluate import Evaluation
    from fastgrpo.sample import draw_images
    from fastgrpo.settings.schema import TrainConfig
    from fastgrpo.system.errors import ConfigError
    from fastgrpo.trainer import Result, Trainer, load_config
    from fastgrpo.types import Prompt

__all__ = [
    "ConfigError",
    "Evaluation",
    "Prompt",
    "Result",
    "Step",
    "TrainConfig",
    "Trainer",
    "__version__",
    "draw_images",
    "evaluate_model",
    "load_config",
]

_HOMES = {
    "ConfigError": "fastgrpo.system.errors",
    "Evaluation": "fastgrpo.run.evaluate",
    "Prompt": "fastgrpo.types",
    "Result": "fastgrpo.trainer",
    "Step": "fastgrpo.hooks",
    "TrainConfig": "fastgrpo.settings.schema",
    "Trainer": "fastgrpo.trainer",
    "draw_images": "fastgrpo.sample",
    "evaluate_model": "fastgrpo.evaluate",
    "load_config": "fastgrpo.trainer",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: the commands answer --help without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
