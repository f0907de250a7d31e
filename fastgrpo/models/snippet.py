"""Python that loads what a run's export wrote, so that it is drawn as the run drew it."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from fastgrpo.models.check import SHAPES_PIPELINE, describe, is_single_file, other_unet_files
from fastgrpo.models.other_unet import unet_repository
from fastgrpo.schedule import completed
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError

_PIPELINE = "StableDiffusionPipeline"
_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def snippet(form: str, output: Path, model: ModelConfig, dtype: str = "fp32") -> list[str]:
    """Lines of Python that load what was exported as `form` to `output`, in `dtype`, from a run on `model`.

    A `diffusers` folder says everything itself. Elsewhere the run's config, or the single file that it began with, may
    say what the configs that diffusers finds do not: then the lines say it too. They name the precision, since of a
    base model in half precision transformers would keep it and diffusers would not.
    """
    precision = {"torch_dtype": _Code("torch." + _PRECISIONS[dtype])}
    if form == "diffusers":
        pipe = _call(f"{_PIPELINE}.from_pretrained", output, **precision)
        return ["import torch", f"from diffusers import {_PIPELINE}", f"pipe = {pipe}"]
    scheduler, sample_size = _said_elsewhere(model)
    options = precision | ({"scheduler": _Code("scheduler")} if scheduler else {})
    base = str(SHAPES_PIPELINE) if model.path == "shapes" else model.path
    # A file does not hold its configs; where none are named, diffusers guesses them.
    config = model.config if is_single_file(model.path) else base
    configs = {"config": config, "revision": model.revision if config else ""}
    if form == "single-file":
        pipe = _call(f"{_PIPELINE}.from_single_file", output, **configs, **options)
    elif is_single_file(model.path):
        pipe = _call(f"{_PIPELINE}.from_single_file", model.path, **configs, **options)
    else:
        chosen = {"variant": model.variant, "revision": model.revision}
        pipe = _call(f"{_PIPELINE}.from_pretrained", base, **chosen, **options)
    imports, unet = _unet_lines(model) if form == "lora" and model.unet else ([], [])
    return [
        "import torch",
        f"from diffusers import {'DDIMScheduler, ' if scheduler else ''}{_PIPELINE}",
        *imports,
        *([f"scheduler = {_call('DDIMScheduler', **scheduler)}"] if scheduler else []),
        f"pipe = {pipe}",
        *([f"pipe.unet.register_to_config(sample_size={sample_size!r})"] if sample_size else []),
        *unet,
        *([f"pipe.load_lora_weights({str(output)!r})"] if form == "lora" else []),
    ]


class _Code(str):
    """What stands in the lines as it is, not as a string's literal."""


def _said_elsewhere(model: ModelConfig) -> tuple[dict[str, Any], Any]:
    """What the run was drawn with and the configs that diffusers finds may not say.

    Returns the arguments of a DDIMScheduler and the UNet's sample_size, both empty where the configs say the same.
    """
    if not is_single_file(model.path) and model.prediction_type == "auto":
        return {}, None
    try:
        description = describe(model)
    except ConfigError:  # adapters can be exported without the base model
        return ({} if model.prediction_type == "auto" else {"prediction_type": model.prediction_type}), None
    # Of a file alone diffusers guesses which of its own configs are meant, and with them the size.
    guessed = is_single_file(model.path) and not model.config
    # A DDIMScheduler's own defaults are left out.
    known, config = inspect.signature(DDIMScheduler).parameters, completed(description.scheduler)
    arguments = {name: config[name] for name, own in known.items() if name in config and config[name] != own.default}
    return arguments, description.unet["sample_size"] if guessed else None


def _unet_lines(model: ModelConfig) -> tuple[list[str], list[str]]:
    """What to import and to run to give `pipe` the UNet of model.unet."""
    if Path(model.unet).is_file():  # which may hold some tensors alone, in any layout
        advice = f"{model.unet}; --format diffusers writes a pipeline that has them"
        return [], [f"# first, pipe.unet needs the weights of {advice}"]
    repository, prefix = unet_repository(model.unet)
    try:
        names = other_unet_files(model, repository, prefix)
    except ConfigError:
        names = [f"{prefix}diffusion_pytorch_model.safetensors"]
    imports = ["from safetensors.torch import load_file"]
    if Path(repository.name).is_dir():
        files = [repr(str(Path(repository.name) / name)) for name in names]
    else:
        imports = ["from huggingface_hub import hf_hub_download", *imports]
        files = [_call("hf_hub_download", repository.name, filename=name) for name in names]
    partly = "" if len(files) == 1 else ", strict=False"
    return imports, [f"pipe.unet.load_state_dict(load_file({file}){partly})" for file in files]


def _call(function: str, *arguments: object, **options: Any) -> str:
    """options: those that are empty strings are left out."""
    shown = [repr(str(argument)) for argument in arguments]
    shown += [f"{name}={v if isinstance(v, _Code) else repr(v)}" for name, v in options.items() if v != ""]
    return f"{function}({', '.join(shown)})"
