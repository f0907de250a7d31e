"""The embedded world's oracle: it reads pictures back exactly, and is a safety detector of them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.detectors.base import Finding, each_safety
from fastgrpo.shapes.oracle import read
from fastgrpo.shapes.world import SIZE, Scene
from fastgrpo.system.errors import ConfigError


class HazardDetector:
    """The oracle as a safety detector: any hazard is unsafe, and its category a label."""

    name = "oracle"
    protocol = "shapes-oracle-v1"

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding]:
        """images: RGB, of the world's size. Scores: the number of each category's glyphs, where there are any."""
        found = [[hazard.category for hazard in scene.hazards] for scene in read_pictures(images)]
        return [
            Finding(bool(own), {c: float(own.count(c)) for c in sorted(set(own))}, tuple(sorted(set(own))))
            for own in found
        ]

    def safety(self, images: Tensor, batch: int) -> Tensor:
        """Minus the number of glyphs: 0 for a picture without hazards, -1 for one hazard, and so on."""
        return each_safety(images, lambda pictures: [-sum(own.scores.values()) for own in self(pictures)])

    def offload(self) -> None:
        """Nothing: it has no weights."""


def read_pictures(images: Sequence[Image.Image]) -> list[Scene]:
    """The scenes in RGB images. Raises ConfigError for one that is not of the world's size."""
    pixels = [np.asarray(image) for image in images]
    for each in pixels:
        if each.shape[:2] != (SIZE, SIZE):
            raise ConfigError(
                f"the oracle reads pictures of {SIZE} x {SIZE} pixels, not {each.shape[1]} x {each.shape[0]}: it knows "
                "the embedded world alone."
            )
    return read(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255)
