"""The open_clip model that the spec of an encoder names: found, checked and loaded, or refused with the reason."""

import difflib
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import open_clip
import torch
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import nn

from fastgrpo.models.sound import check_finite
from fastgrpo.models.tensor_file import tensor_shapes, wrong_content
from fastgrpo.rewards.transformers_clip import load_transformers_clip
from fastgrpo.system.errors import ConfigError, first_sentence

_SHIPPED = Path(__file__).resolve().parents[1] / "shapes" / "weights"
SHIPPED_ENCODERS = {
    "shapes": f"local-dir:{_SHIPPED / 'encoder'}",
    "shapes-held-out": f"local-dir:{_SHIPPED / 'held_out'}",
}
"""Specs of the encoders that ship with fastgrpo -> what they stand for."""

HPSV2_REPOSITORY, HPSV2_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
"""Where the spec `hpsv2` finds the weights of HPSv2.1 on the hub, an open_clip ViT-H-14."""

TRANSFORMERS = "transformers:"
"""Begins the spec of a model in the format of transformers, before a folder or hub id."""

_QUICK = "-quickgelu"  # ends the names of open_clip's architectures that compute it
_LOCAL, _HUB = "local-dir:", "hf-hub:"
_CONFIG = "open_clip_config.json"
_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth"}  # what open_clip looks for in a folder
# What open_clip, torch, safetensors and json raise for files that are not what they should be.
_UNREADABLE = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, UnpicklingError)


def load_open_clip(spec: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The open_clip model that `spec`, in `load_encoder`'s notation, names, and its tokenizer. Raises ConfigError."""
    if spec.startswith(TRANSFORMERS):
        return load_transformers_clip(spec.removeprefix(TRANSFORMERS), device, dtype)
    name, weights = _resolve(SHIPPED_ENCODERS.get(spec, spec))
    packaged = name.startswith((_LOCAL, _HUB))  # with a config of its own
    try:
        if packaged:
            _check_preprocessing(_read_config(name))
        file = _weights_file(name, weights)
        if file and (wrong := wrong_content(file)):
            raise ConfigError(f"{str(file)!r} is {wrong}.")
        if file and not packaged:
            _check_activation(spec, name, file)
        model = open_clip.create_model(
            name, weights, precision=_PRECISION[dtype], device=device, require_pretrained=True, weights_only=True
        )
        if file:
            _check_positions(spec, file, model)
        check_finite(model, repr(spec))
        # A folder's config may ask for trust_remote_code in its tokenizer_kwargs; the argument here overrules it.
        hugging_face = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        return model, open_clip.get_tokenizer(name, **({"trust_remote_code": False} if hugging_face else {}))
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{spec!r} does not load: {first_sentence(error)}") from error


def image_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from one number for both or from two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _resolve(spec: str) -> tuple[str, str | None]:
    """The spec as open_clip.create_model's (model_name, pretrained)."""
    if spec == "hpsv2":
        return "ViT-H-14", _hpsv2_file()
    if spec.startswith(_LOCAL):
        _check_folder(Path(spec.removeprefix(_LOCAL)))
    if spec.startswith((_LOCAL, _HUB)):
        return spec, None
    architecture, _, weights = spec.partition(":")
    architecture = architecture.replace("/", "-")
    if architecture not in open_clip.list_models():
        by_lower = {name.lower(): name for name in open_clip.list_models()}
        matches = difflib.get_close_matches(architecture.lower(), by_lower, n=3)
        nearest = f", nearest are {', '.join(by_lower[m] for m in matches)}" if matches else ""
        raise ConfigError(
            f"{architecture!r} is not an open_clip architecture{nearest}; accepted are hpsv2, "
            f"{', '.join(SHIPPED_ENCODERS)}, local-dir:FOLDER, hf-hub:ID, transformers:ID "
            "and ARCHITECTURE:WEIGHTS."
        )
    if open_clip.is_pretrained_cfg(architecture, weights):
        _fetch_tagged(architecture, weights)
    elif not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ConfigError(
            f"{spec!r} needs weights after the colon, a file or one of {architecture}'s tags ({tags}); {weights!r} is "
            "neither."
        )
    return architecture, weights


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder.")
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} has no {_CONFIG}.")
    if not any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir()):
        raise ConfigError(f"{str(folder)!r} has no weights, such as open_clip_model.safetensors.")


def _fetch_tagged(architecture: str, tag: str) -> None:
    """Have the weights of an open_clip tag in the local cache, where open_clip will look for them."""
    spec, weights = f"{architecture}:{tag}", open_clip.get_pretrained_cfg(architecture, tag)
    if weights.get("quick_gelu", False) and not open_clip.get_model_config(architecture).get("quick_gelu", False):
        raise ConfigError(  # open_clip warns, and computes with another activation
            f"{spec!r} has weights for QuickGELU, which {architecture} does not compute; "
            f"{architecture}{_QUICK}:{tag} is accepted."
        )
    try:
        download_pretrained(weights)
    except Exception as error:  # the hub's own errors, and those of the HTTP library it happens to use
        identifier = weights.get("hf_hub", "").rstrip("/")
        way = f"`hf download {identifier} --local-dir FOLDER` and name local-dir:FOLDER"
        if not identifier:
            way = f"{weights['url']} and name the file, as in {architecture}:FILE"
        raise ConfigError(
            f"{spec!r} needs weights that are not in the local cache and cannot be downloaded "
            f"({first_sentence(error)}); get them with {way}."
        ) from error


def _hpsv2_file() -> str:
    """The weights of HPSv2.1, from the hub's local cache or downloaded into it."""
    try:
        return huggingface_hub.hf_hub_download(HPSV2_REPOSITORY, HPSV2_FILE)
    except Exception as error:  # as in _fetch_tagged
        raise ConfigError(
            f"'hpsv2' needs {HPSV2_FILE}, which is not in the local cache and cannot be downloaded "
            f"({first_sentence(error)}); get it from https://huggingface.co/{HPSV2_REPOSITORY} and name the file, as "
            f"in ViT-H-14:PATH/{HPSV2_FILE}."
        ) from error


def _weights_file(name: str, weights: str | None) -> Path | None:
    """The file that open_clip will read; None for a tag, whose weights are the right ones."""
    if name.startswith(_LOCAL):
        found = _find_checkpoint_in_dir(Path(name.removeprefix(_LOCAL)))
        return Path(found) if found else None
    if name.startswith(_HUB):
        return Path(download_pretrained_from_hf(name.removeprefix(_HUB)))
    return None if weights is None or open_clip.is_pretrained_cfg(name, weights) else Path(weights)


def _read_config(name: str) -> dict[str, Any]:
    """The open_clip_config.json of a folder or hub id."""
    if name.startswith(_LOCAL):
        file = Path(name.removeprefix(_LOCAL)) / _CONFIG
    else:
        file = Path(download_pretrained_from_hf(name.removeprefix(_HUB), filename=_CONFIG))
    return json.loads(file.read_text(encoding="utf-8"))


def _check_preprocessing(config: dict[str, Any]) -> None:
    """Refuse images prepared otherwise than the tower expects: open_clip overrules a wrong size without a word."""
    preprocess, tower = config.get("preprocess_cfg", {}), config["model_cfg"]["vision_cfg"]
    expected = image_sides(tower.get("image_size", open_clip.CLIPVisionCfg.image_size))
    given = image_sides(preprocess.get("size", expected))
    if given != expected:
        raise ConfigError(
            f"encoder and preprocessing mismatch: preprocess_cfg makes images of {given[0]} x {given[1]} pixels, "
            f"the encoder's tower takes {expected[0]} x {expected[1]}."
        )
    for key, accepted, least in (("mean", "three numbers", -math.inf), ("std", "three numbers above 0", 0)):
        values = preprocess.get(key, getattr(PreprocessCfg, key))
        listed = values if isinstance(values, list | tuple) else ()
        if len(listed) != 3 or not all(isinstance(v, int | float) and least < v < math.inf for v in listed):
            raise ConfigError(
                f"encoder and preprocessing mismatch: preprocess_cfg has {key} = {values!r}; accepted is {accepted}, "
                "one per channel."
            )


def _check_activation(spec: str, architecture: str, file: Path) -> None:
    """Refuse weights for the other one of GELU and QuickGELU, which is in no tensor; warn where nothing tells."""
    computes = open_clip.get_model_config(architecture).get("quick_gelu", False)
    wants = wants_quick_gelu(file)
    other = architecture.removesuffix(_QUICK) + ("" if computes else _QUICK)
    names = {True: "QuickGELU", False: "GELU"}
    if wants is None and other in open_clip.list_models():
        warnings.warn(
            f"{spec!r}: nothing tells whether these weights want GELU or QuickGELU; {architecture} computes "
            f"{names[computes]}, and {other} {names[not computes]}",
            stacklevel=2,
        )
    elif wants not in (None, computes):
        raise ConfigError(
            f"{spec!r} has weights for {names[not computes]}, which {architecture} does not compute; {other}:{file} is "
            "accepted."
        )


def wants_quick_gelu(file: Path) -> bool | None:
    """Whether weights want QuickGELU, by the file's name or by a config that lies beside it; None: nothing tells."""
    if file.name in (HPSV2_FILE, "HPS_v2_compressed.pt"):
        return False
    if "quickgelu" in re.sub(r"[-_]", "", file.name.lower()):
        return True
    for architecture, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(architecture, tag)
        if published.get("url", "").rpartition("/")[2] == file.name:
            return bool(published.get("quick_gelu", False))
    for name in (_CONFIG, "config.json"):  # open_clip's and transformers'
        try:
            config = json.loads((file.parent / name).read_text(encoding="utf-8"))
            if name == _CONFIG:
                return bool(config.get("model_cfg", {}).get("quick_gelu", False))
            if activation := config.get("text_config", config).get("hidden_act"):
                return activation == "quick_gelu"
        except (OSError, ValueError, AttributeError):
            continue
    return None


def _check_positions(spec: str, file: Path, model: nn.Module) -> None:
    """Refuse weights of another image size or length of text: open_clip interpolates their positions without a word."""
    shapes = {name.removeprefix("module."): shape for name, shape in tensor_shapes(file, "its weights' file").items()}
    for name, parameter in model.named_parameters():
        if not name.endswith("positional_embedding"):
            continue
        found, needed = shapes.get(name) or shapes.get(name.removeprefix("text.")), tuple(parameter.shape)
        if found and found != needed:
            what = "images of another size" if name.startswith("visual.") else "texts of another length"
            raise ConfigError(
                f"{spec!r} has weights for {what}: {name} is {list(found)}, and {list(needed)} in the architecture; "
                "one for which they were trained is accepted."
            )
