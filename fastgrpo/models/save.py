"""Writing a pipeline as a diffusers folder that any version of diffusers and transformers reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgrpo.models.configs import Components


def save_pipeline(folder: Path, components: Components, dtype: torch.dtype) -> None:
    """Write a folder for StableDiffusionPipeline.from_pretrained, without a safety checker, all weights in `dtype`."""
    for name, module in (("unet", components.unet), ("vae", components.vae)):
        save_config(folder / name, module)
        _save_weights(folder / name / "diffusion_pytorch_model.safetensors", module, dtype)
    components.text_encoder.config.save_pretrained(folder / "text_encoder")
    # Its tensors' names began so until transformers 5.6, and newer versions read that too.
    _save_weights(folder / "text_encoder" / "model.safetensors", components.text_encoder, dtype, "text_model.")
    components.tokenizer.save_pretrained(folder / "tokenizer")
    # vocab.json and merges.txt, for those that do not read tokenizer.json.
    components.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    scheduler = dict(components.scheduler_config)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        **{absent: [None, None] for absent in ("feature_extractor", "image_encoder", "safety_checker")},
        "requires_safety_checker": False,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


def save_config(folder: Path, module: ModelMixin) -> None:
    """Write a module's config.json, without the place it was loaded from: that is nobody else's business."""
    module.save_config(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    _write_json(file, {key: value for key, value in config.items() if key != "_name_or_path"})


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone: the library puts metadata in a random order."""
    save_file(dict(tensors), file, metadata=dict(metadata))
    with open(file, "rb+") as written:
        length = int.from_bytes(written.read(8), "little")
        header = json.loads(written.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        written.seek(8)
        written.write(text.ljust(length))  # blanks may follow; the order alone has changed, so there is room


def _save_weights(file: Path, module: nn.Module, dtype: torch.dtype, prefix: str = "") -> None:
    state = {prefix + name: tensor.to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
