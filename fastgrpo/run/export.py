"""What `python -m fastgrpo.export` does: what a run was trained to, as files that other programs load."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from fastgrpo.models.check import describe
from fastgrpo.models.load import load_components
from fastgrpo.models.save import save_pipeline
from fastgrpo.models.single_file import write_single_file
from fastgrpo.models.snippet import snippet
from fastgrpo.run.opening import blaming_config
from fastgrpo.run.trained import load_unet, read_adapters
from fastgrpo.settings.commands import Export
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.devices import DTYPES
from fastgrpo.system.files import sync_folder, sync_tree
from fastgrpo.unet.lora import save_lora


def export(command: Export, config: TrainConfig, folder: Path, console: Console) -> None:
    """Write `command.output`, completely or not at all, and say how to load it.

    config: of the run. folder: of the checkpoint to take.
    Raises ConfigError before anything is loaded where that is possible, and OSError where it cannot be written.
    """
    if command.format != "lora":
        with blaming_config(command.run):
            console.say(*describe(config.model).notes)
    with console.bar("export"), _appearing(command.output) as partial:
        if command.format == "lora":
            save_lora(partial, read_adapters(folder, command.weights, config.model), DTYPES[command.dtype])
        else:
            with blaming_config(command.run):
                _write_model(partial, folder, command, config.model)
    console.say(
        f"exported  {command.output}, {command.format}, {_size(command.output)}",
        f"weights   {folder}, {command.weights}, {command.dtype}",
        "",
        *snippet(command.format, command.output, config.model, command.dtype),
    )


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path`, a file or a folder: it is put there once the block has written all.

    What an export that was killed has left is removed first. Raises OSError where something cannot be written.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    try:
        yield partial
        sync_tree(partial)
        os.rename(partial, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path)) from error
    finally:
        with suppress(OSError):
            _remove(partial)  # on a full disk it would be in the way of everything else
    sync_folder(path.parent)


def _write_model(path: Path, folder: Path, command: Export, model: ModelConfig) -> None:
    """The base model with the checkpoint's UNet."""
    disable_progress_bar()  # one per file read, gone in a blink
    components, dtype = load_components(model, torch.float32), DTYPES[command.dtype]
    load_unet(components.unet, folder, command.weights, model)
    if command.format == "diffusers":
        save_pipeline(path, components, dtype)
    else:
        write_single_file(
            path, components.unet, components.vae, components.text_encoder, dtype, components.scheduler_config
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> str:
    """Of a file or of all that is in a folder."""
    size = sum(file.stat().st_size for file in [*path.rglob("*"), path] if file.is_file())
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
