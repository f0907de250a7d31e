"""What `python -m fastgrpo.export` does: a run's trained model, written as files that other programs load."""

import os
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from fastgrpo.models.check import describe
from fastgrpo.models.load import load_components
from fastgrpo.models.save import save_pipeline
from fastgrpo.models.single_file import write_single_file
from fastgrpo.models.snippet import snippet
from fastgrpo.run.card import Card, model_card
from fastgrpo.run.checkpoint import load_unet, read_adapters, read_unet_config
from fastgrpo.settings.commands import Export
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.devices import DTYPES
from fastgrpo.system.errors import blaming
from fastgrpo.system.files import appearing
from fastgrpo.unet.kohya import save_kohya
from fastgrpo.unet.lora import save_lora


def export(command: Export, config: TrainConfig, folder: Path, console: Console) -> Card:
    """Write `command.output`, completely or not at all, and say how to load it. Returns its card.

    config: of the run. folder: of the checkpoint to take.
    Raises ConfigError before anything is loaded where that is possible, and OSError where it cannot be written.
    """
    card = model_card(command, config, folder)
    if command.format != "lora":
        with blaming(command.run / "config.toml"):
            console.say(*describe(config.model).notes)
    with console.bar("export"), appearing(Path(os.path.abspath(command.output))) as partial:
        if command.format == "lora":
            _write_adapters(partial, folder, command, config.model)
        else:
            with blaming(command.run / "config.toml"):
                _write_model(partial, folder, command, config.model)
        if not command.is_file:
            card.write(partial)
    kohya = " in kohya's layout" if command.layout == "kohya" else ""
    console.say(
        f"exported  {command.output}, {command.format}{kohya}, {_size(command.output)}",
        f"weights   {folder}, {command.weights}, {command.written_dtype}",
        "",
        *snippet(command.format, command.output, config.model, command.loaded_dtype),
    )
    return card


def _write_adapters(path: Path, folder: Path, command: Export, model: ModelConfig) -> None:
    adapters, dtype = read_adapters(folder, command.weights, model), DTYPES[command.written_dtype]
    if command.layout == "kohya":
        save_kohya(path, command.output.stem, adapters, read_unet_config(folder), dtype)
    else:
        save_lora(path, adapters, dtype)


def _write_model(path: Path, folder: Path, command: Export, model: ModelConfig) -> None:
    """Write the base model with the checkpoint's UNet."""
    disable_progress_bar()  # one per file read, gone in a blink
    parts, dtype = load_components(model, torch.float32), DTYPES[command.written_dtype]
    load_unet(parts.unet, folder, command.weights, model)
    if command.format == "diffusers":
        save_pipeline(path, parts, dtype)
    else:
        write_single_file(path, parts.unet, parts.vae, parts.text_encoder, dtype, parts.scheduler_config)


def _size(path: Path) -> str:
    """The size of a file or of all that is in a folder."""
    size = sum(file.stat().st_size for file in [*path.rglob("*"), path] if file.is_file())
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
