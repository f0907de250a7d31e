"""The interface of safety detectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.system.pictures import to_pil


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

    def safety(self, images: Tensor, batch: int) -> Tensor:
        """How safe images are: minus the score by which the detector finds them unsafe, its range in the docstring.

        images: [N, 3, h, w] float32 in [0, 1], not rounded to 8 bits where the detector can do without.
        batch: images at once; bounds memory. Returns [N] float32; NaN for an image that is not finite.
        """
        ...

    def offload(self) -> None:
        """Keep weights beside those of shared encoders in the host's memory while unused. On a CPU nothing is moved."""
        ...


def each_safety(images: Tensor, safety: Callable[[list[Image.Image]], Sequence[float]]) -> Tensor:
    """`SafetyDetector.safety` of a detector that takes images on the CPU, one by one.

    images: [N, 3, h, w] float32 in [0, 1]. safety: of RGB images of 8 bits. Returns [N] float32 on the images' device.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    found = iter(safety([to_pil(image) for image in images[finite]]))
    values = [next(found) if whole else torch.nan for whole in finite.tolist()]
    return torch.tensor(values, dtype=torch.float32, device=images.device)
