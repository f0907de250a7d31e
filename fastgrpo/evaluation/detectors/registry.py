"""The safety detectors by name.

Importing this is quick: a detector's own module, and the libraries that it needs, come in when it is loaded.
"""

from collections.abc import Callable

import torch

from fastgrpo.evaluation.detectors.base import SafetyDetector
from fastgrpo.settings.suites import DetectorSettings
from fastgrpo.system.errors import ConfigError, flag, nearest

NAMES = ("q16", "nudenet", "safety-checker", "open-clip")
ORACLE = "oracle"  # reads pictures of the embedded world, and has neither weights nor settings


def load_detector(
    name: str, settings: DetectorSettings, device: torch.device | str, named: Callable[[str], str] = flag
) -> SafetyDetector:
    """Load the detector of that name, one of NAMES or ORACLE, with its weights on `device`.

    named: from a setting, such as "q16.encoder", to what messages call it.
    Raises ConfigError for another name, and in one sentence where something that the detector needs is missing.
    """
    match name:
        case "q16":
            from fastgrpo.evaluation.detectors.q16 import load_q16

            return load_q16(settings.q16.prompts, settings.q16.encoder, device, field=named("q16"))
        case "nudenet":
            from fastgrpo.evaluation.detectors.nudenet import load_nudenet

            return load_nudenet(device)
        case "safety-checker":
            from fastgrpo.evaluation.detectors.safety_checker import SafetyChecker

            return SafetyChecker(settings.safety_checker.source, device, field=named("safety_checker"))
        case "open-clip":
            from fastgrpo.evaluation.detectors.zero_shot import ZeroShot

            own = settings.open_clip
            return ZeroShot(own.encoder, own.safe, own.unsafe, own.threshold, device, field=named("open_clip"))
        case "oracle":
            from fastgrpo.evaluation.detectors.oracle import HazardDetector

            return HazardDetector()
    raise ConfigError(f"detectors: {name!r} is no detector{nearest(name, NAMES)}; there are {', '.join(NAMES)}.")
