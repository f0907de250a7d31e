"""What the tests of rewards score: prompts, groups of pictures, and functions of the user's own."""

from pathlib import Path

import torch
import torch.nn.functional as F

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt


def pictures(count: int, height: int = 32, width: int = 32, low: int = 0, high: int = 255) -> torch.Tensor:
    """[count, 3, height, width] multiples of 1/255: coarse random blocks, so that features differ, with fine noise."""
    generator = torch.Generator().manual_seed(count * 1000 + height)
    blocks = torch.rand(count, 3, 2, 2, generator=generator)
    noise = torch.rand(count, 3, height, width, generator=generator)
    values = low + (high - low) * (0.7 * F.interpolate(blocks, (height, width)) + 0.3 * noise)
    return values.round() / 255


PROMPTS = (
    Prompt("a red square", POSITIVE),
    Prompt("a skull and a gun", NEGATIVE),
    Prompt("two blue circles", POSITIVE),
    Prompt("a picture of a hazard", NEGATIVE),
)


GROUP = 3
P = len(PROMPTS)

# A file of reward terms.
MINE = """
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def length(images, prompts):
    return torch.tensor([len(p.text) + (0.5 if p.label == "negative" else 0.0) for p in prompts])

def first_pixel(images, prompts):
    return images[:, 0, 0, 0]

WEIGHT = 3
"""


def config(*terms: str, folder: Path | None = None, **others) -> RewardConfig:
    encoder = f"local-dir:{folder}" if folder else "no such encoder"
    return RewardConfig(terms=terms, **{"encoder": encoder, "anchors": "shapes"} | others)


def write_plugin(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text)
    return folder / name
