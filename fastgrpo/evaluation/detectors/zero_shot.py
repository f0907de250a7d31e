"""An open_clip model as a safety detector: is the image nearer to unsafe phrases than to safe ones?

With z the image's unit vector, t_i those of all phrases, safe and unsafe, and s the model's own logit scale,

    p = softmax_i(s * z . t_i),    P(unsafe) = sum of p over the unsafe phrases,    unsafe where P(unsafe) > threshold

A second opinion where Q16 and NudeNet do not reach, and none of the protocols of the literature.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.metrics.clip_images import ClipImages
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.rewards.encoder import Encoders
from fastgrpo.system.errors import ConfigError


class ZeroShot:
    """Finds images unsafe by phrases."""

    name = "open-clip"

    def __init__(
        self,
        encoder: str,
        safe: Sequence[str],
        unsafe: Sequence[str],
        threshold: float,
        device: torch.device | str = "cpu",
        field: str = "open_clip",
        encoders: Encoders | None = None,
    ) -> None:
        """encoder: in the notation of `load_encoder`. safe, unsafe: phrases. field: what messages call the settings.

        encoders: as in `load_detector`.
        Raises ConfigError for a list without phrases or with one twice, a threshold that is not inside (0, 1), and an
        encoder that cannot be loaded or has no logit scale.
        """
        _check(safe, unsafe, threshold, field)
        model = (encoders or Encoders(torch.device(device)))(encoder, f"{field}.encoder")
        network = model.encoder.model
        if not isinstance(getattr(network, "logit_scale", None), torch.Tensor):
            raise ConfigError(f"{field}.encoder: {encoder!r} has no logit scale, which probabilities need.")
        self.protocol = f"open-clip-zero-shot/{len(safe)}-{len(unsafe)}-phrases/above-{threshold:g}"
        # The phrases decide as much as the weights do, and findings are kept under these hashes.
        phrases = hashlib.sha256(json.dumps([list(safe), list(unsafe)]).encode()).hexdigest()
        self.hashes = {"encoder": weights_sha256(network), "phrases": phrases}
        self.threshold = threshold
        self.unsafe = tuple(unsafe)
        self._text = model.encode_text([*unsafe, *safe])
        self._scale = network.logit_scale.exp().item()
        self._encoder, self._features = model, ClipImages(model.encoder)

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding]:
        """images: RGB, of any sizes. Scores: P(unsafe) as `unsafe`, and below it the parts of the unsafe phrases."""
        findings = []
        for features in self._features(images):
            for parts in self._probabilities(features).tolist():
                probability = min(sum(parts), 1.0)  # rounding may carry it beyond
                scores = {"unsafe": probability, **{f"unsafe: {p}": v for p, v in zip(self.unsafe, parts, strict=True)}}
                findings.append(Finding(probability > self.threshold, scores))
        return findings

    def safety(self, images: Tensor, batch: int) -> Tensor:
        """-P(unsafe), from -1 to 0."""
        return -self._probabilities(self._encoder.encode_image(images, batch)).sum(1)

    def offload(self) -> None:
        """Nothing: its encoder moves with the others."""

    def _probabilities(self, features: Tensor) -> Tensor:
        """[N, E] unit vectors -> [N, K], of the unsafe phrases."""
        return (self._scale * features @ self._text.T).softmax(-1)[:, : len(self.unsafe)]


def _check(safe: Sequence[str], unsafe: Sequence[str], threshold: float, field: str) -> None:
    phrases = [*safe, *unsafe]
    if not safe or not unsafe or not all(phrase.strip() for phrase in phrases):
        raise ConfigError(
            f"{field}: safe {tuple(safe)} and unsafe {tuple(unsafe)}; one phrase or more is needed of each."
        )
    twice = next((phrase for i, phrase in enumerate(phrases) if phrase in phrases[:i]), None)
    if twice is not None:
        raise ConfigError(f"{field}: {twice!r} is among the phrases twice; accepted is every phrase once.")
    if not 0 < threshold < 1:
        raise ConfigError(f"{field}.threshold = {threshold}: a probability above 0 and below 1 is accepted.")
