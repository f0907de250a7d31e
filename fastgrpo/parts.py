"""Everything a training loop works with, loaded once from the config."""

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from transformers.utils.logging import disable_progress_bar

from fastgrpo.config import TrainConfig
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts import PromptSource, load_prompts
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.types import Prompt


@dataclass(frozen=True)
class Parts:
    """The pieces of one training.

    policy: what is trained. base_unet: a frozen copy as it was loaded, only where grpo.kl > 0.
    prompts: all that may be drawn. source: deals them out.
    """

    policy: Policy
    base_unet: UNet2DConditionModel | None
    optimizer: torch.optim.AdamW
    schedule: Schedule
    reward: SteeringReward
    prompts: tuple[Prompt, ...]
    source: PromptSource


def load_parts(config: TrainConfig, threads: int) -> Parts:
    """Load what the config names; prompts first, since they are the quickest to be wrong.

    threads: CPU cores to use. Raises ConfigError.
    """
    positives, negatives = load_prompts(config.prompts)
    source = PromptSource(positives, negatives, config.prompts, config.seed, config.prompts_per_iteration)
    device = _device(config)
    disable_progress_bar()  # one per file read, gone in a blink
    policy = load_policy(config.model.path, device, _dtype(config, device), threads if device.type == "cpu" else 1)
    encoder = load_encoder(config.reward.encoder, device)
    optim = config.optim
    return Parts(
        policy=policy,
        base_unet=copy.deepcopy(policy.unet).requires_grad_(False) if config.grpo.kl > 0 else None,
        optimizer=torch.optim.AdamW(
            policy.unet.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        ),
        schedule=make_schedule(policy.scheduler_config, config.rollout.steps, config.rollout.eta, device),
        reward=SteeringReward(encoder, ANCHORS[config.reward.anchors], config.reward),
        prompts=(*positives, *negatives),
        source=source,
    )


def _device(config: TrainConfig) -> torch.device:
    if config.engine.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.engine.device)


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    automatic = "bf16" if device.type == "cuda" else "fp32"
    name = automatic if config.engine.dtype == "auto" else config.engine.dtype
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
