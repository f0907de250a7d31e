"""What the throughput benchmarks train, and the trainings themselves, ours and the plain one, ready to iterate.

On CUDA the paper's share of one GPU: SD 1.5 at 512 x 512 and a ViT-H-14 as reward, 4 prompts x 16 images, 50 steps with
guidance, 16 optimizer steps. Weights are random, drawn on the device: speed does not depend on them, and nothing has to
be downloaded. On a CPU the preset `shapes` with the weights that ship, at fewer prompts; what is done is the same, what
it costs is not.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol
from unittest import mock

import open_clip
import torch
from baseline import PLAIN, Baseline, Techniques
from diffusers import AutoencoderKL, UNet2DConditionModel
from measure import DEVICE, free
from transformers import CLIPTextConfig, CLIPTextModel

from fastgrpo.assembly import Training, load_training
from fastgrpo.costs.counting import count_encoders, count_flop, count_model, sd1_architecture
from fastgrpo.costs.memory import Memory, memory_lines, memory_plan, peak
from fastgrpo.costs.rates import measure_rates
from fastgrpo.costs.throughput import Accounting
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Description
from fastgrpo.models.tokenizer import build_tokenizer
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts import PromptSource, load_prompts
from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.encoder import Encoders, OpenClipEncoder, SharedEncoder, load_encoder
from fastgrpo.rewards.registry import BUILDERS
from fastgrpo.rewards.reward import WeightedReward
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.console import Console
from fastgrpo.system.workers import Workers, available_cores
from fastgrpo.training import iterate

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
REWARD_ARCHITECTURE = "ViT-H-14"
QUIET = Console(quiet=True)
GIVEN = 16
"""Pairs of a micro-batch where no search is to be waited for: about half of what it should find, so they fit."""


def altered(config: TrainConfig, **fields: Any) -> TrainConfig:
    """With other values; a field of a group is written group__field."""
    for name, value in fields.items():
        group, _, inner = name.rpartition("__")
        change = replace(getattr(config, group), **{inner: value}) if group else value
        config = replace(config, **{group or inner: change})
    return config


def paper() -> TrainConfig:
    """One GPU's share of an iteration of the paper's: 64 images, 3,136 pairs.

    No group is flat, whatever the random reward says.
    """
    config = load_toml(find_preset("safediffusion-r1"))
    return altered(
        config,
        prompts_per_iteration=4,
        micro_batch=0,
        rollout__batch=0,
        grpo__std_floor=0.0,
        optim__lr=1e-7,  # a random model with a random reward: it should stay as well-behaved as it began
        engine__dtype="auto",
    )


def shapes(prompts: int) -> TrainConfig:
    """The preset with `prompts` prompts an iteration, 8 images each, but the whole UNet is trained, with a KL term."""
    preset = altered(load_toml(find_preset("shapes")), model__lora_rank=0, grpo__kl=0.02, grpo__kl_prompts="all")
    return altered(preset, prompts_per_iteration=prompts, grpo__std_floor=0.0)


def description(config: TrainConfig) -> Description:
    """What is trained, without weights."""
    return describe(config.model) if config.model.path == "shapes" else sd1_architecture()


class Trainer(Protocol):
    """Something that can run whole iterations of `config`. policy: whose frozen parts it uses."""

    @property
    def config(self) -> TrainConfig: ...

    @property
    def policy(self) -> Policy: ...

    def iterate(self, iteration: int, accounting: Accounting | None = None) -> dict[str, float]:
        """Iteration number `iteration` (from 1). Returns its times and speeds, named as in metrics.jsonl."""
        ...

    def use_threads(self) -> None:
        """Set PyTorch's threads to what this training runs with on a CPU; before every iteration."""
        ...


@dataclass
class Ours:
    """Our training. loaded: all it works with. console: what its stages are shown on."""

    config: TrainConfig
    loaded: Training
    console: Console

    @property
    def policy(self) -> Policy:
        return self.loaded.policy

    def iterate(self, iteration: int, accounting: Accounting | None = None) -> dict[str, float]:
        return iterate(replace(self.loaded, accounting=accounting), iteration, self.console)

    def use_threads(self) -> None:
        torch.set_num_threads(1)

    def plan(self) -> tuple[Memory, ...]:
        """What should lie in the GPU's memory."""
        on = self.config.engine.kernels in ("auto", "on")
        again = self.loaded.policy.computing.is_gradient_checkpointing
        model = count_model(description(self.config), self.config.model, self.loaded.policy.dtype, on, again)
        encoders, _ = count_encoders(self.config.reward)
        size = self.loaded.engine.micro_batch
        return memory_plan(self.config, model, encoders, self.loaded.policy.dtype, 1, size)

    def plan_lines(self) -> list[str]:
        return memory_lines(self.plan(), str(DEVICE))

    def replays(self) -> dict[str, Callable[[], object]]:
        """Of each function that the engine calls on fixed memory: a call with what lies there, on CUDA of its graph."""
        calls = getattr(self.loaded.engine, "_calls", {})
        captured = {key: call for key, call in calls.items() if call.captured}
        found: dict[str, Callable[[], object]] = {}
        for (name, *_), call in (captured or calls).items():
            found.setdefault(name, functools.partial(call, *call.buffers))
        return found

    @property
    def compiled(self) -> bool:
        return bool(self.loaded.record.compiled)

    def planned_gigabytes(self) -> float:
        return peak(self.plan())[1] / 1e9


@dataclass
class Plain:
    """The plain training. threads: PyTorch's, on a CPU. console: what its stages are shown on."""

    baseline: Baseline
    threads: int
    console: Console

    @property
    def config(self) -> TrainConfig:
        return self.baseline.config

    @property
    def policy(self) -> Policy:
        return self.baseline.policy

    def iterate(self, iteration: int, accounting: Accounting | None = None) -> dict[str, float]:
        return self.baseline.iterate(iteration, accounting, self.console)

    def use_threads(self) -> None:
        torch.set_num_threads(self.threads)


def ours(config: TrainConfig, workers: int = 0, console: Console = QUIET) -> Ours:
    """Our training on the device at hand. workers: CPU cores that take shares of a batch side by side; 0 is all."""
    with nullcontext() if config.model.path == "shapes" else _random_weights(config):
        training = load_training(config, workers or available_cores(), say=console.say)
    return Ours(config, training, console)


def plain(config: TrainConfig, techniques: Techniques = PLAIN, threads: int = 0, console: Console = QUIET) -> Plain:
    """The plain training on the device at hand, of the same weights.

    threads: PyTorch's, on a CPU; 0 is one per core.
    """
    prompts = load_prompts(config.prompts)
    source = PromptSource(*prompts, config.prompts, config.seed, config.prompts_per_iteration)
    about = description(config)
    schedule = make_schedule(about.scheduler, config.rollout.steps, config.rollout.eta, DEVICE)
    policy = _policy(config, about)
    encoder = encoder_of(config)
    direction = SteeringReward(encoder, load_anchors(config.reward.anchors), config.reward).direction
    baseline = Baseline(policy, schedule, encoder, direction, config, source, techniques)
    # The trainer has a copy of its own; the frozen parts are still needed.
    policy.unet.to("meta")
    free()
    return Plain(baseline, threads or available_cores(), console)


def accounting_of(config: TrainConfig, workers: int = 1, rounds: int = 1) -> Accounting:
    """What passes cost, and what the device can do at best, measured now: the best of `rounds`, for a busy machine."""
    encoders, _ = count_encoders(config.reward)
    measured = [measure_rates(DEVICE, DTYPE, Workers(workers)) for _ in range(rounds)]
    return Accounting(
        model=count_flop(description(config), config.model, config.engine.gradient_checkpointing == "on"),
        encode=sum(encoder.image for encoder in encoders.values()),
        rates=max(measured, key=lambda rates: rates.matmul),
    )


def encoder_of(config: TrainConfig) -> OpenClipEncoder:
    """The reward's encoder. It is frozen, so all trainings of this process share it."""
    return _encoder("" if config.model.path == "shapes" else REWARD_ARCHITECTURE)


@functools.lru_cache(maxsize=1)
def _encoder(architecture: str) -> OpenClipEncoder:
    """With random weights in float32, which is what `load_reward` would have; "" is the one that ships."""
    if not architecture:
        return load_encoder("shapes", DEVICE)
    with torch.random.fork_rng(), DEVICE:
        torch.manual_seed(1)
        model = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, device=DEVICE)
    return OpenClipEncoder(model, open_clip.get_tokenizer(architecture), DEVICE, torch.float32)


def random_policy(about: Description, device: torch.device = DEVICE, dtype: torch.dtype = DTYPE) -> Policy:
    """A pipeline with weights as its classes draw them, on the device.

    Frozen parts in the dtype that the UNet computes in.
    """
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(dict(about.unet))
        vae = AutoencoderKL.from_config(dict(about.vae)).to(dtype)
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(about.text_encoder))).to(dtype)
    unet.to(memory_format=torch.channels_last).eval()
    return Policy(
        unet=unet,
        vae=vae.eval().requires_grad_(False),
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=build_tokenizer(),
        scheduler_config=about.scheduler,
        device=device,
        dtype=dtype,
    )


class _OneEncoder(Encoders):
    """Has an encoder already, whatever the settings name."""

    def __init__(self, encoder: OpenClipEncoder, tf32: bool):
        super().__init__(encoder.device)
        self._given = SharedEncoder(encoder, tf32)

    def __call__(self, spec: str, field: str) -> SharedEncoder:
        return self._given

    def forget_images(self) -> None:
        self._given.forget_images()


def _policy(config: TrainConfig, about: Description) -> Policy:
    return load_policy(config.model, DEVICE, DTYPE) if config.model.path == "shapes" else random_policy(about)


def _random_reward(config: TrainConfig) -> WeightedReward:
    encoders, reward = _OneEncoder(encoder_of(config), config.reward.tf32), config.reward
    steering = BUILDERS["steering"](reward, encoders)
    return WeightedReward(parse_terms(reward.terms), {"steering": steering}, reward.standardise, encoders)


@contextmanager
def _random_weights(config: TrainConfig) -> Iterator[None]:
    """Within it `load_training` loads an SD 1.5 and a reward with random weights, and evaluates with no suite."""
    stand_ins = {
        "describe": lambda model: sd1_architecture(),
        "load_policy": lambda model, *_: random_policy(sd1_architecture()),
        "load_reward": lambda *_: _random_reward(config),
        "load_suites": lambda *_: (),
    }
    with mock.patch.multiple("fastgrpo.assembly", **stand_ins):
        yield
