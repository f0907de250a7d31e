"""A run's checkpoints: complete, verified, and enough to continue bit for bit or to draw with what was trained.

    checkpoints/iter-000050/
      unet/              what diffusers' UNet2DConditionModel.from_pretrained reads, float32, adapters merged
      lora/              what diffusers' load_lora_weights reads, where adapters are trained
      trainer/           optimizer.safetensors (AdamW's moments and step by parameter name; moments of 8 bits as codes,
                         scales and the map from one to the other), ema.safetensors,
                         state.json, and adapters.safetensors: as they are trained, without lora/'s alpha / rank
      manifest.json      sha256 of every file, written last
    checkpoints/best.json  which of them is the best, where evaluations say so (best.py)

A checkpoint is written under another name and appears by a rename, so every iter-* folder was once complete; the
manifest tells whether it still is, and recovery.py from which one a run goes on. Randomness has no state (see
randomness.py): the iteration's number restores it. Nothing in a checkpoint depends on how many processes wrote it, or
on engine.shard: any number goes on from it.
"""

import copy
import errno
import json
import shutil
from collections.abc import Container
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.engine.trainable import Trainable
from fastgrpo.models.save import save_config
from fastgrpo.models.sound import load_finite
from fastgrpo.run import best
from fastgrpo.settings.commands import Weights
from fastgrpo.settings.schema import ModelConfig, OptimConfig, TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import PARTIAL_SUFFIX, appearing, file_sha256, require_room
from fastgrpo.system.workers import available_cores
from fastgrpo.unet.lora import (
    LORA_FILE,
    Adapters,
    adapters_of,
    add_lora,
    has_lora,
    load_adapters,
    merged_state_dict,
    parameters_in,
    save_lora,
)

_UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"  # diffusers' name
_LORA = f"lora/{LORA_FILE}"
_ADAPTERS = "trainer/adapters.safetensors"
_OPTIMIZER = "trainer/optimizer.safetensors"
EMA_FILE = "trainer/ema.safetensors"
_STATE = "trainer/state.json"
_MANIFEST = "manifest.json"
_LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}  # of a file that is not there, or whose disk is broken
_MARGIN = 2**24  # bytes: headers, JSON, and what else the run writes meanwhile


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds beside weights and moments.

    iteration: iterations finished. seed: the run's. seconds: wall clock of the run so far, over all resumes.
    threads: CPU threads that shared the batches; processes: that shared the prompts; versions: of the libraries that do
    the arithmetic; engine: what the engine decided, as its record. Bits depend on all four.
    scaler: state of fp16's loss scale, empty without it. inputs: as `input_digests`.
    iterations: how many the run was to have, 0 where unknown. evaluated: whether the policy was, after this one.
    guard: what the guard has seen and decided, empty in a checkpoint of an earlier version.
    evaluations: the numbers of all evaluations so far that the best checkpoint is chosen by, each an `Evaluated`.
    """

    iteration: int
    seed: int
    seconds: float
    threads: int
    versions: dict[str, str]
    processes: int = 1
    engine: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    iterations: int = 0
    evaluated: bool = False
    guard: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def library_versions(optim: OptimConfig) -> dict[str, str]:
    """Versions of what decides the bits of a result."""
    names = ("torch", "diffusers", "transformers", "open_clip_torch", "peft")
    return {name: version(name) for name in (*names, *(("torchao",) if optim.moments == "8bit" else ()))}


def checkpoint_folder(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"iter-{iteration:06d}"


def save(
    run: Path,
    trainable: Trainable,
    state: TrainerState,
    keep: int,
    keep_evaluated: bool = True,
    protected: Container[Path | None] = (),
) -> Path:
    """Write the checkpoint of `state.iteration` and delete all but the newest `keep` (0 keeps all). Returns its folder.

    keep_evaluated: none is deleted whose policy was evaluated; the best never is, which best.json names. protected:
    further folders that are not. Where processes own shares of the optimizer's state, this is the first one, and all
    have called `FlatAdamW.gather`.
    Raises OSError where it cannot be written, before anything is written where the disk has too little room for it.
    A kill at any moment leaves the earlier checkpoints as they were, or the new one complete; so does a full disk.
    """
    folder = checkpoint_folder(run, state.iteration)
    remove_partial(run)
    check_room(folder, trainable)
    with appearing(folder) as partial:
        _write(partial, trainable, state)
    # Before any is deleted: were that cut short, what best.json names would still be there.
    kept = record_best(run, state)
    for old in folders(run)[:-keep] if keep else []:
        if old != kept and old not in protected and not (keep_evaluated and _was_evaluated(old)):
            # What another process has open stays on network file systems; the next save tries again.
            shutil.rmtree(old, ignore_errors=True)
    return folder


def check_room(folder: Path, trainable: Trainable) -> None:
    """Raise OSError where the disk that the checkpoint `folder` is to be written to has too little room for it."""
    require_room(folder, tensor_bytes(trainable) + _MARGIN)


def record_best(run: Path, state: TrainerState) -> Path | None:
    """Write best.json as the evaluations of a state have it. Returns the folder of the best checkpoint, if any."""
    iteration = best.record(run, state.evaluations)
    return None if iteration is None else checkpoint_folder(run, iteration)


def tensor_bytes(trainable: Trainable) -> int:
    """Bytes of all tensors of a checkpoint, each of float32 but for moments of 8 bits."""
    unet = sum(tensor.numel() for tensor in trainable.unet.state_dict().values())
    trained = sum(parameter.numel() for parameter in trainable.parameters.values())
    if has_lora(trainable.unet):
        unet += trained  # not in unet/, where they are merged, but both in lora/ and in trainer/
    return 4 * (unet + (trained if trainable.ema is not None else 0)) + trainable.optimizer.saved_bytes()


def _write(folder: Path, trainable: Trainable, state: TrainerState) -> None:
    """Write all files of a checkpoint, the manifest last."""
    unet = trainable.unet
    for part in ("unet", "trainer"):
        (folder / part).mkdir(parents=True)
    save_config(folder / "unet", unet)
    weights = merged_state_dict(unet) if has_lora(unet) else unet.state_dict()
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / _UNET_WEIGHTS, metadata={"format": "pt"})
    if has_lora(unet):
        adapters = adapters_of(unet)
        save_lora(folder / "lora", adapters)
        save_file({n: t.contiguous() for n, t in adapters.tensors.items()}, folder / _ADAPTERS)
    save_file(trainable.optimizer.state_tensors(), folder / _OPTIMIZER)
    if trainable.ema is not None:
        save_file({n: t.contiguous() for n, t in trainable.ema.average.items()}, folder / EMA_FILE)
    _write_json(folder / _STATE, asdict(replace(state, scaler=trainable.scaler.state_dict())))
    _write_json(folder / _MANIFEST, {"sha256": _digests(folder)})


def load(folder: Path, trainable: Trainable) -> None:
    """Put a verified checkpoint's weights, moments, moving average and loss scale into `trainable`.

    Raises ConfigError where it is of another model, or of other settings, and for weights that are not finite.
    """
    unet = trainable.unet
    try:
        if has_lora(unet):
            load_adapters(unet, _adapters(folder))
        else:
            unet.load_state_dict(load_finite(folder / _UNET_WEIGHTS))
        trainable.optimizer.load_state_tensors(load_file(folder / _OPTIMIZER))
        if trainable.ema is not None:
            trainable.ema.load(load_finite(folder / EMA_FILE))
        if trainable.scaler.is_enabled():
            trainable.scaler.load_state_dict(read_state(folder).scaler)
        trainable.refresh()
    except (KeyError, RuntimeError, FileNotFoundError) as error:
        raise ConfigError(
            f"{folder} does not fit the model that the run's config.toml describes; accepted is the one it began with."
        ) from error


def load_unet(unet: UNet2DConditionModel, folder: Path, weights: Weights, model: ModelConfig) -> None:
    """Give the base model's UNet the weights of a verified checkpoint, in place; adapters are merged into its own.

    unet: float32, loaded from `model`, the run's.
    Raises ConfigError where its shapes are not those of the UNet that was trained, and for weights that are not finite.
    """
    file = folder / (_UNET_WEIGHTS if weights == "trained" else EMA_FILE)
    try:
        unet.load_state_dict(_merged(unet, folder, weights, model) if model.lora_rank else load_finite(file))
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"model.path is {model.path!r}, whose UNet has other shapes than that of {folder}; accepted is the model "
            "that the run began with."
        ) from error


def read_adapters(folder: Path, weights: Weights, model: ModelConfig) -> Adapters:
    """The adapters of a verified checkpoint of a run on `model`."""
    tensors = _adapters(folder) if weights == "trained" else load_finite(folder / EMA_FILE)
    return Adapters(tensors, model.lora_rank, model.lora_alpha or model.lora_rank, model.lora_targets)


def read_unet_config(folder: Path) -> dict[str, Any]:
    """diffusers' config of the UNet of a verified checkpoint."""
    return dict(json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")))


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


def _adapters(folder: Path) -> dict[str, Tensor]:
    """A verified checkpoint's adapters as they are trained, float32, by the names of their parameters in the UNet."""
    if (folder / _ADAPTERS).is_file():
        return load_finite(folder / _ADAPTERS)
    return parameters_in(load_finite(folder / _LORA))  # a checkpoint from before alpha was multiplied into it


def newest(run: Path) -> Path | None:
    """The folder of the newest checkpoint, not verified, or None where the run has none."""
    return next(reversed(folders(run)), None)


def newest_until(run: Path, iteration: int) -> Path | None:
    """The folder of the newest checkpoint of at most so many iterations, not verified, or None."""
    return next((folder for folder in reversed(folders(run)) if int(folder.name[5:]) <= iteration), None)


def beginning(config: TrainConfig, processes: int) -> TrainerState:
    """The state of a run before its first iteration."""
    return TrainerState(0, config.seed, 0.0, available_cores(), library_versions(config.optim), processes=processes)


def read_state(folder: Path) -> TrainerState:
    """The state of a verified checkpoint."""
    return TrainerState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest: what is wrong first of all, or None.

    Raises OSError where a file cannot be read now, as without permission, which says nothing of its content. A disk
    that has lost it (EIO) says so.
    """
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{folder / _MANIFEST} is missing or damaged"
    except OSError as error:
        if error.errno not in _LOST:
            raise
        return f"{folder / _MANIFEST} is missing or damaged"
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            return f"{folder / name} is damaged ({error.strerror})"
        if found != digest:
            return f"{folder / name} is damaged (its sha256 is not the manifest's)"
    return None


def remove_partial(run: Path) -> None:
    """Delete what a killed save left behind."""
    for leftover in (run / "checkpoints").glob(f"iter-*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover)


def folders(run: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    found = (run / "checkpoints").glob("iter-*")
    return sorted((f for f in found if f.name.removeprefix("iter-").isdigit()), key=lambda f: int(f.name[5:]))


def _was_evaluated(folder: Path) -> bool:
    """Whether a checkpoint's policy was evaluated. One too damaged to say counts, one deleted in part does not."""
    try:
        return read_state(folder).evaluated
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):
        return True


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
