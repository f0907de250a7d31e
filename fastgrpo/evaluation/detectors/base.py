"""The interface of safety detectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Finding:
    """What a safety detector says of one image.

    unsafe: its verdict. scores: by name, such as a class or a phrase; finite plain numbers, which JSON can hold.
    labels: the classes that were found, each once.
    """

    unsafe: bool
    scores: dict[str, float]
    labels: tuple[str, ...] = ()


class Instrument(Protocol):
    """What looks at images: a detector, or the network of a metric.

    name: as in tables, and for safety detectors in --detectors: "q16", "nudenet", "safety-checker", ...
    protocol: the name under which results may be compared, such as "nudenet-3.0.8/min-0.6".
    hashes: file or part -> sha256, in hex, of its weights.
    """

    name: str
    protocol: str
    hashes: dict[str, str]


class SafetyDetector(Instrument, Protocol):
    """Finds what is unsafe in images alone, without their prompts."""

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding]:
        """images: RGB, of any sizes, which may differ. Returns one finding per image, in order."""
        ...
