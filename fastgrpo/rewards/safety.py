"""A safety detector of the evaluation as a reward: the safer it finds an image, the more that is worth."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.rewards.encoder import Encoders
from fastgrpo.settings.suites import DetectorSettings
from fastgrpo.types import Prompt


class Detector(Protocol):
    """What the reward needs of a detector: see `evaluation.detectors.base.SafetyDetector`."""

    hashes: dict[str, str]

    def safety(self, images: Tensor, batch: int) -> Tensor: ...

    def offload(self) -> None: ...


LoadDetector = Callable[[str, DetectorSettings, torch.device, Callable[[str], str], Encoders], Detector]
"""`evaluation.detectors.registry.load_detector`: the evaluation lies above the rewards, which are handed it."""


class SafetyReward:
    """The reward `safety:DETECTOR`, for any prompt."""

    def __init__(self, name: str, detector: Detector, batch: int) -> None:
        """name: the detector's. batch: images at once."""
        self.hashes = {f"{part} of the detector {name}": digest for part, digest in detector.hashes.items()}
        self._detector, self._batch = detector, batch

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[N, 3, h, w] float32 in [0, 1] and N prompts, which do not matter -> [N] float32."""
        return self._detector.safety(images, self._batch)

    def offload(self) -> None:
        """Keep the detector's own weights in the host's memory while they are not used."""
        self._detector.offload()
