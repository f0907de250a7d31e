"""Everything a training loop works with, loaded once from the config."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from fastgrpo.costs.memory import with_offload, with_shard
from fastgrpo.costs.throughput import Accounting
from fastgrpo.engine.batch_size import MicroBatchFinder, decide_offload, decide_shard
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.record import EngineRecord
from fastgrpo.engine.setup import start_engine, wants_fixed_shapes
from fastgrpo.engine.trainable import Trainable, make_trainable
from fastgrpo.evaluation.detectors.registry import load_detector
from fastgrpo.evaluation.during_training import LoadedSuite, load_suites
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.grpo.steps import rollout_schedule
from fastgrpo.guard.watch import Guard
from fastgrpo.hooks import CheckedSource, Hooks
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Description
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts import PromptSource, load_prompts
from fastgrpo.rewards.registry import WeightedReward, load_reward
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.devices import choose_device, choose_dtype
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import Prompt
from fastgrpo.unet.lora import check_targets


@dataclass(frozen=True)
class Parts:
    """What a training consists of, loaded and checked. Nothing has been computed with it yet.

    description: of the model that `policy` is. trainable: the part of it that learns.
    schedule: the rollout's steps; rollouts that slide overwrite it. eval_schedule: those of pictures and evaluations,
    all of DDIM with rollout.eta.
    prompts: all that may be drawn. source: deals them out. ranks: the processes that train together.
    suites: what the first process evaluates with. held_out: scores pictures, where eval.encoder names one.
    """

    config: TrainConfig
    description: Description
    policy: Policy
    trainable: Trainable
    schedule: Schedule
    eval_schedule: Schedule
    reward: WeightedReward
    prompts: tuple[Prompt, ...]
    source: PromptSource | CheckedSource
    ranks: Ranks
    suites: tuple[LoadedSuite, ...]
    held_out: HeldOutReward | None


@dataclass(frozen=True, kw_only=True)
class Training(Parts):
    """All that one training works with.

    engine: runs the passes of rollout and update. record: what it decided.
    guard: sets the KL weight and the learning rate, and watches for a collapse once it is told of the base model.
    accounting: turns passes into TFLOP/s, if wanted. embeds: text -> embedding [L, D], kept between iterations.
    """

    engine: Passes
    record: EngineRecord
    guard: Guard
    accounting: Accounting | None = None
    embeds: dict[str, Tensor] = field(default_factory=dict)


def load_training(
    config: TrainConfig,
    threads: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    record: EngineRecord | None = None,
    say: Callable[[str], object] = print,
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen)
) -> Training:
    """Load what the config names, and start the engine. Raises ConfigError. Arguments are those of `load_parts`."""
    record = record or EngineRecord()
    parts = load_parts(config, threads, ranks, record, say, hooks)
    config, policy, trainable = parts.config, parts.policy, parts.trainable
    find = MicroBatchFinder(config, parts.description, policy.device, policy.dtype, ranks, say)
    engine = start_engine(policy, trainable, parts.schedule, config, record, find, ranks, say)
    if ranks.count > 1:
        sharded: Literal["none", "optimizer"] = "optimizer" if config.engine.shard == "optimizer" else "none"
        record.shard = {**(record.shard or {}), str(ranks.count): sharded}
    guard = Guard(config, parts.reward.encoder is not None, say)
    return Training(**vars(parts), engine=engine, record=record, guard=guard)


def load_parts(
    config: TrainConfig,
    threads: int,
    ranks: Ranks,
    record: EngineRecord,
    say: Callable[[str], object],
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen)
) -> Parts:
    """Load what the config names, quick checks first. Raises ConfigError.

    threads: CPU cores to use. record: of the engine that the run began with. say: told what the model's files bring
    along and what is decided about memory. hooks: a program's own rewards and prompts. In the parts' config
    engine.shard and engine.offload are.
    """
    if config.prompts_per_iteration % ranks.count:
        raise ConfigError(
            f"prompts_per_iteration = {config.prompts_per_iteration}: accepted is a multiple of the {ranks.count} "
            "processes, which share them."
        )
    positives, negatives = load_prompts(config.prompts)
    source = PromptSource(positives, negatives, config.prompts, config.seed, config.prompts_per_iteration)
    device = ranks.device if ranks.count > 1 else choose_device(config.engine.device, "engine.device")
    dtype = choose_dtype(config.engine.dtype, device)
    model, eta = describe(config.model), config.rollout.eta
    for line in model.notes:
        say(line)
    schedule = rollout_schedule(model.scheduler, config, device)
    rescale, steps = config.rollout.guidance_rescale, config.eval.steps or config.rollout.steps
    eval_schedule = make_schedule(model.scheduler, steps, eta, device, "eval.steps", guidance_rescale=rescale)
    if config.model.lora_rank:
        check_targets(model.empty_components()["unet"], config.model.lora_targets)
    shard, why = decide_shard(config, device, dtype, ranks, record)
    if why and (device.type == "cuda" or config.engine.shard != "auto"):
        say(why)
    config = with_shard(config, shard)
    offload, why = decide_offload(config, device, dtype, ranks, record)
    if device.type == "cuda":
        say(why)
    config = with_offload(config, offload)
    disable_progress_bar()  # one per file read, gone in a blink
    reward = load_reward(config.reward, device, load_detector, hooks.rewards)
    if offload:
        reward.offload()
    # Before the micro-batch is sought, since they take memory.
    suites = load_suites(config, device, say)
    held_out = HeldOutReward(config, device) if config.eval.encoder else None
    if held_out and offload:
        held_out.offload()
    workers = 1 if device.type == "cuda" or wants_fixed_shapes(config, device) else threads
    # Each of several workers is a thread already.
    torch.set_num_threads(1 if workers > 1 else threads)
    policy = load_policy(config.model, device, dtype, workers)
    trainable = make_trainable(policy.unet, config, device, dtype, ranks)
    return Parts(
        config=config,
        description=model,
        policy=replace(policy, network=trainable.network),
        trainable=trainable,
        schedule=schedule,
        eval_schedule=eval_schedule,
        reward=reward,
        prompts=(*positives, *negatives),
        source=CheckedSource(hooks.source, config.prompts_per_iteration) if hooks.source else source,
        ranks=ranks,
        suites=suites,
        held_out=held_out,
    )
