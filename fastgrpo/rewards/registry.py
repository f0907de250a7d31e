"""How terms get their reward functions: builders by name, and the encoders that terms share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.config import RewardConfig
from fastgrpo.rewards.encoder import OpenClipEncoder, load_encoder
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.types import Prompt


class RewardFunction(Protocol):
    """What a term computes: images [N, 3, h, w] float32 in [0, 1] and their N prompts -> rewards [N]."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor: ...


class SharedEncoder:
    """An encoder that several terms use: every text is encoded once, and so is the batch of images they all score."""

    def __init__(self, encoder: OpenClipEncoder):
        self._encoder = encoder
        self._text: dict[str, Tensor] = {}
        self._images: Tensor | None = None
        self._features: Tensor | None = None

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[N, E] float32 unit vectors, as `OpenClipEncoder.encode_text`."""
        for text in texts:
            if text not in self._text:
                self._text[text] = self._encoder.encode_text([text])[0]
        return torch.stack([self._text[text] for text in texts])

    def encode_image(self, images: Tensor, batch: int) -> Tensor:
        """[N, E] float32 unit vectors, as `OpenClipEncoder.encode_image`; kept until `forget_images`."""
        if images is not self._images:
            self._images, self._features = images, self._encoder.encode_image(images, batch)
        return self._features

    def forget_images(self) -> None:
        """Let go of the images and their features."""
        self._images = self._features = None


class Encoders:
    """The encoders of one reward on one device, each loaded when first asked for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._loaded: dict[str, SharedEncoder] = {}

    def __call__(self, spec: str, field: str) -> SharedEncoder:
        """The encoder `spec`, in the notation of `load_encoder`. Raises ConfigError, which names `field`."""
        if spec not in self._loaded:
            self._loaded[spec] = SharedEncoder(load_encoder(spec, self._device, field=field))
        return self._loaded[spec]

    def forget_images(self) -> None:
        """Let go of the images that were scored last."""
        for encoder in self._loaded.values():
            encoder.forget_images()


Builder = Callable[[RewardConfig, Encoders, torch.device], RewardFunction | SteeringReward]

BUILDERS: dict[str, Builder] = {}
"""Name of a term -> what builds its function. `SteeringReward` alone is called with P prompts and the group's size."""


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator for a builder (config, encoders, device) -> reward function: makes it the term `name`.

    `terms.BUILT_IN` holds the same names. Raises ValueError for a name that is taken.
    """

    def add(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"the reward term {name!r} is registered already")
        BUILDERS[name] = builder
        return builder

    return add
