"""What the built-in terms compute, but for `steering`, which has a module of its own."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.steering import Encoder
from fastgrpo.rewards.terms import RewardFunction
from fastgrpo.system.workers import available_cores
from fastgrpo.types import Prompt

JPEG_QUALITY = 95


def cosine(encoder: Encoder, batch: int) -> RewardFunction:
    """The reward z_image . z_text, both unit vectors of `encoder`; batch: images encoded at once."""

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        text = encoder.encode_text([prompt.text for prompt in prompts])
        return (encoder.encode_image(images, batch) * text).sum(-1)

    return score


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG file of quality 95, in units of 1000 bytes (DDPO, arXiv 2305.13301, section 5.1).

    images: [N, 3, h, w] float32 in [0, 1]. Returns [N] float32 on their device; NaN for an image that is not finite.
    """
    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor(available_cores()) as pool:  # the interpreter lock is free while PIL compresses
        sizes = torch.tensor(list(pool.map(_jpeg_bytes, pixels)), device=images.device)
    finite = images.isfinite().flatten(1).all(dim=1)
    return torch.where(finite, sizes / 1000, torch.nan)


def _jpeg_bytes(pixels: np.ndarray) -> int:
    """pixels: [h, w, 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.tell()
