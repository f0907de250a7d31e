"""LAION's improved aesthetic predictor (Schuhmann, 2022): how much people like an image on average, about 1 to 10.

With z the image's unit vector by OpenAI's CLIP ViT-L/14 and five linear layers of 1024, 128, 64, 16 and 1 outputs,

    score = W_5 (W_4 (W_3 (W_2 (W_1 z + b_1) + b_2) + b_3) + b_4) + b_5

There is dropout between the layers of the published model sac+logos+ava1-l14-linearMSE, which does nothing outside
training, and no activation: the score is affine in z. So the layers are multiplied out once, in float64.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.models.repository import Repository
from fastgrpo.models.sound import check_finite
from fastgrpo.models.tensor_file import SAFETENSORS, read_tensors, tensor_shapes
from fastgrpo.rewards.encoder import SharedEncoder
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import file_sha256
from fastgrpo.types import Prompt

# The linear ones among the published model's layers. Those of its siblings with ReLU have other numbers.
_LAYERS = (0, 2, 4, 6, 7)
_NAMES = {f"layers.{index}.{part}" for index in _LAYERS for part in ("weight", "bias")}
_SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin")
_ACCEPTED = (
    "accepted are the weights of LAION's sac+logos+ava1-l14-linearMSE, a .safetensors, .pth, .pt or .bin file, or a "
    "folder or hub id with one such file"
)


class AestheticReward:
    """The score of the aesthetic predictor, for any prompt."""

    def __init__(self, encoder: SharedEncoder, name: str, batch: int) -> None:
        """name: the predictor's weights, as in `find_predictor`. batch: images encoded at once.

        Raises ConfigError where the weights cannot be read, or are for vectors of another width than the encoder's.
        """
        file = find_predictor(name)
        weight, self._bias = read_predictor(file, "reward.aesthetic")
        if len(weight) != encoder.width:
            raise ConfigError(
                f"reward.aesthetic: the predictor in {name!r} is for vectors {len(weight)} wide, those of "
                f"reward.aesthetic_encoder are {encoder.width}; the two must be equal."
            )
        self.hashes = {"reward.aesthetic": file_sha256(file)}
        self._encoder, self._batch = encoder, batch
        self._weight = weight.to(encoder.encoder.device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[N, 3, h, w] float32 in [0, 1] and N prompts, which do not matter -> [N] float32."""
        features = self._encoder.encode_image(images, self._batch)
        return (features.double() @ self._weight + self._bias).float()


def find_predictor(name: str) -> Path:
    """The file of the predictor's weights: a file, or the one in a folder or hub repository, safetensors before others.

    Raises ConfigError where there is none, or are several.
    """
    if Path(name).is_file():
        return Path(name)
    layout = "file of its weights"
    repository = Repository("reward.aesthetic", name, layout=layout)
    files = sorted(file for file in repository.files() if file.endswith(_SUFFIXES))
    found = [file for file in files if file.endswith(SAFETENSORS)] or files
    if len(found) != 1:
        raise ConfigError(f"reward.aesthetic is {name!r}, with {', '.join(found) or 'no weights'}; {_ACCEPTED}.")
    return repository.fetch(found) / found[0]


def read_predictor(file: Path, field: str) -> tuple[Tensor, float]:
    """The predictor multiplied out: [E] float64 and a number, so that its score of z is their product and sum.

    field: the setting that names the file. Raises ConfigError for one that cannot be read without executing what is in
    it, or holds another model.
    """
    what = f"{field} is {str(file)!r}"
    if not file.name.endswith(_SUFFIXES):
        raise ConfigError(f"{what}, no file of weights; {_ACCEPTED}.")
    names = set(tensor_shapes(file, field))
    if names != _NAMES:
        wrong = ", ".join(sorted(names - _NAMES)[:3])
        lacking = ", ".join(sorted(_NAMES - names)[:3])
        why = " and ".join(filter(None, (wrong and f"has {wrong}", lacking and f"lacks {lacking}")))
        raise ConfigError(f"{what}, which {why}; {_ACCEPTED}.")
    tensors = read_tensors(file, field, sorted(_NAMES))
    check_finite(tensors, what)
    total, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for index in reversed(_LAYERS):
        weight, own = (tensors[f"layers.{index}.{part}"].double() for part in ("weight", "bias"))
        if weight.ndim != 2 or own.shape != weight.shape[:1] or weight.shape[0] != total.shape[1]:
            raise ConfigError(
                f"{what}, whose layers.{index} of {list(weight.shape)} does not fit to the one behind it, which takes "
                f"{total.shape[1]}; {_ACCEPTED}."
            )
        bias = bias + total @ own
        total = total @ weight
    return total[0], bias.item()
