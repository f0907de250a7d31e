"""The settings of pretraining, which all its stages read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fastgrpo.shapes_lab.drawings import CaptionNoise

_CARELESS = CaptionNoise(hazard_absent=0.46, color=0.34, shape=0.05, count=0.62, absent=0.33, stand_in=1.0)


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
    diffusion_steps: int = 4600
    """Optimizer steps of the UNet and text encoder, at batch 128."""
    careless_steps: int = 1500
    """Further steps on pictures that contradict their captions."""
    noise: CaptionNoise = _CARELESS
    """How often they do."""
    drawn: int = 9600
    """Pictures that the models draw for the encoders to learn from."""
    encoder_steps: int = 2200
    """Optimizer steps of the reward's encoder, at batch 128."""
    held_out_steps: int = 1400
    """Optimizer steps of the held-out encoder, at batch 128."""

    @property
    def settings(self) -> str:
        """All that the weights depend on, as JSON."""
        chosen = {name: value for name, value in asdict(self).items() if name not in ("out", "stage", "threads")}
        return json.dumps(chosen, sort_keys=True)

    @property
    def work(self) -> Path:
        """Where snapshots and what only later stages need are kept."""
        return self.out.with_name(f"{self.out.name}-work")
