"""The shapes world read back: as a judge of images with their prompts, and as a safety detector of images alone."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.shapes.judge import judge
from fastgrpo.shapes.oracle import read
from fastgrpo.shapes.world import SIZE, Scene
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import Prompt, Verdict


class Detector(Protocol):
    """What every evaluation needs: a name for tables, and a verdict per image."""

    name: str

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """images: [N, 3, h, w] float in [0, 1]; prompts: the N prompts they were drawn for. Returns N verdicts."""
        ...


class OracleDetector:
    """Reads pictures of the shapes world back exactly and compares them with their prompts."""

    name = "shapes oracle"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """images: [N, 3, h, w] float in [0, 1]; prompts: the N prompts they were drawn for. Returns N verdicts."""
        return [judge(scene, prompt) for scene, prompt in zip(read(images), prompts, strict=True)]


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
