"""`python -m fastgrpo.shapes_lab.pretrain`: the embedded Stable Diffusion and its two encoders, trained from nothing.

Stages, each seeded, each using what those above it left in the output folder:

    vae        AutoencoderKL on clean pictures                                               pipeline/vae
    diffusion  UNet + CLIP text encoder on pictures that show what their captions say        OUT-work/
    careless   the same two, further, on pictures that contradict their captions             pipeline/
    drawn      pictures that the models of both stages drew, and what the oracle read        OUT-work/
    encoder    open_clip model, contrastive, on painted and drawn pictures                   encoder/
    held_out   another of another seed, for rewards that training does not see               held_out/

The careless stage learns from wrong captions on purpose: as with the web's captions, the model then draws a hazard for
only some of the prompts that ask for one, and gets only some compositions right, so that reinforcement learning has
something to prefer. A command that was stopped goes on where it was when it is given again.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import tyro

from fastgrpo.shapes_lab import autoencoder, diffusion, encoders
from fastgrpo.shapes_lab.pretrain_config import PretrainConfig
from fastgrpo.system.console import run_command
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.output import steady_output

STAGES: dict[str, Callable[[PretrainConfig], dict[str, float]]] = {
    "vae": autoencoder.train,
    "diffusion": diffusion.train,
    "careless": diffusion.train_careless,
    "drawn": diffusion.draw,
    "encoder": encoders.train,
    "held_out": encoders.train_held_out,
}


NEEDED = {"diffusion": "vae", "careless": "diffusion", "drawn": "careless", "encoder": "drawn", "held_out": "drawn"}
"""Stage -> the one whose output it uses, and so all those before it."""


@steady_output()
def main() -> int:
    """The command. Returns its exit code."""
    config = tyro.cli(PretrainConfig, description=__doc__)
    return run_command(lambda: pretrain(config), "the same command goes on where this one was")


def pretrain(config: PretrainConfig) -> None:
    """Train the stages that are not done. Raises ConfigError for one that needs another first."""
    if config.threads:
        torch.set_num_threads(config.threads)
    for name in STAGES if config.stage == "all" else [config.stage]:
        if name in _record(config):
            print(f"{name}: done already", file=sys.stderr)
            continue
        if name in NEEDED and NEEDED[name] not in _record(config):
            raise ConfigError.of("--stage", name, f"{NEEDED[name]}, which it goes on from, is not in {config.out} yet")
        torch.manual_seed(config.seed)
        started = time.time()
        measured = STAGES[name](config)
        _write(config, name, time.time() - started, measured)
        (config.work / f"{name}.pt").unlink(missing_ok=True)


def _record(config: PretrainConfig) -> dict[str, dict]:
    path = config.out / "pretrain.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(config: PretrainConfig, stage: str, seconds: float, measured: dict[str, float]) -> None:
    """Keep how a stage was trained, and how well it went, in pretrain.json."""
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    entry = {
        "command": "python -m fastgrpo.shapes_lab.pretrain",
        "settings": settings,
        "minutes": round(seconds / 60, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "measured": {name: round(float(value), 4) for name, value in measured.items()},
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "pretrain.json").write_text(json.dumps(_record(config) | {stage: entry}, indent=2) + "\n")
    print(f"{stage}: {entry['measured']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
