"""Finding and loading what a run left behind, for the commands that use it; and refusing first what cannot come of it."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo import checkpoint
from fastgrpo.checkpoint import checkpoint_folder, find_damage
from fastgrpo.config import ConfigError, ModelConfig, TrainConfig
from fastgrpo.lora import Adapters, add_lora, load_adapters, merged_state_dict
from fastgrpo.settings import load_toml

Weights = Literal["trained", "ema"]

_UNET = "unet/diffusion_pytorch_model.safetensors"
_EMA = "trainer/ema.safetensors"


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
    """Give the base model's UNet the weights of a verified checkpoint, in place; adapters are merged into its own.

    unet: float32, loaded from `model`, the run's.
    Raises ConfigError where it is not the UNet that was trained, but one of other shapes.
    """
    try:
        unet.load_state_dict(_merged(unet, folder, weights, model) if model.lora_rank else _whole(folder, weights))
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"model.path is {model.path!r}, whose UNet has other shapes than that of {folder}; accepted is the model "
            "that the run began with."
        ) from error


def read_adapters(folder: Path, weights: Weights, model: ModelConfig) -> Adapters:
    """The adapters of a verified checkpoint of a run on `model`."""
    tensors = checkpoint.read_adapters(folder) if weights == "trained" else load_file(folder / _EMA)
    return Adapters(tensors, model.lora_rank, model.lora_alpha or model.lora_rank, model.lora_targets)


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


def _whole(folder: Path, weights: Weights) -> dict[str, Tensor]:
    """All weights of a UNet that was trained itself, float32."""
    return load_file(folder / (_UNET if weights == "trained" else _EMA))


@torch.no_grad()
def _merged(unet: UNet2DConditionModel, folder: Path, weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """The UNet's own weights with a checkpoint's adapters merged into them, float32.

    The checkpoint's own merged UNet is not used: its frozen weights are as exact as training held them, which may be
    bfloat16. Raises KeyError or RuntimeError where the adapters do not fit.
    """
    adapted = copy.deepcopy(unet)
    add_lora(adapted, model, seed=0, frozen_dtype=torch.float32)
    load_adapters(adapted, read_adapters(folder, weights, model).tensors)
    return merged_state_dict(adapted)
