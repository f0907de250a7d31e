"""The features of FID: Inception-v3 and the way images go into it, as clean-fid has them.

Features are the 2,048 numbers after the last average pooling of the Inception-v3 that TensorFlow released in 2015, in its
PyTorch port pt_inception-2015-12-05-6726825d.pth. It is not torchvision's: average pooling leaves out the padding, and
the last block pools by maxima. As in clean-fid (Parmar et al., arXiv 2104.11222) every image is resized to 299 x 299 by
PIL's antialiased bicubic filter, each channel in float32, limited to 0 ... 255, not rounded to 8 bits, and (x - 128) / 128
goes in. clean-fid itself runs a TorchScript file of the same network, which is a program and is not run here.
"""

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgrpo.evaluation.metrics.clip_images import chunks
from fastgrpo.models.sound import first_not_finite
from fastgrpo.models.tensor_file import wrong_content
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import file_sha256

PROTOCOL = "fid/clean-2048"
SIZE = 299  # pixels of the network's input
WIDTH = 2048  # of the features
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
_SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"

Progress = Callable[[int, int], None]  # called with (images done, images in all)


class Inception:
    """Features for FID. Build it with `load_inception`.

    protocol: the name under which distances may be compared. hashes: file -> sha256 of the weights.
    """

    name = "inception"
    protocol = PROTOCOL

    def __init__(self, network: "InceptionV3", hashes: dict[str, str], device: torch.device | str, batch: int = 32):
        """batch: images per forward pass; bounds memory."""
        self.network = network.to(device).eval().requires_grad_(False)
        self.hashes = hashes
        self.device = torch.device(device)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], progress: Progress | None = None) -> Tensor:
        """N images, of any sizes -> [N, 2048] float32 on the CPU."""
        features = [torch.empty(0, WIDTH)]
        done = 0
        with ThreadPoolExecutor() as pool:  # PIL lets other threads run while it resizes
            for chunk in chunks(images, self.batch):
                pixels = torch.stack(list(pool.map(prepare, chunk))).to(self.device)
                features.append(self.network(pixels).cpu())
                done += len(chunk)
                if progress:
                    progress(done, len(images))
        return torch.cat(features)


def load_inception(
    file: str, device: torch.device | str = "cpu", batch: int = 32, field: str = "fid.inception"
) -> Inception:
    """The network with the weights of a file: pt_inception-2015-12-05-6726825d.pth, or the same tensors as .safetensors.

    field: what messages call the setting. Raises ConfigError, in one sentence, where there is no such file or it holds
    something else.
    """
    path = Path(file)
    accepted = f"accepted is {WEIGHTS}, from {_SOURCE}, or its tensors as .safetensors"
    if not path.is_file():
        raise ConfigError(f"{field}: {file!r} is no file; FID needs Inception's weights, and {accepted}.")
    if wrong := wrong_content(path):
        raise ConfigError(f"{field}: {file!r} is {wrong}; {accepted}.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{field}: {file!r} cannot be read as tensors ({type(error).__name__}); {accepted}."
        ) from error
    network = InceptionV3()
    if problem := _problem(state, network):
        raise ConfigError(f"{field}: {file!r} holds {problem}; {accepted}.")
    network.load_state_dict({name: state[name] for name in network.state_dict() if name in state}, strict=False)
    return Inception(network, {"inception": file_sha256(path)}, device, batch)


def _problem(state: object, network: nn.Module) -> str:
    """Why these are not the network's weights; empty where they are. The classifier is not needed."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    classifier = state.get("fc.weight")
    if "AuxLogits.fc.weight" in state or (isinstance(classifier, Tensor) and len(classifier) == 1000):
        return "torchvision's Inception-v3, another network with other weights"
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):  # counts training steps, and older files lack it
            continue
        if not isinstance(state.get(name), Tensor) or state[name].shape != tensor.shape:
            return f"no tensor {name} of shape {tuple(tensor.shape)}"
        if first_not_finite([(name, state[name])]):
            return f"numbers in {name} that are not finite"
    return ""


def prepare(image: Image.Image) -> Tensor:
    """[3, 299, 299] float32, the network's input: resized in float32 channel by channel, and (x - 128) / 128."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(3)]
    resized = np.stack([np.asarray(c.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in channels])
    return torch.from_numpy((resized.clip(0, 255) - 128) / 128)


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


# The names below are those in the file of weights. WIDE and TALL are the halves of a 7 x 7 convolution.
_WIDE, _TALL = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}


class _Block35(nn.Module):
    """At 35 x 35 pixels: 1 x 1, 5 x 5, twice 3 x 3, and pooling."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, twice, self.branch_pool(_average(x))], 1)


class _To17(nn.Module):
    """From 35 x 35 to 17 x 17 pixels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, stride=2)], 1)


class _Block17(nn.Module):
    """At 17 x 17 pixels: 1 x 1, 7 x 7, twice 7 x 7, and pooling; `inner` channels within the 7 x 7."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, **_WIDE)
        self.branch7x7_3 = _Conv(inner, 192, **_TALL)
        self.branch7x7dbl_1 = _Conv(768, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, **_TALL)
        self.branch7x7dbl_3 = _Conv(inner, inner, **_WIDE)
        self.branch7x7dbl_4 = _Conv(inner, inner, **_TALL)
        self.branch7x7dbl_5 = _Conv(inner, 192, **_WIDE)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class _To8(nn.Module):
    """From 17 x 17 to 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, **_WIDE)
        self.branch7x7x3_3 = _Conv(192, 192, **_TALL)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class _Block8(nn.Module):
    """At 8 x 8 pixels: 1 x 1, 3 x 3, twice 3 x 3, the last of each split in 1 x 3 and 3 x 1, and pooling."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        wide, tall = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, **wide)
        self.branch3x3_2b = _Conv(384, 384, **tall)
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, **wide)
        self.branch3x3dbl_3b = _Conv(384, 384, **tall)
        self.branch_pool = _Conv(inputs, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """[N, 3, 299, 299] float32 as by `prepare` -> [N, 2048] float32, FID's features (Szegedy et al., arXiv 1512.00567)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _Block35(192, 32)
        self.Mixed_5c = _Block35(256, 64)
        self.Mixed_5d = _Block35(288, 64)
        self.Mixed_6a = _To17(288)
        self.Mixed_6b = _Block17(128)
        self.Mixed_6c = _Block17(160)
        self.Mixed_6d = _Block17(160)
        self.Mixed_6e = _Block17(192)
        self.Mixed_7a = _To8()
        self.Mixed_7b = _Block8(1280, _average)
        self.Mixed_7c = _Block8(2048, _maximum)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
