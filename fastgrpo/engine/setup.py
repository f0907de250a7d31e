"""From settings to an engine: what is patched, measured, compiled and captured, and in what order."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.costs.rates import device_name
from fastgrpo.engine.batch_size import FindMicroBatch, decide_gradient_checkpointing, fits_within
from fastgrpo.engine.first_step import distinct_rows, keeps_bits
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.passes import Changed, Passes, out_of_memory
from fastgrpo.engine.record import EngineRecord, Say
from fastgrpo.engine.trainable import Trainable
from fastgrpo.engine.weights import FlatWeights
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import blank_batch
from fastgrpo.kernels.group_norm_silu import BACKENDS as GROUP_NORM
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.devices import is_on
from fastgrpo.system.distributed import Ranks
from fastgrpo.unet.attention import AttentionPlan, AttentionShape, apply_plan, attention_shapes
from fastgrpo.unet.attention_choice import choose_backends
from fastgrpo.unet.compilation import compile_forward, make_example
from fastgrpo.unet.convolutions import aside, searching
from fastgrpo.unet.copies import Network, base_unet
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.gradient_checkpointing import checkpoint_blocks

CPU_AGREEMENT = 1e-6
"""How far a ratio may be from 1 on a CPU before the policy has moved; on a GPU not at all."""


def start_engine(
    policy: Policy,
    trainable: Trainable,
    schedule: Schedule,
    config: TrainConfig,
    record: EngineRecord,
    find_micro_batch: FindMicroBatch,
    ranks: Ranks,
    say: Say,
) -> Passes:
    """Make the engine that runs the passes of `trainable.network`, which is what `policy` computes with.

    config: with engine.offload decided, `on` or `off`.
    record: an earlier start's, followed on the same kind of device, or an empty one; the engine keeps it up to date.
    Raises ConfigError for settings that this machine cannot do.
    """
    network, engine, device = trainable.network, config.engine, policy.device
    _begin(record, device, config, say)
    kernels, graphs = is_on(engine.kernels, device), is_on(engine.graphs, device)
    if kernels:
        patch_unet(network)
        _patch_vae(policy)
        GROUP_NORM.set_choices(record.group_norm or {})
    if config.engine.offload == "on":
        policy.offload()
    base = base_unet(network) if config.kl_term else None
    _checkpoint_gradients(policy, record, config, ranks, say)
    loss = PolicyLoss(policy, schedule, config, trainable.trained, base)
    weights = trainable.optimizer.weights

    def changed(name: str, value: Any, why: str) -> None:
        setattr(record, name, value)
        say(why)

    with searching(record.cudnn_benchmark):
        _settle_micro_batch(loss, weights, record, find_micro_batch, ranks, changed)
        _attend(loss, record, ranks, say)
        passes = _compile(loss, record, ranks, say)
        loss = replace(loss, policy=replace(policy, passes=passes))
        if kernels and device.type == "cuda" and not record.group_norm:
            _choose_group_norm(loss, weights, record, ranks)
        if record.reuse is None:
            record.reuse = {"first": not ranks.any(not _shares_first_step(loss, record))}

    decided = loss, trainable, record.micro_batch, record.reuse["first"], changed, record.rollout_batch
    allowed = CPU_AGREEMENT if device.type == "cpu" else 0.0
    if passes or graphs:
        capture = graphs and device.type == "cuda"
        made: Passes = FixedPasses(*decided, allowed, ranks, capture, record.cudnn_benchmark)
    else:
        made = Passes(replace(loss, sparing=device.type == "cpu"), *decided[1:], allowed, ranks)
    if made.old_log_prob == "rollout":
        made.old_log_prob = record.old_log_prob or "rollout"
    record.old_log_prob = made.old_log_prob
    return made


def wants_fixed_shapes(config: TrainConfig, device: torch.device) -> bool:
    """Whether the UNet is to be compiled or captured. On a CPU one pass at a time then has all threads."""
    return is_on(config.engine.compile, device) or is_on(config.engine.graphs, device)


def _begin(record: EngineRecord, device: torch.device, config: TrainConfig, say: Say) -> None:
    """Empty a record of another kind of device or of other settings: its measurements do not hold here."""
    name, settings = device_name(device), _settings(config)
    # A setting that the record does not know came with a newer version: nothing was decided by it.
    told = [field for field, value in settings.items() if (record.settings or {}).get(field, value) != value]
    if told:
        say(f"{' and '.join(told)} {'is' if len(told) == 1 else 'are'} not as before: the engine decides anew")
        vars(record).update(vars(EngineRecord()))
    record.settings = settings
    if record.device not in ("", name):
        say(f"this run was on {record.device} before and is on {name} now: the engine decides anew")
        vars(record).update(vars(EngineRecord(settings=settings)))
    record.device = name
    if not record.micro_batch:  # nothing is decided yet: a run that began without goes on without
        record.cudnn_benchmark = device.type == "cuda" and wants_fixed_shapes(config, device)


def _checkpoint_gradients(policy: Policy, record: EngineRecord, config: TrainConfig, ranks: Ranks, say: Say) -> None:
    """Follow the record or decide, and let the UNet's blocks keep their inputs only. Off on a CPU is not said."""
    on = record.gradient_checkpointing
    why = f"gradient checkpointing is {'on' if on else 'off'}, as the run had it before"
    if on is None:
        on, why = decide_gradient_checkpointing(config, policy.device, policy.dtype, ranks)
    record.gradient_checkpointing = on
    if on:
        checkpoint_blocks(policy.computing)
        checkpoint_blocks(policy.unet)  # whose structure the exact results for torch.compile are computed with
    if on or policy.device.type == "cuda":
        say(why)


def _patch_vae(policy: Policy) -> None:
    """Let the VAE's decoder use the operators; on CUDA in tensor cores' layout, which PyTorch's GroupNorm undoes."""
    patch_unet(policy.vae.decoder)
    if policy.device.type == "cuda":
        policy.vae.to(memory_format=torch.channels_last)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decisions depend on and that a resumed run may change."""
    names = ("kernels", "attention", "compile", "graphs", "reuse", "memory", "gradient_checkpointing", "offload")
    batches = {"micro_batch": config.micro_batch, "rollout.batch": config.rollout.batch}
    return batches | {f"engine.{name}": getattr(config.engine, name) for name in names}


def _settle_micro_batch(
    loss: PolicyLoss, weights: FlatWeights, record: EngineRecord, find: FindMicroBatch, ranks: Ranks, changed: Changed
) -> None:
    """Find the micro-batch or take the settled one; on CUDA see that it fits. Timed passes use the run's attention."""
    device, expected = loss.policy.device, 0

    def run(size: int) -> None:
        _pass(loss, weights, size)

    def expect(size: int) -> None:
        nonlocal expected
        record.micro_batch = expected = size
        _attend(loss, record, ranks, say=lambda line: None)

    # aside: a search for each size that is tried would take minutes.
    settled = record.micro_batch or loss.config.micro_batch
    record.micro_batch = find(aside()(run), settled, expect, bool(record.gradient_checkpointing))
    if expected and record.micro_batch != expected:
        record.attention = None  # to be chosen again, by passes of this size
    if device.type == "cuda":
        less_memory = "" if record.gradient_checkpointing else "; engine.gradient_checkpointing on needs less"
        _fit(record.micro_batch, fits_within(run, device, sys.maxsize), ranks, changed, less_memory)
    weights.zero_gradient()


def _fit(size: int, fits: Callable[[int], bool], ranks: Ranks, changed: Changed, less_memory: str = "") -> None:
    """Halve the micro-batch until it fits on every process: a size from the settings was never tried.

    less_memory: what to try where not even one pair fits, after a semicolon.
    """
    while ranks.any(not fits(size)):
        if size == 1:
            raise torch.OutOfMemoryError(f"not even a micro-batch of one pair fits into the GPU's memory{less_memory}")
        size //= 2
        changed("micro_batch", size, out_of_memory("micro_batch", size))


def _pass(loss: PolicyLoss, weights: FlatWeights, size: int) -> None:
    """Forward and backward, adding 0 to the gradient."""
    loss.learn(blank_batch(loss.policy, loss.config, size), weights.accumulate)


def _choose_group_norm(loss: PolicyLoss, weights: FlatWeights, record: EngineRecord, ranks: Ranks) -> None:
    """Show GroupNorm all shapes, so that it times its implementations; all take the first process's choices."""
    policy, config = loss.policy, loss.config
    _pass(loss, weights, record.micro_batch)
    weights.zero_gradient()
    samples = config.prompts_per_iteration * config.group_size // ranks.count
    for count in decoded_at_once(samples, record.rollout_batch or config.rollout.batch or record.micro_batch, config):
        policy.decode(torch.zeros(count, *policy.latent_shape, device=policy.device))
    record.group_norm = json.loads(ranks.agree(json.dumps(GROUP_NORM.choices())))
    GROUP_NORM.set_choices(record.group_norm)


def decoded_at_once(samples: int, chunk: int, config: TrainConfig) -> list[int]:
    """The numbers of latents the VAE decodes at once, ascending, where `samples` are drawn `chunk` at a time."""
    batch = config.rollout.decode_batch
    parts = {min(chunk, samples), samples % chunk}
    return sorted({size for part in parts for size in (min(batch, part), part % batch)} - {0})


def _attend(loss: PolicyLoss, record: EngineRecord, ranks: Ranks, say: Say) -> None:
    """Choose what computes attention, the same on all processes, and set it in the UNets."""
    policy, config, wanted = loss.policy, loss.config, loss.config.engine.attention
    if wanted == "auto" and policy.device.type == "cpu":
        return  # PyTorch's own choice, which diffusers takes
    rows, tokens = record.micro_batch * config.rollout.halves, policy.unconditional.shape[1]
    shapes = attention_shapes(policy.computing, rows, policy.latent_shape, tokens)
    plan = AttentionPlan.from_json(record.attention) if record.attention else None
    # The rows may have been halved since: a resumed run goes on with the plan of before.
    if plan is None or plan.wanted != wanted or _any_rows(plan.shapes) != _any_rows(shapes):
        made = choose_backends(wanted, shapes, policy.device, policy.dtype)
        plan = AttentionPlan.from_json(json.loads(ranks.agree(json.dumps(made.to_json()))))
    record.attention = plan.to_json()
    for unet in (policy.computing, loss.base):
        if unet is not None:
            apply_plan(unet, plan)
    for line in plan.lines():
        say(line)


def _any_rows(shapes: Sequence[AttentionShape]) -> list[AttentionShape]:
    return [replace(shape, rows=0) for shape in shapes]


def _compile(loss: PolicyLoss, record: EngineRecord, ranks: Ranks, say: Say) -> Network | None:
    """The compiled UNet, or None. Rollout and update share it: with as many rows both compute what gradients need."""
    policy, config = loss.policy, loss.config
    if record.compiled is False or not is_on(config.engine.compile, policy.device):
        record.compiled = False
        return None
    attention = [[choice["backend"], choice["shape"]] for choice in (record.attention or {}).get("choices", [])]
    operators = {
        "kernels": is_on(config.engine.kernels, policy.device),
        "attention": attention,
        "gradient_checkpointing": bool(record.gradient_checkpointing),
    }
    tokens = policy.unconditional.shape[1]
    example = make_example(policy.unet, policy.latent_shape, tokens, policy.dtype, policy.device)
    rows = record.micro_batch * config.rollout.halves
    compiled = compile_forward(policy.computing, policy.unet, example, rows, json.dumps(operators), say)
    # A process that cannot compile would round differently from the others.
    record.compiled = not ranks.any(compiled is None)
    return compiled if record.compiled else None


def _shares_first_step(loss: PolicyLoss, record: EngineRecord) -> bool:
    """Whether a rollout computes equal rows of its first step once: on a CPU only if asked for."""
    policy, config, setting, size = loss.policy, loss.config, loss.config.engine.reuse, record.micro_batch
    if not is_on(setting, policy.device):
        return False
    guidance = config.rollout.guidance
    alone = 1 if config.rollout.branches else config.group_size  # latents of a group in the first step
    rows = distinct_rows(config.rollout.initial_noise, alone, range(size), guidance, policy.device)
    if setting == "on" or not rows.saved:
        return rows.saved > 0
    batch = blank_batch(policy, config, size)
    latents = batch.latents.to(policy.dtype).repeat(config.rollout.halves, 1, 1, 1)
    contexts = policy.contexts(batch.embeds, guidance)

    def forward(latents: Tensor, timesteps: Tensor, contexts: Tensor) -> Tensor:
        """As in a rollout: a pass of fewer rows is not compiled or captured, and cuDNN searches nothing for it."""
        if len(latents) == len(rows.index):
            with torch.set_grad_enabled(policy.passes is not None):
                return policy.forward(latents, timesteps, contexts, return_dict=False)[0].detach()
        with searching(False):
            return policy.computing(latents, timesteps, contexts, return_dict=False)[0]

    with torch.no_grad():
        return keeps_bits(forward, rows, loss.schedule.timesteps[:1], latents, contexts)
