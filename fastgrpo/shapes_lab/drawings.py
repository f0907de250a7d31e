"""Pictures with captions for pretraining, drawn by the world."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.shapes.captions import Request, random_request, scene_for
from fastgrpo.shapes.world import CaptionNoise, Scene, draw, perturb


@dataclass(frozen=True)
class Pictures:
    """N drawn pictures and what their captions ask for.

    images: [N, 3, 32, 32] uint8. requests: N, from which captions are worded anew each time they are needed.
    scenes: N, what is really in each picture.
    """

    images: Tensor
    requests: tuple[Request, ...]
    scenes: tuple[Scene, ...]


def draw_pictures(count: int, seed: int, noise: CaptionNoise | None = None, progress=None) -> Pictures:
    """Draws `count` random pictures; with `noise`, pictures contradict their requests at its rates."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, 32, 32, 3), dtype=np.uint8)
    requests, scenes = [], []
    for i in range(count):
        request = random_request(rng)
        scene = scene_for(request, rng)
        scene = perturb(scene, noise, rng) if noise else scene
        images[i] = draw(scene, rng)
        requests.append(request)
        scenes.append(scene)
        if progress:
            progress(1)
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), tuple(requests), tuple(scenes))


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1]."""
    return images.float() / 255


def blur(images: Tensor) -> Tensor:
    """The pictures under a 3 x 3 binomial kernel, [N, 3, H, W]."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of std up to 0.06 on all and a blur on a third of the pictures: a generator's pictures are not crisp.

    images: [N, 3, H, W] in [0, 1].
    """
    noise = 0.06 * torch.randn(images.shape, generator=generator)
    noise = noise * torch.rand(len(images), 1, 1, 1, generator=generator)
    blurred = torch.rand(len(images), 1, 1, 1, generator=generator) < 1 / 3
    return (torch.where(blurred, blur(images), images) + noise).clamp(0, 1)
