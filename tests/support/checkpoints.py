"""What a checkpoint is saved of."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from fastgrpo.engine.trainable import make_trainable
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import TrainerState
from fastgrpo.settings.schema import ModelConfig, OptimConfig, TrainConfig


class Training:
    """A UNet and what training moves of it, as the trainer has them: channels_last, with a moving average."""

    def __init__(self, pipeline: Path, lora_rank: int = 0, moments: str = "fp32"):
        self.unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", dtype=torch.float32)
        self.unet.to(memory_format=torch.channels_last).eval()
        config = TrainConfig(
            model=ModelConfig(lora_rank=lora_rank),
            optim=OptimConfig(lr=1e-3, weight_decay=1e-2, ema=0.9, moments=moments),
        )
        self.trainable = make_trainable(self.unet, config, torch.device("cpu"), torch.float32)
        self.optimizer = self.trainable.optimizer

    def step(self, seed: int) -> None:
        """One optimizer step on something that depends on the seed and the weights."""
        generator = torch.Generator().manual_seed(seed)
        latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 32, generator=generator)
        self.unet(latents, seed, embeds).sample.square().mean().backward()
        self.trainable.step(max_grad_norm=1.0)
        self.optimizer.zero_grad()

    def save(self, run: Path, iteration: int, keep: int = 0) -> Path:
        state = TrainerState(iteration, seed=1, seconds=2.5, threads=1, versions={"torch": "x"})
        return checkpoint.save(run, self.trainable, state, keep)

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = self.optimizer.state_tensors()
        averages = {f"ema.{name}": value for name, value in self.trainable.ema.average.items()}
        return self.unet.state_dict() | moments | averages
