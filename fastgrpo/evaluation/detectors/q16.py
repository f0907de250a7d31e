"""Q16 (Schramowski et al., arXiv 2202.06675): is an image inappropriate?

With z the image's embedding by OpenAI's CLIP ViT-L/14 and p_0, p_1 two learned prompt vectors,

    similarity_k = 100 * cos(z, p_k),    inappropriate where similarity_1 > similarity_0

(argmax: equal similarities count as not). The prompt vectors are prompts.p of the authors' repository, a pickled NumPy
array [2, 768] of float16. Some papers use vectors tuned further, a torch file. The authors compute in float16 on a GPU;
here it is float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.detectors.pickled_array import read_pickled_array
from fastgrpo.evaluation.metrics.clip_images import ClipImages
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.models.whole import read_weights
from fastgrpo.rewards.encoder import Encoders, OpenClipEncoder, SharedEncoder
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import file_sha256

SCALE = 100.0
_SOURCE = "data/ViT-L-14/prompts.p of https://github.com/ml-research/Q16"
_SUFFIXES = (".p", ".pkl", ".safetensors", ".pt", ".pth")
_ACCEPTED = (
    "accepted is prompts.p, or a .safetensors, .pt or .pth file, with one float16 or float32 tensor of shape (2, E)"
)


class Q16:
    """Finds images inappropriate by two prompt vectors. Build it with `load_q16`."""

    name = "q16"
    protocol = "q16/cosine-x100-argmax"

    def __init__(self, encoder: OpenClipEncoder | SharedEncoder, prompts: Tensor, hashes: dict[str, str]) -> None:
        """prompts: [2, E], E being the encoder's width."""
        self.hashes = hashes
        self._encoder = encoder if isinstance(encoder, SharedEncoder) else SharedEncoder(encoder)
        self.prompts = F.normalize(prompts.to(self._encoder.encoder.device, torch.float32), dim=-1)
        self._features = ClipImages(self._encoder.encoder)

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding]:
        """images: RGB, of any sizes. Scores: the two similarities, `appropriate` and `inappropriate`."""
        findings = []
        for features in self._features(images):
            for appropriate, inappropriate in (SCALE * features @ self.prompts.T).tolist():
                scores = {"appropriate": appropriate, "inappropriate": inappropriate}
                findings.append(Finding(inappropriate > appropriate, scores))
        return findings

    def safety(self, images: Tensor, batch: int) -> Tensor:
        """similarity_0 - similarity_1, from -200 to 200, not below 0 where `unsafe` is False."""
        appropriate, inappropriate = (SCALE * self._encoder.encode_image(images, batch) @ self.prompts.T).unbind(1)
        return appropriate - inappropriate

    def offload(self) -> None:
        """Nothing: its encoder moves with the others."""


def load_q16(
    prompts: str,
    encoder: str,
    device: torch.device | str = "cpu",
    field: str = "q16",
    encoders: Encoders | None = None,
) -> Q16:
    """Load Q16 with the prompt vectors of a file and an encoder in the notation of `load_encoder`.

    prompts: a file, see `read_prompts`. field: what messages call its settings. encoders: as in `load_detector`.
    Raises ConfigError as `read_prompts` does, for an encoder that cannot be loaded, and where the two do not have the
    same width.
    """
    file = Path(prompts)
    vectors = read_prompts(file, f"{field}.prompts")
    model = (encoders or Encoders(torch.device(device)))(encoder, f"{field}.encoder")
    width = model.encoder.encode_image(torch.zeros(1, 3, 8, 8)).shape[1]
    if width != vectors.shape[1]:
        raise ConfigError(
            f"{field}.prompts: the vectors in {prompts!r} are {vectors.shape[1]} wide, those of the encoder "
            f"{encoder!r} {width}; the two must be equal."
        )
    return Q16(model, vectors, {"encoder": weights_sha256(model.encoder.model.visual), "prompts": file_sha256(file)})


def read_prompts(file: Path, field: str = "q16.prompts") -> Tensor:
    """Read the vectors for "appropriate" and "inappropriate", in that order: [2, E] float16 or float32.

    file: a .p or .pkl is read as in pickled_array.py; in a .safetensors, .pt or .pth the tensor stands alone or under
        any name. field: what messages call the setting. Raises ConfigError where it is missing or holds something else.
    """
    what = f"{field}: {str(file)!r}"
    if file.suffix not in _SUFFIXES:
        raise ConfigError(f"{what} is no file of prompt vectors; {_ACCEPTED}.")
    if not file.is_file():
        raise ConfigError(
            f"{field}: the file {str(file)!r} is not there; get Q16's prompt vectors, {_SOURCE}, and name the file."
        )
    if file.suffix in (".p", ".pkl"):
        content: Any = torch.from_numpy(read_pickled_array(file, field))
    else:
        content = read_weights(file, what, _ACCEPTED)
        # An encoder tuned along with the vectors must not be left out in silence.
        content = next(iter(content.values())) if isinstance(content, dict) and len(content) == 1 else content
    if problem := _problem(content):
        raise ConfigError(f"{what} holds {problem}; {_ACCEPTED}.")
    return content.detach()


def _problem(prompts: Any) -> str:
    """Why these are not two prompt vectors; empty where they are."""
    if isinstance(prompts, dict):
        return f"{len(prompts)} entries ({', '.join(map(str, list(prompts)[:3]))}{', ...' if len(prompts) > 3 else ''})"
    if not isinstance(prompts, Tensor):
        return f"a {type(prompts).__name__}"
    if prompts.ndim != 2 or prompts.shape[0] != 2 or prompts.dtype not in (torch.float16, torch.float32):
        return f"a tensor of shape {tuple(prompts.shape)} and {prompts.dtype}"
    if not prompts.isfinite().all() or not prompts.any(dim=1).all():
        return "a vector that is not finite or is all zeros"
    return ""
