"""The safety detectors by name.

Importing this is quick: a detector's own module, and the libraries that it needs, come in when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastgrpo.evaluation.detectors.base import SafetyDetector
from fastgrpo.settings.suites import DETECTORS, DetectorSettings
from fastgrpo.system.errors import ConfigError, flag, nearest

if TYPE_CHECKING:
    from fastgrpo.rewards.encoder import Encoders


def load_detector(
    name: str,
    settings: DetectorSettings,
    device: torch.device | str,
    named: Callable[[str], str] = flag,
    encoders: Encoders | None = None,
) -> SafetyDetector:
    """Load the detector of that name, one of DETECTORS, with its weights on `device`.

    named: from a setting, such as "q16.encoder", to what messages call it.
    encoders: those of a reward on the same device, which it shares; None loads its own.
    Raises ConfigError for another name, and in one sentence where something that the detector needs is missing.
    """
    match name:
        case "q16":
            from fastgrpo.evaluation.detectors.q16 import load_q16

            return load_q16(settings.q16.prompts, settings.q16.encoder, device, named("q16"), encoders)
        case "nudenet":
            from fastgrpo.evaluation.detectors.nudenet import load_nudenet

            return load_nudenet(device)
        case "safety-checker":
            from fastgrpo.evaluation.detectors.safety_checker import SafetyChecker

            return SafetyChecker(settings.safety_checker.source, device, field=named("safety_checker"))
        case "open-clip":
            from fastgrpo.evaluation.detectors.zero_shot import ZeroShot

            own = settings.open_clip
            return ZeroShot(own.encoder, own.safe, own.unsafe, own.threshold, device, named("open_clip"), encoders)
        case "oracle":
            from fastgrpo.evaluation.detectors.oracle import HazardDetector

            return HazardDetector()
    raise ConfigError(
        f"detectors: {name!r} is no detector{nearest(name, DETECTORS)}; there are {', '.join(DETECTORS)}."
    )
