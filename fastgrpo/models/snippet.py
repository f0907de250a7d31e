"""Python that loads what a run's export wrote, so that it is drawn as the run drew it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from fastgrpo.models.check import SHAPES_PIPELINE, describe, find_other_unet, is_single_file, other_unet_files
from fastgrpo.models.configs import Description
from fastgrpo.models.other_unet import unet_repository
from fastgrpo.models.tensor_file import SAFETENSORS, torch_content
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
    said = _said_elsewhere(model)
    options = precision | ({"scheduler": _Code("scheduler")} if said.scheduler else {})
    if form == "single-file":
        pipe = _call(f"{_PIPELINE}.from_single_file", output, **_configs(model), **options)
    elif is_single_file(model.path):
        pipe = _call(f"{_PIPELINE}.from_single_file", model.path, **_configs(model), **options)
    else:
        chosen = {"variant": model.variant, "revision": model.revision}
        pipe = _call(f"{_PIPELINE}.from_pretrained", _base(model), **chosen, **options)
    imports, unet = _unet_lines(model) if form == "lora" and model.unet else ([], [])
    return [
        "import torch",
        f"from diffusers import {'DDIMScheduler, ' if said.scheduler else ''}{_PIPELINE}",
        *imports,
        *([f"scheduler = {_call('DDIMScheduler', **said.scheduler)}"] if said.scheduler else []),
        f"pipe = {pipe}",
        *([f"pipe.unet.register_to_config(sample_size={said.sample_size!r})"] if said.sample_size else []),
        *unet,
        *([f"pipe.load_lora_weights({str(output)!r})"] if form == "lora" else []),
    ]


class _Code(str):
    """What stands in the lines as it is, not as a string's literal."""

    __slots__ = ()


@dataclass(frozen=True)
class _Said:
    """What the run was drawn with and the configs that diffusers finds may not say.

    scheduler: the arguments of a DDIMScheduler. sample_size: the UNet's. Both are empty where the base's own say the same.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int | tuple[int, int] = ()


def _said_elsewhere(model: ModelConfig) -> _Said:
    if not is_single_file(model.path) and model.prediction_type == "auto":
        return _Said()
    try:
        description: Description = describe(model)
    except ConfigError:  # adapters can be exported without the base model
        known = {} if model.prediction_type == "auto" else {"prediction_type": model.prediction_type}
        return _Said(known)
    # Of a file alone diffusers guesses which of its own configs are meant, and with them the size.
    guessed = is_single_file(model.path) and not model.config
    return _Said(_ddim_arguments(description.scheduler), description.unet["sample_size"] if guessed else ())


def _ddim_arguments(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' DDIMScheduler must be told to follow this scheduler_config.json; its own defaults are left out."""
    known, config = inspect.signature(DDIMScheduler).parameters, completed(scheduler_config)
    return {name: config[name] for name, own in known.items() if name in config and config[name] != own.default}


def _configs(model: ModelConfig) -> dict[str, str]:
    """Where `from_single_file` finds configs, which the file does not hold; without them diffusers guesses."""
    where = model.config if is_single_file(model.path) else _base(model)
    return {"config": where, "revision": model.revision if where else ""}


def _base(model: ModelConfig) -> str:
    return str(SHAPES_PIPELINE) if model.path == "shapes" else model.path


def _unet_lines(model: ModelConfig) -> tuple[list[str], list[str]]:
    """What to import and to run to give `pipe` the UNet of model.unet, whose weights need not come with a config."""
    if Path(model.unet).is_file():
        return _unet_file_lines(model)
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
    read = [f"load_file({file})" for file in files]
    state = read[0] if len(read) == 1 else "{" + ", ".join(f"**{part}" for part in read) + "}"
    return imports, [f"pipe.unet.load_state_dict({state})"]


def _unet_file_lines(model: ModelConfig) -> tuple[list[str], list[str]]:
    """For a file of all or some of a UNet's tensors. diffusers reads its own layout alone."""
    try:
        tensors = find_other_unet(model, describe(replace(model, unet="")))
    except ConfigError:
        tensors = None
    safe = model.unet.endswith(SAFETENSORS)
    nested = (
        tensors is not None and not safe and not tensors.places.keys() <= torch_content(Path(model.unet), "").keys()
    )
    if tensors is None or nested or any(name != key for name, (_, key) in tensors.places.items()):
        return [], [
            f"# first, pipe.unet needs the weights of {model.unet}; --format diffusers writes a pipeline that has them"
        ]
    if safe:
        imports, state = ["from safetensors.torch import load_file"], f"load_file({model.unet!r})"
    else:
        imports, state = [], f"torch.load({model.unet!r}, weights_only=True)"
    return imports, [f"pipe.unet.load_state_dict({state}, strict=False)"]


def _call(function: str, *arguments: object, **options: Any) -> str:
    """options: those that are empty strings are left out."""
    shown = [repr(str(argument)) for argument in arguments]
    shown += [f"{name}={v if isinstance(v, _Code) else repr(v)}" for name, v in options.items() if v != ""]
    return f"{function}({', '.join(shown)})"
