"""Finding and loading what a run left behind, for the commands that use it; and refusing first what cannot come of it."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.checkpoint import checkpoint_folder, find_damage
from fastgrpo.config import ConfigError, ModelConfig, TrainConfig
from fastgrpo.lora import LORA_FILE, add_lora, merged_state_dict
from fastgrpo.settings import load_toml

Weights = Literal["trained", "ema"]

_EMA = "trainer/ema.safetensors"
_ADAPTER = ".default."  # what peft puts into the names of adapters' parameters, and diffusers' files leave out


def read_run(run: Path) -> TrainConfig:
    """The config of a run, from its folder. Raises ConfigError where there is no run in it."""
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder; accepted is the folder of a run.")
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: there is no config.toml in it, so it is not the folder of a run.")
    return load_toml(run / "config.toml")


@contextmanager
def blaming_config(run: Path) -> Iterator[None]:
    """Let a ConfigError of the block say that the run's own config asks for what is refused."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{run / 'config.toml'}: {error}") from error


def find_checkpoint(run: Path, iteration: int | None, weights: Weights) -> Path:
    """The folder of the checkpoint of `iteration`, or of the newest, every file of it verified.

    Raises ConfigError where there is none, it is damaged (which other one is good), or it lacks the `weights`.
    """
    found = _iterations(run)
    if not found:
        raise ConfigError(f"{run}: there is no checkpoint in it yet.")
    if iteration is not None and iteration not in found:
        raise ConfigError(
            f"--checkpoint {iteration}: {run} has no such checkpoint; there are {', '.join(map(str, found))}."
        )
    folder = checkpoint_folder(run, found[-1] if iteration is None else iteration)
    if damage := find_damage(folder):
        good = next((n for n in reversed(found) if find_damage(checkpoint_folder(run, n)) is None), None)
        advice = "there is no good checkpoint" if good is None else f"the last good one is --checkpoint {good}"
        raise ConfigError(f"{damage}; {advice}.")
    if weights == "ema" and not (folder / _EMA).is_file():
        raise ConfigError("--weights ema: the run kept no moving average (its optim.ema is 0); accepted is trained.")
    return folder


def load_unet(unet: UNet2DConditionModel, folder: Path, weights: Weights, model: ModelConfig) -> None:
    """Give the base model's UNet the weights of a verified checkpoint, in place; adapters are merged into them.

    unet: float32, loaded from `model`, the run's. A moving average of adapters is merged with the weights it has.
    Raises ConfigError where it is not the UNet that was trained, but one of other shapes.
    """
    try:
        unet.load_state_dict(_state_dict(unet, folder, weights, model))
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"model.path is {model.path!r}, whose UNet has other shapes than that of {folder}; accepted is the model "
            "that the run began with."
        ) from error


def read_lora(folder: Path, weights: Weights) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The adapters of a verified checkpoint as diffusers' `load_lora_weights` names them, and the file's metadata.

    Tensors are float32; rank and alpha are in the metadata.
    """
    with safe_open(folder / "lora" / LORA_FILE, "pt") as file:
        metadata = file.metadata()
        trained = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if weights == "trained":
        return trained, metadata
    average = load_file(folder / _EMA)
    return {f"unet.{name.replace(_ADAPTER, '.')}": tensor for name, tensor in average.items()}, metadata


def check_writable(flag: str, folder: Path) -> None:
    """Raise ConfigError, naming the `flag` that asks for it, where no file can be made in `folder`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag}: cannot write in {str(folder)!r} ({error.strerror}); accepted is a place in a folder that exists "
            "and can be written."
        ) from error


def _iterations(run: Path) -> list[int]:
    """Those that have a checkpoint, ascending."""
    names = (folder.name.removeprefix("iter-") for folder in (run / "checkpoints").glob("iter-*"))
    return sorted(int(name) for name in names if name.isdigit())


def _state_dict(unet: UNet2DConditionModel, folder: Path, weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """float32, by the names of the plain UNet."""
    if weights == "ema" and model.lora_rank:
        return _merged_average(unet, load_file(folder / _EMA), model)
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return state if weights == "trained" else state | load_file(folder / _EMA)


@torch.no_grad()
def _merged_average(unet: UNet2DConditionModel, average: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The UNet's weights with the averaged adapters merged into them."""
    adapted = copy.deepcopy(unet)
    add_lora(adapted, model, seed=0, frozen_dtype=torch.float32)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(average[name])
    return merged_state_dict(adapted)
