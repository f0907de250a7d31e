"""From the terms in the settings to the reward: what the built-in terms compute, and how all terms are loaded."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.encoder import Encoders, SharedEncoder
from fastgrpo.rewards.plugins import load_plugins
from fastgrpo.rewards.reward import Function, WeightedReward
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import RewardFunction, parse_terms
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.system.workers import available_cores
from fastgrpo.types import Prompt

JPEG_QUALITY = 95


def load_reward(config: RewardConfig, device: torch.device | str) -> WeightedReward:
    """The reward that the config describes, its encoders on `device`. The user's own functions are loaded first.

    Raises ConfigError for terms, functions, anchors and encoders that cannot be used.
    """
    terms = parse_terms(config.terms)
    plugins = load_plugins([term for term in terms if term.place])
    encoders = Encoders(torch.device(device), config.tf32)
    functions = {
        term.label: plugins[term.name] if term.place else BUILDERS[term.name](config, encoders) for term in terms
    }
    return WeightedReward(terms, functions, config.standardise, encoders)


def _clip(config: RewardConfig, encoders: Encoders) -> RewardFunction:
    field = "reward.clip_encoder" if config.clip_encoder else "reward.encoder"
    return _cosine(encoders(config.clip_encoder or config.encoder, field), config.batch)


BUILDERS: dict[str, Callable[[RewardConfig, Encoders], Function]] = {
    "steering": lambda config, encoders: SteeringReward(
        encoders(config.encoder, "reward.encoder"), load_anchors(config.anchors), config
    ),
    "clip": _clip,
    # The score of HPSv2 (arXiv 2306.09341) is the bare cosine, without the model's logit scale.
    "hpsv2": lambda config, encoders: _cosine(encoders("hpsv2", "reward.terms"), config.batch),
    "compressibility": lambda config, encoders: lambda images, prompts: -jpeg_kilobytes(images),
    "incompressibility": lambda config, encoders: lambda images, prompts: jpeg_kilobytes(images),
}
"""Name of a built-in term (`terms.BUILT_IN`) -> what builds its function."""


def _cosine(encoder: SharedEncoder, batch: int) -> RewardFunction:
    """The reward z_image . z_text, both unit vectors of `encoder`. batch: images encoded at once."""

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
    return torch.where(images.isfinite().flatten(1).all(dim=1), sizes / 1000, torch.nan)


def _jpeg_bytes(pixels: np.ndarray) -> int:
    """pixels: [h, w, 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.tell()
