"""The features of FID, by Inception-v3, and how images go into it: as in clean-fid.

Features are the 2,048 numbers after the last average pooling of the Inception-v3 that TensorFlow released in 2015, in
its PyTorch port pt_inception-2015-12-05-6726825d.pth. It differs from torchvision's in its weights, and in that average
pooling leaves out the padding and the last block pools by maxima. As in clean-fid (Parmar et al., arXiv 2104.11222)
every image is resized to 299 x 299 by PIL's antialiased bicubic filter, each channel in float32, limited to 0 ... 255,
not rounded to 8 bits, and (x - 128) / 128 goes in. clean-fid itself runs a TorchScript file of the same network, which
is a program and is not run here.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

from fastgrpo.evaluation.images.files import chunks
from fastgrpo.models.sound import first_not_finite
from fastgrpo.models.whole import read_weights
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import file_sha256

PROTOCOL = "fid/clean-2048"
SIZE = 299  # pixels of the network's input
WIDTH = 2048  # of the features
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
_SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


class Inception:
    """An `Instrument`, see detectors/base.py: it gives FID's features. Build it with `load_inception`."""

    name = "inception"
    protocol = PROTOCOL

    def __init__(self, network: "InceptionV3", hashes: dict[str, str], device: torch.device | str) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.hashes = hashes
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """N images, of any sizes -> [N, 2048] float32 on the CPU."""
        features = [torch.empty(0, WIDTH)]
        with ThreadPoolExecutor() as pool:  # PIL lets other threads run while it resizes
            for chunk in chunks(images):
                pixels = torch.stack(list(pool.map(prepare, chunk))).to(self.device)
                features.append(self.network(pixels).cpu())
        return torch.cat(features)


def load_inception(file: str, device: torch.device | str = "cpu", field: str = "fid.inception") -> Inception:
    """Inception with the weights of pt_inception-2015-12-05-6726825d.pth, or the same tensors as .safetensors.

    field: what messages call the setting. Raises ConfigError where there is no such file or it holds something else.
    """
    path = Path(file)
    accepted = f"accepted is {WEIGHTS}, from {_SOURCE}, or its tensors as .safetensors"
    if not path.is_file():
        raise ConfigError(f"{field}: {file!r} is no file; FID needs Inception's weights, and {accepted}.")
    state = read_weights(path, f"{field}: {file!r}", accepted)
    network = InceptionV3()
    if problem := _problem(state, network):
        raise ConfigError(f"{field}: {file!r} holds {problem}; {accepted}.")
    network.load_state_dict({name: state[name] for name in network.state_dict() if name in state}, strict=False)
    return Inception(network, {"inception": file_sha256(path)}, device)


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


class InceptionV3(torchvision.models.Inception3):
    """[N, 3, 299, 299] float32 as by `prepare` -> [N, 2048] float32, FID's features (Szegedy et al., arXiv 1512.00567).

    torchvision's network without its classifier, where its blocks pool as those of 2015 do.
    """

    def __init__(self) -> None:
        super().__init__(num_classes=1, aux_logits=False, init_weights=False)
        self.avgpool = self.dropout = self.fc = nn.Identity()
        averaging = (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d)
        for block in (*averaging, self.Mixed_6e, self.Mixed_7b):
            _pool_by(block, lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        _pool_by(self.Mixed_7c, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(1, (WIDTH, -1)).mean(2)


def _pool_by(block: Any, pool: Callable[[Tensor], Tensor]) -> None:
    """Let a block's `branch_pool` have the block's input as `pool` pools it, in place of torchvision's own average."""
    inputs: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, __: (pool(inputs.pop()),))
