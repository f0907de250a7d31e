"""CLIP score: how well an image shows its prompt (Hessel et al., arXiv 2104.08718).

With z an open_clip encoder's unit vectors, it is cos(z_image, z_text) = z_image . z_text: CLIP's logits without their
scale, which is 100 in OpenAI's weights. It is neither multiplied by 2.5 nor cut at 0. Scores of different encoders
cannot be compared, so that every result names its encoder.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from fastgrpo.evaluation.metrics.clip_images import ClipImages
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.prompts.truncation import truncated
from fastgrpo.rewards.encoder import load_encoder


class ClipScore:
    """An `Instrument`, see detectors/base.py: it measures how well images fit their prompts."""

    name = "clip-score"

    def __init__(self, spec: str, device: torch.device | str = "cpu", field: str = "clip_score.encoder") -> None:
        """spec: the encoder, in the notation of `load_encoder`, which raises ConfigError. field: the setting's name."""
        self._encoder = load_encoder(spec, device, field=field)
        self._features = ClipImages(self._encoder)
        self.protocol = f"clip-score/cosine/{spec}"
        self.hashes = {"encoder": weights_sha256(self._encoder.model)}

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """N images, RGB, of any sizes, and the text of each -> N cosines in [-1, 1].

        A text beyond the encoder's context length is cut; `count_cut` says how many are.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images for {len(texts)} texts.")
        if not texts:
            return []
        vectors = {text: self._encoder.encode_text([text])[0] for text in dict.fromkeys(texts)}
        wanted = torch.stack([vectors[text] for text in texts])
        return (torch.cat(list(self._features(images))) * wanted).sum(-1).tolist()

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the encoder reads."""
        return len(truncated(self._encoder.tokenizer, texts))
