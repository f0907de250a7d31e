"""A CLIP in the format of transformers, such as PickScore's, with the interface of an open_clip model.

The folder or hub repository has config.json of a CLIPModel, its weights, and perhaps preprocessor_config.json. Texts
are read by CLIP's own tokenizer, which needs no file; unlike transformers' it also resolves HTML's entities.
"""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fastgrpo.models.repository import Repository
from fastgrpo.models.tensor_file import check_content
from fastgrpo.models.whole import load_whole
from fastgrpo.system.errors import ConfigError, first_sentence
from fastgrpo.system.files import reading

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first of them that is there
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers
_VOCABULARY = 49_408  # of CLIP's tokenizer, whose last token ends a text
_ENDS = (2, _VOCABULARY - 1)  # 2 in configs of old, where transformers takes the largest token, which is the last


class ImageTower(nn.Module):
    """What sees images. preprocess_cfg: how they are prepared, in open_clip's words."""

    def __init__(self, model: Any, preprocess: dict[str, Any]) -> None:
        """model: a CLIPModel, or another with its vision_model and visual_projection."""
        super().__init__()
        self.vision_model, self.projection = model.vision_model, model.visual_projection
        self.image_size, self.preprocess_cfg = preprocess["size"], preprocess

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, size, size], prepared -> [N, E]."""
        projected: Tensor = self.projection(self.vision_model(pixel_values=pixels).pooler_output)
        return projected


class TransformersClip(nn.Module):
    """A CLIPModel behind the names of an open_clip model. Build it with `load_transformers_clip`."""

    def __init__(self, model: CLIPModel, preprocess: dict[str, Any]) -> None:
        """preprocess: size, mean, std, interpolation and resize_mode, as open_clip has them."""
        super().__init__()
        self.visual = ImageTower(model, preprocess)
        self.text_model, self.text_projection, self.logit_scale = (
            model.text_model,
            model.text_projection,
            model.logit_scale,
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[N, 3, size, size], prepared -> [N, E], of any length."""
        features: Tensor = self.visual(pixels)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[N, L] int64, zeros after the end -> [N, E], of any length; attention is causal and needs no mask."""
        features: Tensor = self.text_projection(self.text_model(input_ids=tokens).pooler_output)
        return features


def load_transformers_clip(name: str, device: torch.device, dtype: torch.dtype) -> tuple[TransformersClip, Any]:
    """The CLIPModel of a folder or hub id, on `device` in `dtype`, and its tokenizer; no code of a model is run.

    Raises ConfigError where it cannot be found or read, is no CLIPModel, has another tokenizer than CLIP's, or prepares
    images otherwise than its tower takes them.
    """
    repository, weights = find_transformers_clip(name)
    folder = repository.fetch([_CONFIG, _PREPROCESSOR, weights])
    what = f"{repository.field} {name!r}"
    config = _read_config(folder, what)
    preprocess = _preprocess(folder / _PREPROCESSOR, config.vision_config.image_size, what)
    check_content(folder / weights, "its weights' file")
    model = load_whole(CLIPModel, folder, f"{what}, which", safe=weights == _WEIGHTS[0])
    length = config.text_config.max_position_embeddings
    return TransformersClip(model, preprocess).to(device, dtype), SimpleTokenizer(context_length=length)


def find_transformers_clip(name: str) -> tuple[Repository, str]:
    """The repository of a CLIPModel and its weights' file. Raises ConfigError where it is not there."""
    layout = f"folder with {_CONFIG} and {_WEIGHTS[0]} of a CLIPModel"
    repository = Repository("the CLIPModel", name, layout=layout)
    files = repository.files()
    weights = next((file for file in _WEIGHTS if file in files), "")
    if not weights or _CONFIG not in files:
        lacking = " or ".join(_WEIGHTS) if _CONFIG in files else _CONFIG
        raise ConfigError(f"{name!r} has no {lacking}; a {layout} is accepted.")
    return repository, weights


def empty_transformers_clip(name: str) -> TransformersClip:
    """The same without weights, on the default device. Raises ConfigError where its config cannot be had."""
    repository = Repository("the CLIPModel", name)
    config = _read_config(repository.fetch([_CONFIG]), f"{repository.field} {name!r}")
    return TransformersClip(CLIPModel(config), {"size": config.vision_config.image_size})


def _read_config(folder: Path, what: str) -> CLIPConfig:
    with reading(folder / _CONFIG):
        kinds = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("architectures") or ["unknown"]
    if kinds != [CLIPModel.__name__]:
        raise ConfigError(f"{what} is a {', '.join(map(str, kinds))}; a {CLIPModel.__name__} is accepted.")
    try:
        config = CLIPConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{what} has a {_CONFIG} that cannot be read: {first_sentence(error)}.") from error
    text = config.text_config
    if text.vocab_size != _VOCABULARY or text.eos_token_id not in _ENDS:
        raise ConfigError(
            f"{what} reads texts of {text.vocab_size:,} tokens that end in {text.eos_token_id}; CLIP's own "
            f"tokenizer, with {_VOCABULARY:,} of which the last ends a text, is accepted."
        )
    return config


def _preprocess(file: Path, size: int, what: str) -> dict[str, Any]:
    """How images are prepared, in open_clip's words: as the file says, or as CLIP does where there is none."""
    if not file.is_file():
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    else:
        try:
            processor = CLIPImageProcessorPil.from_pretrained(file.parent)
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{what} has a {file.name} that cannot be read: {first_sentence(error)}.") from error
    resized, square = dict(processor.size), {"height": size, "width": size}
    squash = resized == square
    cropped = processor.do_center_crop and dict(processor.crop_size) == square
    interpolation = _INTERPOLATIONS.get(int(processor.resample))
    if not (squash or (resized == {"shortest_edge": size} and cropped)) or not interpolation:
        raise ConfigError(
            f"{what} and its preprocessing do not match: {file.name} resizes to {resized}, cropped to "
            f"{dict(processor.crop_size or {})}, by PIL's filter {processor.resample}; accepted are squares of {size} "
            "pixels, bicubic or bilinear."
        )
    mean, std = processor.image_mean or OPENAI_DATASET_MEAN, processor.image_std or OPENAI_DATASET_STD
    return {
        "size": size,
        "mode": "RGB",
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": interpolation,
        "resize_mode": "squash" if squash else "shortest",
        "fill_color": 0,
    }
