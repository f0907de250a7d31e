"""From the terms in the settings to the reward: what the built-in terms compute, and how all terms are loaded."""

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.aesthetic import AestheticReward, find_predictor, read_predictor
from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.encoder import Encoders, SharedEncoder
from fastgrpo.rewards.encoder_files import TRANSFORMERS
from fastgrpo.rewards.oracle import verdicts
from fastgrpo.rewards.plugins import given_function, load_plugins
from fastgrpo.rewards.reward import Function, WeightedReward
from fastgrpo.rewards.safety import LoadDetector, SafetyReward
from fastgrpo.rewards.service.client import connect
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import RewardFunction, Term, parse_terms
from fastgrpo.rewards.transformers_clip import find_transformers_clip
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.system.errors import blaming
from fastgrpo.system.workers import available_cores
from fastgrpo.types import Prompt

JPEG_QUALITY = 95


def load_reward(
    config: RewardConfig,
    device: torch.device | str,
    load_detector: LoadDetector | None = None,
    given: Mapping[str, RewardFunction] | None = None,
) -> WeightedReward:
    """The reward that the config describes, its encoders on `device`. The user's own functions are loaded first,
    then the servers of terms service:NAME are asked what they have.

    load_detector: `evaluation.detectors.registry.load_detector`, which terms `safety:DETECTOR` need.
    given: the functions of terms given:NAME, by name.
    Raises ConfigError for terms, functions, servers, anchors, encoders and detectors that cannot be used; what is small
    or only has to be there is looked at before any encoder is loaded.
    """
    terms, device = parse_terms(config.terms), torch.device(device)
    plugins = load_plugins([term for term in terms if term.place])
    plugins |= {term.name: given_function(term, given or {}) for term in terms if term.given}
    asked = [term.service for term in terms if term.service]
    service = connect(config.service, asked) if asked else None
    for term in terms:
        _CHECKS.get(term.name, lambda _: None)(config)
    encoders = Encoders(device, config.tf32)

    def function(term: Term) -> Function:
        if term.name in plugins:
            return plugins[term.name]
        if not term.detector:
            return BUILDERS[term.name](config, encoders)
        assert load_detector is not None  # whoever scores with detectors hands it over
        detector = load_detector(term.detector, config, device, "reward.{}".format, encoders)
        return SafetyReward(term.detector, detector, config.batch)

    functions = {term.label: function(term) for term in terms if not term.service}
    return WeightedReward(terms, functions, config.standardise, encoders, service)


def _clip(config: RewardConfig, encoders: Encoders) -> RewardFunction:
    field = "reward.clip_encoder" if config.clip_encoder else "reward.encoder"
    return _cosine(encoders(config.clip_encoder or config.encoder, field), config.batch)


def _pickscore(config: RewardConfig, encoders: Encoders) -> RewardFunction:
    """PickScore (arXiv 2305.01569): the cosine times the model's logit scale, about 20, as results are published."""
    encoder = encoders(TRANSFORMERS + config.pickscore, "reward.pickscore")
    scale = encoder.encoder.model.logit_scale.detach().double().exp().item()
    cosine = _cosine(encoder, config.batch)
    return lambda images, prompts: scale * cosine(images, prompts)


def _aesthetic(config: RewardConfig, encoders: Encoders) -> RewardFunction:
    encoder = encoders(config.aesthetic_encoder, "reward.aesthetic_encoder")
    return AestheticReward(encoder, config.aesthetic, config.batch)


def _check_pickscore(config: RewardConfig) -> None:
    with blaming("reward.pickscore"):
        find_transformers_clip(config.pickscore)


_CHECKS: dict[str, Callable[[RewardConfig], object]] = {
    "pickscore": _check_pickscore,
    "aesthetic": lambda config: read_predictor(find_predictor(config.aesthetic), "reward.aesthetic"),
}


BUILDERS: dict[str, Callable[[RewardConfig, Encoders], Function]] = {
    "steering": lambda config, encoders: SteeringReward(
        encoders(config.encoder, "reward.encoder"), load_anchors(config.anchors), config
    ),
    "clip": _clip,
    # The score of HPSv2 (arXiv 2306.09341) is the bare cosine, without the model's logit scale.
    "hpsv2": lambda config, encoders: _cosine(encoders("hpsv2", "reward.terms"), config.batch),
    "pickscore": _pickscore,
    "aesthetic": _aesthetic,
    "compressibility": lambda config, encoders: lambda images, prompts: -jpeg_kilobytes(images),
    "incompressibility": lambda config, encoders: lambda images, prompts: jpeg_kilobytes(images),
    "oracle": lambda config, encoders: verdicts,
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
