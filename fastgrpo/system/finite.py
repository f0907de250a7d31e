"""Finding pictures that are not finite: in a file each would be black, and count as safe.

Causes are overflow (float16 ends at 65,504), damaged weights and diverged training. Numbers and gradients of such
pictures mean nothing, so the command stops and says which part of the model was the first to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgrpo.system.errors import quoted

if TYPE_CHECKING:  # commands import this for the exception, before they know whether torch is needed
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PictureSource:
    """Where a picture comes from. what: such as "image 0003". text: its prompt, if known. seed: of its noise."""

    what: str
    text: str | None = None
    seed: int | None = None

    def __str__(self) -> str:
        text = "" if self.text is None else f" of prompt {quoted(self.text)}"
        return f"{self.what}{text}" + ("" if self.seed is None else f" from seed {self.seed}")


class BrokenPicture(RuntimeError):
    """The model has drawn something that is not finite.

    message: one sentence: which one, by which part of the model, in which precision.
    request: what it was drawn for. image: [3, h, w] float32 in [0, 1], NaN where it is not finite.
    latents: [C, H, W] float32 that it was decoded from. precision: what the model computes in, such as "float16".
    """

    def __init__(self, message: str, request: PictureSource, image: Tensor, latents: Tensor, precision: str):
        super().__init__(message)
        self.message, self.request, self.precision = message, request, precision
        self.image, self.latents = image, latents

    def sentence(self, setting: str) -> str:
        """The message and what to do. setting: what the user calls the precision, `engine.dtype` or `--dtype`."""
        if self.precision == "float32":
            return f"{self.message}, so its weights are damaged or have diverged"
        others = "bf16 or fp32" if self.precision == "float16" else "fp32"
        return f"{self.message}; try {setting} {others}: if that fails too, its weights are damaged or have diverged"


def require_finite(
    images: Tensor, latents: Tensor, dtype: torch.dtype, request: Callable[[int], PictureSource], embeds: Tensor
) -> None:
    """Raise BrokenPicture for the first picture that is not finite. Waits for the device once.

    images: [N, 3, h, w], of `latents`, [N, C, H, W]. dtype: what the model computes in. request: index -> what it was
    drawn for. embeds: [N, L, D] of their prompts.
    """
    if bool(images.isfinite().all() & latents.isfinite().all()):
        return
    parts = {"text": embeds, "latents": latents, "images": images}
    fine = {name: tensors.isfinite().flatten(1).all(dim=1) for name, tensors in parts.items()}
    broken = (~(fine["latents"] & fine["images"])).nonzero().flatten().tolist()
    first = broken[0]
    if not fine["text"][first]:
        blame = "what the text encoder makes of the prompt is not"
    elif not fine["latents"][first]:
        blame = "the UNet's latents are not"
    else:
        blame = "the UNet's latents are, but not what the VAE decodes from them"
    others = f", like {len(broken)} of {len(images)} drawn with it" if len(broken) > 1 else ""
    precision = str(dtype).removeprefix("torch.")
    message = f"{request(first)} is not finite{others}: {blame}; the model computes in {precision}"
    raise BrokenPicture(message, request(first), images[first].float(), latents[first].float(), precision)
