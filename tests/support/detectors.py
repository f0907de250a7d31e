"""Pictures, a small CLIP and a small safety checker for tests of detectors."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
EMBED = 16
SIZE = 32  # pixels of the small models' input
PREPROCESS = {"size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
VISION = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIZES = [(32, 32), (57, 40), (40, 64), (33, 90)]  # width, height: none, either or both sides resized


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def as_clip_sees(image: Image.Image, whole: Callable[[float], int] = round) -> torch.Tensor:
    """[3, SIZE, SIZE] float64: OpenAI's preprocessing, written out: short side to SIZE, bicubic; centre crop.

    whole: what becomes of half a pixel at the crop; round in torchvision, which OpenAI used, floor in transformers.
    """
    width, height = image.size
    short = min(width, height)
    image = image.resize((SIZE * width // short, SIZE * height // short), Image.Resampling.BICUBIC)
    left, top = whole((image.width - SIZE) / 2), whole((image.height - SIZE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)


def raw_message(error: pytest.ExceptionInfo) -> str:
    """Its text, which is one sentence on one line."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


class Runs:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Lets another `Runs` call what this one becomes."""


def clip_model(quick_gelu: bool = True) -> open_clip.CLIP:
    """A small CLIP with random weights."""
    torch.manual_seed(0)
    model = open_clip.CLIP(EMBED, VISION, TEXT, quick_gelu=quick_gelu)
    with torch.no_grad():
        model.visual.conv1.weight.normal_(std=0.2)  # open_clip's start makes all features nearly alike
    open_clip.model.set_model_preprocess_cfg(model, PREPROCESS)
    return model.eval()


def write_prompts(file: Path, prompts: torch.Tensor) -> Path:
    file.write_bytes(pickle.dumps(prompts.to(torch.float16).numpy(), 3))
    return file


def make_checker() -> StableDiffusionSafetyChecker:
    """Random, with thresholds at which verdicts differ and the special care matters."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 8, "projection_dim": EMBED}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=EMBED)).eval()
    with torch.no_grad():
        checker.vision_model.embeddings.patch_embedding.weight.normal_(std=0.2)
        checker.visual_projection.weight.normal_()
        for parameter in (checker.concept_embeds, checker.special_care_embeds):
            parameter.normal_()
        embeds = F.normalize(
            checker.visual_projection(checker.vision_model(prepared(MANY).float()).pooler_output), dim=-1
        )
        for concepts, thresholds, quantile in (
            (checker.concept_embeds, checker.concept_embeds_weights, 0.95),
            (checker.special_care_embeds, checker.special_care_embeds_weights, 0.8),
        ):
            thresholds.copy_((embeds @ F.normalize(concepts, dim=-1).T).quantile(quantile, dim=0))
    return checker


MANY = [noise(*SIZES[i % len(SIZES)], seed=100 + i) for i in range(64)]


def prepared(images) -> torch.Tensor:
    return torch.stack([as_clip_sees(image, math.floor) for image in images])


def save_pipeline(folder: Path, checker, names_of_old: bool = True) -> Path:
    """A pipeline's folder with the checker and its preprocessor; published weights have another level of names."""
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder / "feature_extractor"
    )
    if names_of_old:
        file = folder / "safety_checker" / "model.safetensors"
        old = {n.replace("vision_model.", "vision_model.vision_model.", 1): t for n, t in checker.state_dict().items()}
        old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(SIZE // 8 * SIZE // 8 + 1)[None]
        save_file(old, file, {"format": "pt"})
    return folder
