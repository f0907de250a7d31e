"""From the terms in the settings to the reward: how the built-in ones are built, and their registry."""

from collections.abc import Callable

import torch

from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.built_in import cosine, jpeg_kilobytes
from fastgrpo.rewards.plugins import load_plugins
from fastgrpo.rewards.reward import WeightedReward
from fastgrpo.rewards.shared_encoder import Encoders
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import RewardFunction, parse_terms
from fastgrpo.settings.schema import RewardConfig

Builder = Callable[[RewardConfig, Encoders, torch.device], RewardFunction | SteeringReward]

BUILDERS: dict[str, Builder] = {}
"""Name of a term -> what builds its function. `SteeringReward` alone is called with P prompts and the group's size."""


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator for a builder (config, encoders, device) -> reward function: makes it the term `name`.

    `terms.BUILT_IN` holds the same names. Raises ValueError for a name that is taken.
    """

    def add(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"the reward term {name!r} is registered already")
        BUILDERS[name] = builder
        return builder

    return add


@register("steering")
def _steering(config: RewardConfig, encoders: Encoders, device: torch.device) -> SteeringReward:
    return SteeringReward(encoders(config.encoder, "reward.encoder"), load_anchors(config.anchors), config)


@register("clip")
def _clip(config: RewardConfig, encoders: Encoders, device: torch.device) -> RewardFunction:
    field = "reward.clip_encoder" if config.clip_encoder else "reward.encoder"
    return cosine(encoders(config.clip_encoder or config.encoder, field), config.batch)


@register("hpsv2")
def _hpsv2(config: RewardConfig, encoders: Encoders, device: torch.device) -> RewardFunction:
    # The score of HPSv2 (arXiv 2306.09341) is the bare cosine, without the model's logit scale.
    return cosine(encoders("hpsv2", "reward.terms"), config.batch)


@register("compressibility")
def _compressibility(config: RewardConfig, encoders: Encoders, device: torch.device) -> RewardFunction:
    return lambda images, prompts: -jpeg_kilobytes(images)


@register("incompressibility")
def _incompressibility(config: RewardConfig, encoders: Encoders, device: torch.device) -> RewardFunction:
    return lambda images, prompts: jpeg_kilobytes(images)


def load_reward(config: RewardConfig, device: torch.device | str) -> WeightedReward:
    """The reward that the config describes, its encoders on `device`; functions of the user's own come first.

    Raises ConfigError for terms, functions, anchors and encoders that cannot be used.
    """
    terms = parse_terms(config.terms)
    plugins = load_plugins([term for term in terms if term.place])
    device = torch.device(device)
    encoders = Encoders(device, config.tf32)
    functions = {
        term.label: plugins[term.name] if term.place else BUILDERS[term.name](config, encoders, device)
        for term in terms
    }
    return WeightedReward(terms, functions, config.standardise, encoders)
