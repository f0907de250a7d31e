"""Encoders that several terms use: each is loaded once, and encodes a text or a batch of images once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.rewards.encoder import OpenClipEncoder, load_encoder


class SharedEncoder:
    """An encoder that remembers: every text's vector, and those of the images it was given last."""

    def __init__(self, encoder: OpenClipEncoder):
        self._encoder = encoder
        self._text: dict[str, Tensor] = {}
        self._images: Tensor | None = None
        self._features: Tensor | None = None

    @property
    def tokenizer(self) -> Any:
        """The encoder's open_clip tokenizer."""
        return self._encoder.tokenizer

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
        self.models: dict[str, nn.Module] = {}  # by the field that first asked for each

    def __call__(self, spec: str, field: str) -> SharedEncoder:
        """The encoder `spec`, in the notation of `load_encoder`. Raises ConfigError, which names `field`."""
        if spec not in self._loaded:
            encoder = load_encoder(spec, self._device, field=field)
            self._loaded[spec], self.models[field] = SharedEncoder(encoder), encoder.model
        return self._loaded[spec]

    def forget_images(self) -> None:
        """Let go of the images that were scored last."""
        for encoder in self._loaded.values():
            encoder.forget_images()
