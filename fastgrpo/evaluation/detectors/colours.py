"""The colours of GenEval's objects: CLIP, zero-shot over ten of them, on the object alone.

As in GenEval's evaluate_images.py: outside the object's mask the image becomes #999999, the object's box is cut out,
and open_clip's own transform for PIL images prepares it. For an object of class X each colour c has three phrases,

    "a photo of a {c} X"    "a photo of a {c}-colored X"    "a photo of a {c} object"

and its vector is normalize(mean(z)) over their unit vectors z. The colour is the one whose vector has the largest
cosine with the image's. GenEval computes this in half precision by autocast, here it is float32.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.metrics.clip_images import ClipImages
from fastgrpo.evaluation.metrics.geneval_rules import Detected
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.prompts.geneval import COLORS
from fastgrpo.rewards.encoder import load_encoder

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = (0x99, 0x99, 0x99)


class ClipColours:
    """An `Instrument`, see base.py: it names the colours of objects."""

    name = "clip-colours"

    def __init__(self, spec: str, device: torch.device | str = "cpu", field: str = "geneval.colours") -> None:
        """spec: CLIP, in the notation of `load_encoder`, which raises ConfigError. field: the setting's name."""
        self.encoder = load_encoder(spec, device, field=field)
        self.protocol = f"clip-colours/{spec}"
        self.hashes = {"clip": weights_sha256(self.encoder.model)}
        self._features = ClipImages(self.encoder)
        self._colours: dict[str, Tensor] = {}

    def __call__(self, objects: Sequence[tuple[Image.Image, Detected]]) -> list[str]:
        """One of COLORS for each (image, object in it); images are RGB, of any sizes."""
        return [COLORS[index] for index in self.cosines(objects).argmax(1).tolist()] if objects else []

    @torch.no_grad()
    def cosines(self, objects: Sequence[tuple[Image.Image, Detected]]) -> Tensor:
        """[N, 10] float32 on the encoder's device: of each of N >= 1 objects with each of COLORS."""
        features = torch.cat(list(self._features([cut_out(image, seen) for image, seen in objects])))
        colours = torch.stack([self._vectors(seen.label) for _, seen in objects])
        return torch.einsum("ne,nce->nc", features, colours)

    def _vectors(self, name: str) -> Tensor:
        """[10, E] float32 unit vectors of the colours of a class, kept from one call to the next."""
        if name not in self._colours:
            phrases = [[t.format(colour=colour, name=name) for t in TEMPLATES] for colour in COLORS]
            means = torch.stack([self.encoder.encode_text(three).mean(0) for three in phrases])
            self._colours[name] = F.normalize(means, dim=-1)
        return self._colours[name]


def cut_out(image: Image.Image, seen: Detected) -> Image.Image:
    """The object alone: #999999 outside its mask, where it has one, and cropped to its box."""
    if seen.mask is not None:
        pixels = np.where(seen.mask[..., None], np.asarray(image), np.array(BACKGROUND, np.uint8))
        image = Image.fromarray(pixels)
    x0, y0, x1, y1 = map(round, seen.box)
    return image.crop((x0, y0, x1, y1))
