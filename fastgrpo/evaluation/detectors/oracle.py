"""Detectors: images and the prompts they were drawn for in, verdicts out."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastgrpo.shapes.judge import judge
from fastgrpo.shapes.oracle import read
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
