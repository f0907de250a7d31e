"""One rollout of a tiny policy, and updates on it whose gradients are kept."""

import math
from dataclasses import replace

import torch

from fastgrpo.engine.passes import Passes
from fastgrpo.engine.trainable import Trainable
from fastgrpo.engine.weights import FlatWeights
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.policy import load_policy
from fastgrpo.rollout import rollout
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import GrpoConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, PromptBatch, Rewards
from fastgrpo.update import update

CPU = torch.device("cpu")
STEPS, PROMPTS, GROUP = 3, 2, 3
# Standard deviation of a change to every weight that moves ratios by up to 0.01, to either side of 1.
NUDGE = 3e-4


CONFIG = TrainConfig(
    prompts_per_iteration=PROMPTS,
    group_size=GROUP,
    updates_per_iteration=1,
    micro_batch=12,
    rollout=RolloutConfig(steps=STEPS, guidance=3.0),
    grpo=GrpoConfig(clip_low=0.002, clip_high=0.003),
    optim=OptimConfig(max_grad_norm=1e9),
)


REWARDS = torch.tensor([[0.1, 0.4, 0.2], [0.9, 0.3, 0.5]])


# Relative L2 error allowed between a float32 gradient and its float64 reference. The UNet's output carries some 1e-6 of
# float32 rounding (about 40 layers at 6e-8, magnified 3 by guidance), its backward pass the like. The smallest mistake
# worth catching, one of 12 pairs left out or weighed wrongly, moves the gradient by several percent.
GRADIENT_TOLERANCE = 1e-4


class Recorder(torch.optim.SGD):
    """Keeps the gradient of every optimizer step, as one flat float64 vector, and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([g.double().flatten() for g in gradients]))


class Clipping:
    """A torch optimizer as `Trainable` has its own: its step clips the gradient and returns its norm."""

    def __init__(self, optimizer, parameters):
        self.optimizer, self.zero_grad, self.weights = optimizer, optimizer.zero_grad, FlatWeights(parameters)

    def step(self, max_grad_norm):
        norm = torch.nn.utils.clip_grad_norm_(self.weights.parameters.values(), max_grad_norm)
        self.optimizer.step()
        return norm


class Scene:
    """A policy, two prompts and one rollout; `update` runs on it with changes to the configuration."""

    def __init__(self, folder):
        self.policy = load_policy(ModelConfig(path=str(folder)), CPU, torch.float32)
        prompts = Prompt("a cat", POSITIVE), Prompt("bad", NEGATIVE)
        self.prompts = PromptBatch(prompts, self.policy.encode([prompt.text for prompt in prompts]))
        self.roll(CONFIG)

    def roll(self, config, **scheduler_changes):
        scheduler_config = {**self.policy.scheduler_config, **scheduler_changes}
        self.schedule = make_schedule(scheduler_config, config.rollout.steps, config.rollout.eta, CPU)
        generator = torch.Generator().manual_seed(0)
        self.trajectory = rollout(
            Passes(PolicyLoss(self.policy, self.schedule, config, ()), None, 1),
            self.prompts,
            generator,
        )

    def update(self, config=CONFIG, rewards=REWARDS, optimizer=None, seed=1, iteration=1, allowed=math.inf, **grpo):
        """Returns the stats and the gradients of each optimizer step.

        allowed: as of the engine, which asks for nothing here.
        """
        base = grpo.pop("base", None)
        self.reports = []
        optimizer = Recorder(self.policy.unet.parameters()) if optimizer is None else optimizer
        trainable = self.trainable(optimizer)
        config = replace(config, grpo=replace(config.grpo, **grpo))
        loss = PolicyLoss(self.policy, self.schedule, config, trainable.trained, base)
        stats = update(
            Passes(loss, trainable, config.micro_batch, allowed=allowed),
            self.prompts,
            self.trajectory,
            Rewards(rewards, {}),
            iteration,
            torch.Generator().manual_seed(seed),
            progress=lambda done, total: self.reports.append((done, total)),
        )
        return stats.values, getattr(optimizer, "gradients", None)

    def trainable(self, optimizer):
        """All of the UNet."""
        unet, unscaled = self.policy.unet, torch.amp.GradScaler("cpu", enabled=False)
        parameters = dict(unet.named_parameters())
        clipping = Clipping(optimizer, parameters)
        return Trainable(unet, parameters, clipping, unscaled, None, unet, tuple(parameters.values()))

    def nudge(self, scale):
        """Move the policy as an optimizer step would, so that ratios leave 1."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.policy.unet.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
