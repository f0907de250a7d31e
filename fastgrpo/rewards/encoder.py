"""The frozen image-and-text encoder that judges: an open_clip model, its tokenizer and its image transform."""

import difflib
import json
import math
import pickle
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor

from fastgrpo.models.sound import check_finite
from fastgrpo.models.tensor_file import tensor_shapes, wrong_content
from fastgrpo.system.errors import ConfigError

SHAPES_ENCODER = f"local-dir:{Path(__file__).resolve().parents[1] / 'shapes' / 'weights' / 'encoder'}"
"""What the spec `shapes` stands for: the encoder that ships with fastgrpo."""

HPSV2_REPOSITORY, HPSV2_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
"""Where the spec `hpsv2` finds the weights of HPSv2.1 on the hub, an open_clip ViT-H-14."""

_QUICK = "-quickgelu"  # ends the names of open_clip's architectures that compute it
_POSITIONS = "positional_embedding"
_LOCAL, _HUB = "local-dir:", "hf-hub:"
_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth"}  # what open_clip looks for in a folder
# What open_clip, torch, safetensors and json raise for files that are not what they should be.
_UNREADABLE = (
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class ImageTransform:
    """open_clip's evaluation transform for a whole batch on the device, without PIL and its rounding to 8 bits.

    size: the encoder's square input, in pixels.
    mean, std: [3, 1, 1] float32, per channel, for values in [0, 1].
    interpolation: "bicubic" or "bilinear", antialiased as in PIL.
    squash: resize both sides to `size` instead of the short side followed by a centre crop.
    """

    size: int
    mean: Tensor
    std: Tensor
    interpolation: str
    squash: bool

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, h, w] float32 in [0, 1] -> [N, 3, size, size] float32, normalised."""
        height, width = self._resized(*images.shape[-2:])
        if images.shape[-2:] != (height, width):
            images = F.interpolate(images, (height, width), mode=self.interpolation, antialias=True)
            images = images.clamp(0, 1)  # bicubic overshoots; PIL saturates
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        images = images[..., top : top + self.size, left : left + self.size]
        return (images - self.mean) / self.std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.size, self.size
        short = min(height, width)
        return self.size * height // short, self.size * width // short


class OpenClipEncoder:
    """A frozen open_clip model whose features are unit vectors of width E. Build it with `load_encoder`."""

    def __init__(self, model: torch.nn.Module, tokenizer, device: torch.device | str, dtype: torch.dtype):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.dtype = dtype
        self.transform = _image_transform(open_clip.get_model_preprocess_cfg(model), self.device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[N, E] float32 unit vectors on the encoder's device; texts beyond the context length are cut.

        One text per forward pass: matrix products of different sizes round differently, and a text's vector must not
        depend on which others it came with, or a resumed run would not repeat an undisturbed one bit for bit.
        """
        return torch.cat([self._unit(self.model.encode_text(self.tokenizer([t]).to(self.device))) for t in texts])

    @torch.no_grad()
    def encode_image(self, images: Tensor, batch: int = 256) -> Tensor:
        """[N, 3, h, w] float32 in [0, 1], any size -> [N, E] float32 unit vectors on the encoder's device.

        batch: images per forward pass; bounds memory.
        """
        chunks = (self.transform(chunk.to(self.device)).to(self.dtype) for chunk in images.split(batch))
        return torch.cat([self._unit(self.model.encode_image(chunk)) for chunk in chunks])

    @staticmethod
    def _unit(features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1)


def load_encoder(
    spec: str, device: torch.device | str, dtype: torch.dtype = torch.float32, field: str = "reward.encoder"
) -> OpenClipEncoder:
    """The encoder that `--reward.encoder` names, frozen, on `device`.

    spec: `hpsv2`, which downloads HPSv2.1; `shapes`; `local-dir:FOLDER` with open_clip_config.json and weights;
        `hf-hub:ID`; or `ARCHITECTURE:WEIGHTS`, WEIGHTS being an open_clip tag or a file. Torch files are read with
        weights_only, and no code of a model repository is run.
    dtype: torch.float32, torch.bfloat16 or torch.float16; what the towers' matrix products compute in.
    field: what messages call the setting.

    Raises ConfigError for a spec that names nothing loadable, and for images prepared otherwise than its tower expects.
    """
    try:
        return _load(spec, torch.device(device), dtype)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error


def _load(spec: str, device: torch.device, dtype: torch.dtype) -> OpenClipEncoder:
    name, weights = _resolve(SHAPES_ENCODER if spec == "shapes" else spec)
    try:
        if name.startswith((_LOCAL, _HUB)):
            _check_preprocessing(_declared(name))
        file = _weights_file(name, weights)
        if file and (wrong := wrong_content(file)):
            raise ConfigError(f"{str(file)!r} is {wrong}.")
        if file and not name.startswith((_LOCAL, _HUB)):
            _check_activation(spec, name, file)
        model = open_clip.create_model(
            name, weights, precision=_PRECISION[dtype], device=device, require_pretrained=True, weights_only=True
        )
        tokenizer = _tokenizer(name)
        if file:
            _check_positions(spec, file, model)
        check_finite(model, repr(spec))
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{spec!r} does not load: {_one_line(error)}") from error
    return OpenClipEncoder(model, tokenizer, device, dtype)


def _weights_file(name: str, weights: str | None) -> Path | None:
    """The file that open_clip will read; None for a tag, whose weights are the right ones."""
    if name.startswith(_LOCAL):
        found = _find_checkpoint_in_dir(Path(name.removeprefix(_LOCAL)))
        return Path(found) if found else None
    if name.startswith(_HUB):
        return Path(download_pretrained_from_hf(name.removeprefix(_HUB)))
    return None if open_clip.is_pretrained_cfg(name, weights) else Path(weights)


def _check_activation(spec: str, architecture: str, file: Path) -> None:
    """QuickGELU or GELU is in no tensor: refuse a file that is known to want the other one, and warn where nothing tells."""
    computes = open_clip.get_model_config(architecture).get("quick_gelu", False)
    wants = _wants_quick_gelu(file)
    plain = architecture.removesuffix(_QUICK)
    other = plain if computes else plain + _QUICK
    names = {True: "QuickGELU", False: "GELU"}
    if wants is None and other in open_clip.list_models():
        warnings.warn(
            f"{spec!r}: nothing tells whether these weights want GELU or QuickGELU; {architecture} computes "
            f"{names[computes]}, and {other} {names[not computes]}",
            stacklevel=2,
        )
    elif wants not in (None, computes):
        raise ConfigError(
            f"{spec!r} has weights for {names[wants]}, which {architecture} does not compute; {other}:{file} is accepted."
        )


def _wants_quick_gelu(file: Path) -> bool | None:
    """By its name, by the names of what open_clip and OpenAI publish, or by a config that lies beside it; None: unknown."""
    if file.name in (HPSV2_FILE, "HPS_v2_compressed.pt"):
        return False
    if "quickgelu" in re.sub(r"[-_]", "", file.name.lower()):
        return True
    for architecture, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(architecture, tag)
        if published.get("url", "").rpartition("/")[2] == file.name:
            return bool(published.get("quick_gelu", False))
    with suppress(OSError, ValueError, AttributeError):
        beside = json.loads((file.parent / "open_clip_config.json").read_text(encoding="utf-8"))
        return bool(beside.get("model_cfg", {}).get("quick_gelu", False))
    with suppress(OSError, ValueError, AttributeError):
        beside = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))  # transformers'
        activation = beside.get("text_config", beside).get("hidden_act")
        return activation == "quick_gelu" if activation else None
    return None


def _check_positions(spec: str, file: Path, model: torch.nn.Module) -> None:
    """Refuse weights of another image size or length of text: open_clip interpolates their positions without a word."""
    shapes = {name.removeprefix("module."): shape for name, shape in tensor_shapes(file, "its weights' file").items()}
    for name, needed in ((name, tuple(p.shape)) for name, p in model.named_parameters() if name.endswith(_POSITIONS)):
        found = shapes.get(name) or shapes.get(name.removeprefix("text."))
        if found and found != needed:
            what = "images of another size" if name.startswith("visual.") else "texts of another length"
            raise ConfigError(
                f"{spec!r} has weights for {what}: {name} is {list(found)}, and {list(needed)} in the architecture; one "
                "for which they were trained is accepted."
            )


def _resolve(spec: str) -> tuple[str, str | None]:
    """The spec as open_clip.create_model's (model_name, pretrained)."""
    if spec == "hpsv2":
        return "ViT-H-14", _hpsv2_file()
    if spec.startswith(_LOCAL):
        return _LOCAL + str(_checked_folder(Path(spec.removeprefix(_LOCAL)))), None
    if spec.startswith(_HUB):
        return spec, None
    architecture, _, weights = spec.partition(":")
    architecture = architecture.replace("/", "-")
    if architecture not in open_clip.list_models():
        raise ConfigError(
            f"{architecture!r} is not an open_clip architecture{_nearest(architecture)}; accepted are hpsv2, shapes, "
            "local-dir:FOLDER, hf-hub:ID and ARCHITECTURE:WEIGHTS."
        )
    if open_clip.is_pretrained_cfg(architecture, weights):
        _fetch_tagged(architecture, weights)
        return architecture, weights
    file = Path(weights)
    if not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ConfigError(
            f"{spec!r} needs weights after the colon, a file or one of {architecture}'s tags ({tags}); {weights!r} is "
            "neither."
        )
    return architecture, str(file)


def _fetch_tagged(architecture: str, tag: str) -> None:
    """Have the weights of an open_clip tag in the local cache, where open_clip will look for them."""
    spec, weights = f"{architecture}:{tag}", open_clip.get_pretrained_cfg(architecture, tag)
    if weights.get("quick_gelu", False) and not open_clip.get_model_config(architecture).get("quick_gelu", False):
        raise ConfigError(  # open_clip warns, and computes with another activation
            f"{spec!r} has weights for QuickGELU, which {architecture} does not compute; {architecture}-quickgelu:{tag} "
            "is accepted."
        )
    try:
        download_pretrained(weights)
    except Exception as error:  # as in _hpsv2_file
        identifier = weights.get("hf_hub", "").rstrip("/")
        way = f"`hf download {identifier} --local-dir FOLDER` and name local-dir:FOLDER"
        if not identifier:
            way = f"{weights['url']} and name the file, as in {architecture}:FILE"
        raise ConfigError(
            f"{spec!r} needs weights that are not in the local cache and cannot be downloaded ({_one_line(error)}); get "
            f"them with {way}."
        ) from error


def _hpsv2_file() -> str:
    """The weights of HPSv2.1, from the hub's local cache or downloaded into it."""
    try:
        return huggingface_hub.hf_hub_download(HPSV2_REPOSITORY, HPSV2_FILE)
    except Exception as error:  # the hub's own errors, and those of the HTTP library it happens to use
        raise ConfigError(
            f"'hpsv2' needs {HPSV2_FILE}, which is not in the local cache and cannot be downloaded "
            f"({_one_line(error)}); get it from https://huggingface.co/{HPSV2_REPOSITORY} and name the file, as in "
            f"ViT-H-14:PATH/{HPSV2_FILE}."
        ) from error


def _checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder.")
    if not (folder / "open_clip_config.json").is_file():
        raise ConfigError(f"{str(folder)!r} has no open_clip_config.json.")
    if not any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir()):
        raise ConfigError(f"{str(folder)!r} has no weights, such as open_clip_model.safetensors.")
    return folder


def _declared(name: str) -> dict:
    """What open_clip_config.json of a folder or hub id says."""
    if name.startswith(_LOCAL):
        file = Path(name.removeprefix(_LOCAL)) / "open_clip_config.json"
    else:
        file = Path(download_pretrained_from_hf(name.removeprefix(_HUB), filename="open_clip_config.json"))
    return json.loads(file.read_text(encoding="utf-8"))


def _check_preprocessing(config: dict) -> None:
    """Refuse images prepared otherwise than the tower expects: open_clip overrules a wrong size without a word."""
    preprocess, tower = config.get("preprocess_cfg", {}), config["model_cfg"]["vision_cfg"]
    expected = _sides(tower.get("image_size", open_clip.CLIPVisionCfg.image_size))
    given = _sides(preprocess.get("size", expected))
    if given != expected:
        raise ConfigError(
            f"encoder and preprocessing mismatch: preprocess_cfg makes images of {given[0]} x {given[1]} pixels, "
            f"the encoder's tower takes {expected[0]} x {expected[1]}."
        )
    for key, accepted, least in (("mean", "three numbers", -math.inf), ("std", "three numbers above 0", 0)):
        values = preprocess.get(key, getattr(PreprocessCfg, key))
        if not (_are_numbers(values, least) and len(values) == 3):
            raise ConfigError(
                f"encoder and preprocessing mismatch: preprocess_cfg has {key} = {values!r}; accepted is {accepted}, "
                "one per channel."
            )


def _are_numbers(values: Any, least: float) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, int | float) and least < v < math.inf for v in values)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tokenizer(name: str):
    # A folder's config may ask for trust_remote_code in its tokenizer_kwargs; the argument here overrules it.
    hugging_face = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
    return open_clip.get_tokenizer(name, **({"trust_remote_code": False} if hugging_face else {}))


def _image_transform(config: dict, device: torch.device) -> ImageTransform:
    """From open_clip's preprocess config."""
    sides = _sides(config["size"])
    if len(set(sides)) > 1 or config["resize_mode"] == "longest":
        raise ConfigError(
            f"its images are {sides} with resize mode {config['resize_mode']!r}; accepted are square encoders with "
            "mode 'shortest' or 'squash'."
        )
    mean, std = (torch.tensor(config[key], dtype=torch.float32, device=device).view(3, 1, 1) for key in ("mean", "std"))
    return ImageTransform(sides[0], mean, std, config["interpolation"], squash=config["resize_mode"] == "squash")


def _nearest(architecture: str) -> str:
    by_lower = {name.lower(): name for name in open_clip.list_models()}
    matches = difflib.get_close_matches(architecture.lower(), by_lower, n=3)
    return f", nearest are {', '.join(by_lower[m] for m in matches)}" if matches else ""


def _one_line(error: Exception) -> str:
    """Its first sentence: the others are advice for those who write programs."""
    return " ".join(str(error).split()).split(". ")[0][:300].rstrip(".")
