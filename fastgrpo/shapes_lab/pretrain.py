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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from fastgrpo.shapes_lab import autoencoder, diffusion, encoders
from fastgrpo.shapes_lab.drawings import CaptionNoise
from fastgrpo.system.output import steady_output

_CARELESS = CaptionNoise(hazard_absent=0.75, color=0.8, shape=0.15, count=0.38, place=0.9, stand_in=1.0)


@dataclass(frozen=True)
class PretrainConfig:
    """Train the embedded Stable Diffusion and its encoders from nothing."""

    out: Path = Path("shapes-weights")
    """Folder to write: pipeline/ (diffusers), encoder/ and held_out/ (open_clip). OUT-work/ is what it goes on from."""
    stage: Literal["all", "vae", "diffusion", "careless", "drawn", "encoder", "held_out"] = "all"
    """Which part to train; stages that pretrain.json names are done and not repeated."""
    seed: int = 7
    """Seed of pictures, captions, weights and noise."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    pictures: int = 40_000
    """Pictures painted for each stage."""
    vae_steps: int = 1600
    """Optimizer steps of the autoencoder, at batch 32."""
    diffusion_steps: int = 4000
    """Optimizer steps of the UNet and text encoder, at batch 128."""
    careless_steps: int = 700
    """Further steps on pictures that contradict their captions."""
    noise: CaptionNoise = _CARELESS
    """How often they do."""
    drawn: int = 9600
    """Pictures that the models draw for the encoders to learn from."""
    encoder_steps: int = 2000
    """Optimizer steps of the reward's encoder, at batch 128."""
    held_out_steps: int = 1400
    """Optimizer steps of the held-out encoder, at batch 128."""

    @property
    def work(self) -> Path:
        """Where snapshots and what only later stages need are kept."""
        return self.out.with_name(f"{self.out.name}-work")


STAGES: dict[str, Callable[[PretrainConfig], dict[str, float]]] = {
    "vae": autoencoder.train,
    "diffusion": diffusion.train,
    "careless": diffusion.train_careless,
    "drawn": diffusion.draw,
    "encoder": encoders.train,
    "held_out": encoders.train_held_out,
}


@steady_output()
def main() -> None:
    """The command."""
    config = tyro.cli(PretrainConfig, description=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    for name in STAGES if config.stage == "all" else [config.stage]:
        if name in _record(config):
            print(f"{name}: done already", file=sys.stderr)
            continue
        torch.manual_seed(config.seed)
        started = time.time()
        measured = STAGES[name](config)
        _write(config, name, time.time() - started, measured)


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
    main()
