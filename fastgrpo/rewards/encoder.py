"""The frozen image-and-text encoder of a reward: an open_clip model or its like, and what lets terms share one.

On a GPU, float32 products take half of the reward's time several times over, so that images, unlike texts, may be
encoded with TF32's: they round factors to 10 bits behind the point, as float16 has, and sum in float32. With any
rounding of theirs a feature moves by less than TF32_TOLERANCE, and an advantage within its group by less than 3% of a
standard deviation (the tests of rewards imitate it). Towers cast to bfloat16, which has 7 bits, and for activations
too, would be off eight times as much, and towers in float16 may overflow.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.rewards.encoder_files import image_sides, load_open_clip
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.memory import halve_until_it_fits
from fastgrpo.system.offload import offload, resident
from fastgrpo.system.pulse import PULSE

TF32_TOLERANCE = 2**-8
"""How far TF32 may move an image's unit vector, and with it a cosine: four units of a mantissa of 10 bits."""

_TF32_LOCK = threading.RLock()


@dataclass(frozen=True)
class ImageTransform:
    """open_clip's evaluation transform for a whole batch on the device, without PIL and its rounding to 8 bits.

    size: the encoder's square input, in pixels. mean, std: [3, 1, 1] float32, per channel, for values in [0, 1].
    interpolation: "bicubic" or "bilinear", antialiased as in PIL.
    squash: resize both sides to `size` instead of the short side followed by a centre crop.
    """

    size: int
    mean: Tensor
    std: Tensor
    interpolation: str
    squash: bool

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, h, w] float32 in [0, 1] -> [N, 3, size, size] float32, normalised."""
        height, width = images.shape[-2:]
        short = min(height, width)
        scaled = self.size * height // short, self.size * width // short
        height, width = (self.size, self.size) if self.squash else scaled
        if images.shape[-2:] != (height, width):
            images = F.interpolate(images, (height, width), mode=self.interpolation, antialias=True)
            images = images.clamp(0, 1)  # bicubic overshoots; PIL saturates
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        images = images[..., top : top + self.size, left : left + self.size]
        return (images - self.mean) / self.std


class OpenClipEncoder:
    """A frozen open_clip model whose features are unit vectors of width E. Build it with `load_encoder`.

    spec: what the settings call it, "" where nothing asks for that.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, device: torch.device | str, dtype: torch.dtype, spec: str = ""
    ):
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.dtype, self.spec = dtype, spec
        self._fitting = 0  # images at once since memory ran out; 0 before
        self.transform = _image_transform(open_clip.get_model_preprocess_cfg(model), self.device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[N, E] float32 unit vectors on the encoder's device; texts beyond the context length are cut.

        One text per forward pass: matrix products of different sizes round differently, and a text's vector must not
        depend on which others it came with, or a resumed run would not repeat an undisturbed one bit for bit.
        """
        with resident(self.model):
            return torch.cat([self._unit(self.model.encode_text(self.tokenizer([t]).to(self.device))) for t in texts])

    @torch.no_grad()
    def encode_image(self, images: Tensor, batch: int = 256) -> Tensor:
        """[N, 3, h, w] float32 in [0, 1], any size -> [N, E] float32 unit vectors on the encoder's device.

        batch: images per forward pass; bounds memory. Where memory runs out it is halved, with a warning, from then on.
        """

        def encoded(at_once: int) -> Tensor:
            features = []
            for chunk in images.split(at_once):
                PULSE.mark()
                chunk = self.transform(chunk.to(self.device)).to(self.dtype)
                features.append(self._unit(self.model.encode_image(chunk)))
            return torch.cat(features)

        wanted = min(batch, self._fitting or batch, max(len(images), 1))
        with resident(self.model.visual):
            features, fitted = halve_until_it_fits(encoded, wanted, "images are encoded")
        if fitted < wanted:
            self._fitting = fitted
        return features

    def offload(self) -> None:
        """Keep each tower in the host's memory while it is not used. On a CPU nothing is moved."""
        image = self.model.visual
        weights = {id(tensor): tensor for tensor in (*image.parameters(), *image.buffers())}
        offload(weights.values(), image, self.device)
        every = (*self.model.parameters(), *self.model.buffers())
        offload([tensor for tensor in every if id(tensor) not in weights], self.model, self.device)

    @staticmethod
    def _unit(features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1)


def load_encoder(
    spec: str, device: torch.device | str, dtype: torch.dtype = torch.float32, field: str = "reward.encoder"
) -> OpenClipEncoder:
    """The encoder that `--reward.encoder` names, frozen, on `device`.

    spec: `hpsv2`, which downloads HPSv2.1; `shapes` and `shapes-held-out`, which ship with fastgrpo;
        `local-dir:FOLDER` with open_clip_config.json and weights; `hf-hub:ID`; `transformers:ID`, a folder or hub id of
        transformers' CLIPModel; or `ARCHITECTURE:WEIGHTS`, WEIGHTS being an open_clip tag or a file. Torch files are
        read with weights_only, and no code of a model repository is run.
    dtype: torch's float32, bfloat16 or float16, of the towers' matrix products. field: what messages call the setting.
    Raises ConfigError for a spec that names nothing loadable, and for images prepared otherwise than its tower expects.
    """
    try:
        model, tokenizer = load_open_clip(spec, torch.device(device), dtype)
        return OpenClipEncoder(model, tokenizer, device, dtype, spec)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}", field) from error


class SharedEncoder:
    """An encoder that remembers the vector of every text, and those of the images it was given last.

    encoder: itself, which computes in float32. tf32: whether images may be encoded here with TF32's products, on GPUs
    that have them.
    """

    def __init__(self, encoder: OpenClipEncoder, tf32: bool = False):
        self.encoder, self._tf32 = encoder, tf32
        self._text: dict[str, Tensor] = {}
        self._images: tuple[Tensor, Tensor] | None = None

    @property
    def model(self) -> nn.Module:
        """The open_clip model itself."""
        return self.encoder.model

    @property
    def tokenizer(self) -> Any:
        """The encoder's open_clip tokenizer."""
        return self.encoder.tokenizer

    @property
    def width(self) -> int:
        """E, how many numbers a vector has."""
        return self.encode_text([""]).shape[1]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[N, E] float32 unit vectors, as `OpenClipEncoder.encode_text`."""
        new = [text for text in dict.fromkeys(texts) if text not in self._text]
        if new:  # together, so that an encoder that is elsewhere comes once
            self._text |= zip(new, self.encoder.encode_text(new), strict=True)
        return torch.stack([self._text[text] for text in texts])

    def encode_image(self, images: Tensor, batch: int) -> Tensor:
        """[N, E] float32 unit vectors, as `OpenClipEncoder.encode_image`; kept until `forget_images`."""
        if self._images is None or images is not self._images[0]:
            with tf32_products() if self._tf32 else nullcontext():
                self._images = images, self.encoder.encode_image(images, batch)
        return self._images[1]

    @property
    def seen(self) -> Tensor | None:
        """[N, E] of the images that it was given last; None where it has let go of them."""
        return self._images[1] if self._images else None

    def forget_images(self) -> None:
        """Let go of the images and their features."""
        self._images = None


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

    @property
    def first(self) -> SharedEncoder | None:
        """The one that was asked for first; None where none was."""
        return next(iter(self._loaded.values()), None)

    def offload(self) -> None:
        """Keep them in the host's memory while they are not used. On a CPU nothing is moved."""
        for encoder in self._loaded.values():
            encoder.encoder.offload()

    def forget_images(self) -> None:
        """Let go of the images that were scored last."""
        for encoder in self._loaded.values():
            encoder.forget_images()


@contextmanager
def tf32_products() -> Iterator[None]:
    """Compute the block's float32 matrix products in TF32, on GPUs that have it; afterwards as before.

    The setting is the process's: another thread's products of that time are TF32's too, but none is left so.
    """
    matmul = torch.backends.cuda.matmul
    with _TF32_LOCK:
        before = matmul.fp32_precision
        if before == "tf32":
            yield
            return
        # The old name sets the new one too: PyTorch asks for either, and refuses to compute where they differ.
        matmul.allow_tf32 = True
        try:
            yield
        finally:
            matmul.allow_tf32 = False
            matmul.fp32_precision = before


def _image_transform(config: dict[str, Any], device: torch.device) -> ImageTransform:
    """From open_clip's preprocess config."""
    sides = image_sides(config["size"])
    if len(set(sides)) > 1 or config["resize_mode"] == "longest":
        raise ConfigError(
            f"its images are {sides} with resize mode {config['resize_mode']!r}; accepted are square encoders with "
            "mode 'shortest' or 'squash'."
        )
    mean, std = (torch.tensor(config[key], dtype=torch.float32, device=device).view(3, 1, 1) for key in ("mean", "std"))
    return ImageTransform(sides[0], mean, std, config["interpolation"], squash=config["resize_mode"] == "squash")
