"""`python -m fastgrpo.export RUN`: what a run was trained to, as files that other programs load."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from fastgrpo.config import ConfigError, ModelConfig, TrainConfig
from fastgrpo.console import Console, run_command
from fastgrpo.files import sync_folder, sync_tree
from fastgrpo.lora import save_lora
from fastgrpo.models.check import check_model
from fastgrpo.models.load import load_components
from fastgrpo.models.save import save_pipeline
from fastgrpo.models.single_file import write_single_file
from fastgrpo.settings import parse_flags
from fastgrpo.snippet import snippet
from fastgrpo.tuned import Weights, blaming_config, check_writable, find_checkpoint, load_unet, read_adapters, read_run

PROGRAM = "python -m fastgrpo.export"
_SUFFIX = ".safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Export:
    """Write the Stable Diffusion that a run trained, complete or as adapters, in a form that other programs load."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, finished or not."""
    format: Literal["diffusers", "single-file", "lora"]
    """`diffusers`, a complete pipeline folder; `single-file`, a .safetensors file in the original layout of SD 1.x / 2.x; `lora`, for runs with adapters, a folder with these alone."""
    output: Path
    """Where to write it: a folder that is new or empty, or a new file for `single-file`."""
    checkpoint: int | None = None
    """Iteration of the checkpoint to take; None is the newest."""
    weights: Weights = "trained"
    """`trained`, or `ema`, the moving average that runs with optim.ema keep."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of what is written; training is in fp32."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        export(parse_flags(_Export, sys.argv[1:] if argv is None else argv, PROGRAM), Console())

    return run_command(command, "nothing was exported")


def export(command: _Export, console: Console) -> None:
    """Write `command.output`, completely or not at all, and say how to load it.

    Raises ConfigError before anything is loaded where that is possible, and OSError where it cannot be written.
    """
    config = read_run(command.run)
    _check(command, config)
    if command.format != "lora":
        with blaming_config(command.run):
            check_model(config.model)
    folder = find_checkpoint(command.run, command.checkpoint, command.weights)
    with console.bar("export"), _appearing(command.output) as partial:
        if command.format == "lora":
            save_lora(partial, read_adapters(folder, command.weights, config.model), _DTYPES[command.dtype])
        else:
            with blaming_config(command.run):
                _write_model(partial, folder, command, config.model)
    console.say(
        f"exported  {command.output}, {command.format}, {_size(command.output)}",
        f"weights   {folder}, {command.weights}, {command.dtype}",
        "",
        *snippet(command.format, command.output, config.model, command.dtype),
    )


def _check(command: _Export, config: TrainConfig) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    output = command.output
    if command.format == "lora" and not config.model.lora_rank:
        raise ConfigError(
            f"--format lora: {command.run} trained the whole UNet and has no adapters; accepted are diffusers and "
            "single-file."
        )
    if command.format == "single-file" and output.suffix != _SUFFIX:
        raise ConfigError(f"--output {output}: accepted is the name of a file that ends in {_SUFFIX}.")
    if command.format == "single-file" and output.exists():
        raise ConfigError(f"--output {output}: it is there already; accepted is a new file.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: it is there already; accepted is a folder that is new or empty.")
    check_writable(f"--output {output}", Path(os.path.abspath(output)).parent)


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


def _write_model(path: Path, folder: Path, command: _Export, model: ModelConfig) -> None:
    """The base model with the checkpoint's UNet."""
    disable_progress_bar()  # one per file read, gone in a blink
    components, dtype = load_components(model, torch.float32), _DTYPES[command.dtype]
    load_unet(components.unet, folder, command.weights, model)
    if command.format == "diffusers":
        save_pipeline(path, components, components.unet, dtype)
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


if __name__ == "__main__":
    sys.exit(main())
