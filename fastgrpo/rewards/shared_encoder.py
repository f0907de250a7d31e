"""Encoders that several terms use: each is loaded once, and encodes a text or a batch of images once.

On a GPU, float32 products take half of the reward's time several times over, so that images, unlike texts, may be encoded
with TF32's: what goes into a product is rounded to 10 bits behind the point, as float16 has, sums and all between stay
float32. With any rounding of theirs a feature moves by less than TF32_TOLERANCE, an advantage within its group by less than 3% of
a standard deviation (`tests/rewards/test_rewards.py` imitates it). A tower cast to bfloat16, with 7 bits and activations in them
too, would be off eight times as much, and one in float16 may overflow.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.rewards.encoder import OpenClipEncoder, load_encoder

TF32_TOLERANCE = 2**-8
"""How far a unit vector of an image's, and with it a cosine, may move: four units of a mantissa of 10 bits."""

_TF32_LOCK = threading.RLock()


class SharedEncoder:
    """An encoder that remembers: every text's vector, and those of the images it was given last.

    tf32: whether images may be encoded with TF32's products, on GPUs that have them.
    """

    def __init__(self, encoder: OpenClipEncoder, tf32: bool = False):
        self._encoder, self._tf32 = encoder, tf32
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
            with tf32_products() if self._tf32 else nullcontext():
                self._images, self._features = images, self._encoder.encode_image(images, batch)
        return self._features

    def forget_images(self) -> None:
        """Let go of the images and their features."""
        self._images = self._features = None


class Encoders:
    """The encoders of one reward on one device, each loaded when first asked for. tf32: as SharedEncoder's."""

    def __init__(self, device: torch.device, tf32: bool = False):
        self._device, self._tf32 = device, tf32
        self._loaded: dict[str, SharedEncoder] = {}
        self.models: dict[str, nn.Module] = {}  # by the field that first asked for each

    def __call__(self, spec: str, field: str) -> SharedEncoder:
        """The encoder `spec`, in the notation of `load_encoder`. Raises ConfigError, which names `field`."""
        if spec not in self._loaded:
            encoder = load_encoder(spec, self._device, field=field)
            self._loaded[spec], self.models[field] = SharedEncoder(encoder, self._tf32), encoder.model
        return self._loaded[spec]

    def forget_images(self) -> None:
        """Let go of the images that were scored last."""
        for encoder in self._loaded.values():
            encoder.forget_images()


@contextmanager
def tf32_products() -> Iterator[None]:
    """Float32 matrix products of the block, on GPUs that have it, are TF32's; afterwards they are what they were before.

    The setting is the process's: another thread's float32 products of that time would be TF32's too, but none is left so.
    """
    matmul = torch.backends.cuda.matmul
    with _TF32_LOCK:
        before = matmul.fp32_precision
        if before == "tf32":
            yield
            return
        # The old name sets the new one too. PyTorch's own code asks for either, and refuses to compute where they differ.
        matmul.allow_tf32 = True
        try:
            yield
        finally:
            matmul.allow_tf32 = False
            matmul.fp32_precision = before
