"""Stable Diffusion's own safety checker: an image's CLIP embedding beside 17 concepts, known by their vectors only.

With z the image's embedding, c_k the concepts with thresholds t_k, and s_j three concepts for special care (depictions
of children) with thresholds u_j:

    special_j = round(cos(z, s_j) - u_j, 3)
    concept_k = round(cos(z, c_k) - t_k + (0.01 where some special_j > 0), 3)
    unsafe where some concept_k > 0

Model and weights are diffusers' StableDiffusionSafetyChecker. Its forward returns no scores and blacks out unsafe
images; the few lines after its vision model are our own, and the images stay as they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.images.files import chunks
from fastgrpo.models.repository import Repository
from fastgrpo.models.tensor_file import check_content
from fastgrpo.models.whole import load_whole
from fastgrpo.rewards.encoder import ImageTransform
from fastgrpo.system.errors import ConfigError, first_sentence
from fastgrpo.system.files import file_sha256, reading
from fastgrpo.system.memory import halve_until_it_fits
from fastgrpo.system.offload import offload, resident
from fastgrpo.system.pulse import PULSE

ADJUSTMENT = np.float32(0.01)
_CLASS = StableDiffusionSafetyChecker
_FOLDER, _WEIGHTS = "safety_checker/", "model.safetensors"


class SafetyChecker:
    """Finds images unsafe that diffusers' pipelines would black out."""

    name = "safety-checker"
    protocol = "sd-safety-checker/adjustment-0"

    def __init__(self, source: str, device: torch.device | str = "cpu", field: str = "safety_checker") -> None:
        """source: a pipeline with one, or one that stands alone, in a folder or on the Hugging Face hub. field: what
        messages call its settings. Raises ConfigError where there is none, or its weights are not whole.
        """
        repository = Repository(f"{field}.source", source, layout="diffusers folder with a safety_checker")
        what, files = f"{field}.source is {source!r}", repository.files()
        prefix = _FOLDER if _FOLDER + "config.json" in files else ""
        if not {prefix + "config.json", prefix + _WEIGHTS} <= files:
            raise ConfigError(
                f"{what}, which has no safety checker in {_FOLDER}; accepted is a pipeline that has, as Stable "
                f"Diffusion 1.x does, or a folder with its config.json and {_WEIGHTS}."
            )
        preprocessor = ("feature_extractor/" if prefix else "") + "preprocessor_config.json"
        folder = repository.fetch([prefix + "config.json", prefix + _WEIGHTS, preprocessor])
        weights, config = folder / prefix / _WEIGHTS, folder / prefix / "config.json"
        check_content(weights, f"{field}.source")
        with reading(config):
            kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures", [])
        if kinds != [_CLASS.__name__]:
            raise ConfigError(f"{what}, which is a {', '.join(map(str, kinds))}; a {_CLASS.__name__} is accepted.")
        checker = load_whole(_CLASS, config.parent, f"{what}, whose safety checker")
        self.processor = _processor(folder / preprocessor, checker.config.vision_config.image_size, what)
        self.checker = checker.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.transform = _transform(self.processor, checker.config.vision_config.image_size, self.device)
        self.hashes = {_FOLDER + _WEIGHTS: file_sha256(weights)}

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding]:
        """images: RGB, of any sizes. Scores: `special_0` ..., and `concept_0` ..., of which one above 0 is unsafe."""
        findings = []
        for chunk in chunks(images):
            pixels = self.processor(chunk, return_tensors="pt")["pixel_values"]
            for special, concept in zip(*self.scores(pixels), strict=True):
                scores = {f"special_{j}": float(score) for j, score in enumerate(special)}
                scores |= {f"concept_{k}": float(score) for k, score in enumerate(concept)}
                findings.append(Finding(bool((concept > 0).any()), scores))
        return findings

    @torch.no_grad()
    def safety(self, images: Tensor, batch: int) -> Tensor:
        """Minus the largest concept_k, within -2 and 2, and below 0 where the image is unsafe.

        Images are prepared on the device, and concepts not rounded: equal rewards teach nothing.
        """

        def largest(at_once: int) -> Tensor:
            found = []
            for chunk in images.split(at_once):
                PULSE.mark()
                special, concept = self._above(self.transform(chunk.to(self.device)))
                # As they are when rounded to three decimals.
                adjustment = (special > 0.0005).any(1) * float(ADJUSTMENT)
                found.append(concept.amax(1) + adjustment)
            return torch.cat(found)

        with resident(self.checker):
            return -halve_until_it_fits(largest, min(batch, max(len(images), 1)), "images are checked")[0]

    def offload(self) -> None:
        """Keep the checker in the host's memory while it is not used. On a CPU nothing is moved."""
        offload((*self.checker.parameters(), *self.checker.buffers()), self.checker, self.device)

    @torch.no_grad()
    def scores(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[N, 3, h, w] float32, prepared -> special [N, 3] and concept [N, 17], float32 to three decimals.

        float32 throughout and NumPy's rounding, as in diffusers: a score at a threshold must fall on the same side.
        """
        special, concept = (each.cpu().numpy() for each in self._above(pixels.to(self.device)))
        special = special.round(3)
        adjustment = (special > 0).any(1, keepdims=True) * ADJUSTMENT
        return special, (concept + adjustment).round(3)

    def _above(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, h, w], prepared -> special [N, 3] and concept [N, 17], before adjustment and rounding."""
        checker = self.checker
        embeds = checker.visual_projection(checker.vision_model(pixels).pooler_output)
        special = _above(embeds, checker.special_care_embeds, checker.special_care_embeds_weights)
        return special, _above(embeds, checker.concept_embeds, checker.concept_embeds_weights)


def _processor(file: Path, size: int, what: str) -> CLIPImageProcessorPil:
    """As the file says, which some copies lack, or CLIP's own; its images must have the size that the model takes."""
    try:
        processor = CLIPImageProcessorPil.from_pretrained(file.parent) if file.is_file() else CLIPImageProcessorPil()
        given = (processor.crop_size["height"], processor.crop_size["width"])
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{what}, whose {file.name} cannot be read: {first_sentence(error)}.") from error
    if given != (size, size):
        raise ConfigError(
            f"{what}, whose {file.name} makes images of {given[1]} x {given[0]} pixels; its safety checker takes "
            f"{size} x {size}."
        )
    return processor


def _transform(processor: CLIPImageProcessorPil, size: int, device: torch.device) -> ImageTransform:
    """The same preparation of tensors, where they are."""
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    bilinear = int(processor.resample) == Image.Resampling.BILINEAR
    squash = dict(processor.size) == {"height": size, "width": size}
    return ImageTransform(size, mean, std, "bilinear" if bilinear else "bicubic", squash)


def _above(embeds: Tensor, concepts: Tensor, thresholds: Tensor) -> Tensor:
    """[N, E], [K, E], [K] -> [N, K] float32: how far the cosines are above their thresholds."""
    return F.normalize(embeds, dim=-1) @ F.normalize(concepts, dim=-1).T - thresholds
