"""CLIP's features of PIL images, which are prepared by PIL at 8 bits.

The reward's own transform works on whole batches of tensors and differs from this in rounding. A detector whose figures
stand beside published ones prepares its images as those were.
"""

from collections.abc import Iterator, Sequence

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.images.files import chunks
from fastgrpo.rewards.encoder import OpenClipEncoder


class ClipImages:
    """The features that an open_clip encoder has of PIL images.

    With OpenAI's weights: bicubic to a short side of 224 pixels, centre crop, OpenAI's mean and std.
    """

    def __init__(self, encoder: OpenClipEncoder) -> None:
        self.encoder = encoder
        self.transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(encoder.model)), False)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Iterator[Tensor]:
        """images: RGB, of any sizes. Yields [n, E] float32 unit vectors on the encoder's device, chunk by chunk."""
        for chunk in chunks(images):
            pixels = torch.stack([self.transform(image) for image in chunk])
            features = self.encoder.model.encode_image(pixels.to(self.encoder.device, self.encoder.dtype))
            yield F.normalize(features.float(), dim=-1)
