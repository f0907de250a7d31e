"""`python -m fastgrpo.estimate`: what a training would cost in computation and memory, before anything is bought.

All of it is computed from the configs (costs.py counts the models); nothing is measured, and no weights are needed.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from fastgrpo.config import ConfigError, RewardConfig, TrainConfig
from fastgrpo.console import Console, complain, reason
from fastgrpo.costs import EncoderCost, ModelCost, count_encoder, count_model, find_architecture
from fastgrpo.grpo.steps import chosen_steps, trained_steps
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings import DEFAULT_PRESET, parse_with_preset

PROGRAM = "python -m fastgrpo.estimate"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNIT_TFLOPS = 100.0  # what hours are given for where --tflops is not
_NOT_COUNTED = (
    "Not counted: the text encoders' work and what the optimizer computes; evaluations, pictures and checkpoints;",
    "memory for sampling and decoding (rollout.batch and decode_batch bound it) and for scoring (reward.batch);",
    "kernels' workspaces and what the allocator holds back. Groups without spread, which are skipped, are counted.",
)


@dataclass(frozen=True)
class _Estimate:
    """Compute what a training costs: FLOPs by stage, GPU memory by part. Nothing is measured, no weights are loaded.

    All settings of training are accepted. What is counted is a GPU's work, in bf16 where engine.dtype is auto.
    """

    preset: tyro.conf.Positional[str] = DEFAULT_PRESET
    """A preset's name or a FILE.toml; comes before the flags. Flags override it."""
    tflops: float = 0.0
    """TFLOP/s that each GPU sustains, to turn FLOPs into hours; 0 shows the hours for 100 TFLOP/s."""
    processes: int = 1
    """GPUs that share the work, as torchrun's --nproc-per-node."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Work:
    """One kind of computation. flop: of one. times: how often in an iteration, on all processes together."""

    stage: str
    name: str
    flop: int
    times: int

    @property
    def total(self) -> int:
        return self.flop * self.times


@dataclass(frozen=True)
class Memory:
    """One thing that lies in a GPU's memory. size: bytes."""

    name: str
    size: int


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""
    try:
        command = parse_with_preset(_Estimate, sys.argv[1:] if argv is None else argv, PROGRAM)
        _check(command)
        estimate(command.config, command.tflops, command.processes, Console())
    except ConfigError as error:
        complain(str(error))
        return 2
    except OSError as error:
        complain(reason(error))
        return 1
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    return 0


def estimate(config: TrainConfig, tflops: float, processes: int, console: Console) -> None:
    """Count the config's models and say what a training of it costs.

    tflops: what each GPU sustains, in TFLOP/s; 0 stands for 100. processes: GPUs that share the work.
    Raises ConfigError for a model that cannot be trained.
    """
    description, known = find_architecture(config.model)
    schedule = make_schedule(description.scheduler, config.rollout.steps, config.rollout.eta, torch.device("cpu"))
    dtype = compute_dtype(config)
    pairs = pairs_per_iteration(config, schedule)
    with console.bar("counting"):
        model = count_model(description, config.model, dtype)
        encoders, left_out = _count_encoders(config.reward)

    console.say("Computed from the configs, not measured.", "")
    console.say(*_header(config, model, dtype, pairs))
    if not known:
        console.say(f"          counted as SD 1.x: {config.model.path} is not in the hub's cache")
    console.say("", *_work_lines(iteration_work(config, model, encoders, pairs), config, tflops, processes))
    console.say("", *_memory_lines(gpu_memory(config, model, encoders, dtype, processes), processes))
    console.say("", *left_out, *_NOT_COUNTED)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What the UNet computes in; where engine.dtype is auto, as on a GPU unless engine.device is cpu."""
    automatic = "fp32" if config.engine.device == "cpu" else "bf16"
    return _DTYPES[automatic if config.engine.dtype == "auto" else config.engine.dtype]


def pairs_per_iteration(config: TrainConfig, schedule: Schedule) -> int:
    """(sample, step) pairs that an iteration learns from, all epochs together. Raises ConfigError where there is none."""
    grpo = config.grpo
    samples = config.prompts_per_iteration * (grpo.best_of or config.group_size - 2 * grpo.trim)
    steps = chosen_steps(len(trained_steps(schedule, grpo, iteration=1)), grpo.step_fraction)
    return samples * steps * grpo.epochs


def encoder_specs(config: RewardConfig) -> tuple[str, ...]:
    """The open_clip models of the reward's terms, each once, in the notation of `reward.encoder`."""
    of_term = {"steering": config.encoder, "clip": config.clip_encoder or config.encoder, "hpsv2": "hpsv2"}
    return tuple(dict.fromkeys(of_term[term.name] for term in parse_terms(config.terms) if term.name in of_term))


def iteration_work(
    config: TrainConfig, model: ModelCost, encoders: Mapping[str, EncoderCost], pairs: int
) -> list[Work]:
    """What one iteration computes, on all processes together.

    encoders: the reward's, by spec. pairs: as `pairs_per_iteration`.
    """
    images = config.prompts_per_iteration * config.group_size
    halves = _halves(config)
    work = [
        Work("rollout", "UNet forward", model.forward, images * config.rollout.steps * halves),
        Work("rollout", "VAE decode", model.decode, images),
        *(Work("reward", f"image tower, {spec}", encoder.image, images) for spec, encoder in encoders.items()),
        Work("update", "UNet forward + backward", model.forward_backward, pairs * halves),
    ]
    if config.grpo.old_log_prob == "replay":
        work.append(Work("update", "UNet forward, replay", model.forward, pairs * halves))
    if config.grpo.kl > 0:
        work.append(Work("update", "UNet forward, KL's base", model.forward, pairs * halves))
    return work


def gpu_memory(
    config: TrainConfig, model: ModelCost, encoders: Mapping[str, EncoderCost], dtype: torch.dtype, processes: int
) -> list[Memory]:
    """What lies in the memory of each of `processes` GPUs during the update; parts that are not there are left out.

    dtype: what the UNet computes in.
    """
    lora, width, single = config.model.lora_rank > 0, dtype.itemsize, torch.float32.itemsize
    trained = single * model.trained
    frozen = f"frozen UNet, {_name(dtype)}"
    parts = [
        Memory(frozen, width * model.unet) if lora else Memory("UNet, fp32", single * model.unet),
        Memory("adapters, fp32", trained if lora else 0),
        Memory(f"autocast's {_name(dtype)} copies of them" if lora else f"autocast's {_name(dtype)} copy", model.cast),
        Memory("gradients, fp32", trained),
        Memory("Adam's two moments, fp32", 2 * trained),
        Memory("moving average (optim.ema), fp32", trained if config.optim.ema else 0),
        Memory("base UNet (grpo.kl), fp32", single * model.unet if config.grpo.kl > 0 else 0),
        Memory(f"VAE and text encoder, {_name(dtype)}", width * model.frozen),
        *(Memory(f"encoder {spec}, fp32", single * encoder.parameters) for spec, encoder in encoders.items()),
        Memory("trajectories and images, fp32", _trajectory_bytes(config, model) // processes),
        _micro_batch(config, model),
    ]
    return [part for part in parts if part.size]


def _trajectory_bytes(config: TrainConfig, model: ModelCost) -> int:
    """Latents, log-probs, images and, where RatioNorm keeps them, means of all an iteration's samples."""
    grpo, steps, latent = config.grpo, config.rollout.steps, math.prod(model.latent_shape)
    copies = {"rollout": 1, "replay": 2, "detach": 0}[grpo.old_log_prob]  # of the old policy's log-probs and means
    means = copies * steps * latent if grpo.ratio_norm else 0
    sample = (steps + 1) * latent + max(copies, 1) * steps + math.prod(model.image_shape) + means
    return config.prompts_per_iteration * config.group_size * sample * torch.float32.itemsize


def _micro_batch(config: TrainConfig, model: ModelCost) -> Memory:
    """What is saved for the backward pass, or what takes its place later: a second set of gradients, AdamW's roots."""
    samples = config.micro_batch * _halves(config)
    saved, later = samples * model.activations, torch.float32.itemsize * model.trained
    if saved < later:
        return Memory("gradients before they are summed, fp32", later)
    return Memory(f"activations of {samples} UNet samples", saved)


def _halves(config: TrainConfig) -> int:
    """UNet samples for each latent: with guidance two."""
    return 1 if config.rollout.guidance == 1 else 2


def _check(command: _Estimate) -> None:
    tflops, processes, prompts = command.tflops, command.processes, command.config.prompts_per_iteration
    if not 0 <= tflops < math.inf:
        raise ConfigError(f"--tflops {tflops}: accepted is a number above 0, or 0 for the hours per 100 TFLOP/s.")
    if processes < 1:
        raise ConfigError(f"--processes {processes}: accepted is 1 or more.")
    if prompts % processes:
        raise ConfigError(
            f"prompts_per_iteration = {prompts}: accepted is a multiple of the {processes} processes, which share them."
        )


def _count_encoders(config: RewardConfig) -> tuple[dict[str, EncoderCost], list[str]]:
    """The reward's encoders by spec, and a line for each term that is not counted."""
    encoders, lines = {}, []
    for spec in encoder_specs(config):
        try:
            encoders[spec] = count_encoder(spec)
        except ConfigError as error:
            lines.append(f"Left out: the reward's encoder {error}")
    lines += [f"Left out: the reward's term {term.name}" for term in parse_terms(config.terms) if term.place]
    return encoders, lines


def _header(config: TrainConfig, model: ModelCost, dtype: torch.dtype, pairs: int) -> list[str]:
    prompts, group = config.prompts_per_iteration, config.group_size
    channels, height, width = model.latent_shape
    what = f"adapters of rank {config.model.lora_rank}" if config.model.lora_rank else "all of it"
    return [
        f"model     {config.model.path}, latents {channels} x {height} x {width}",
        f"trained   {what}: {model.trained:,} parameters (the UNet has {model.unet:,}), computing in {_name(dtype)}",
        f"iteration {prompts} prompts x {group} = {prompts * group} images, {pairs:,} (sample, step) pairs",
    ]


def _work_lines(work: Sequence[Work], config: TrainConfig, tflops: float, processes: int) -> list[str]:
    all_flop = sum(part.total for part in work)
    gpus = "1 GPU" if processes == 1 else f"each of {processes} GPUs"
    seconds = all_flop / ((tflops or _UNIT_TFLOPS) * 1e12 * processes)
    run = all_flop * config.iterations
    return [
        f"{'TFLOP':43}{'each':>12}{'times':>10}{'iteration':>14}",
        *(
            f"  {part.stage:8}{part.name:33}{_number(part.flop / 1e12):>12}{part.times:>10,}"
            f"{_number(part.total / 1e12):>14}{part.total / all_flop:6.1%}"
            for part in work
        ),
        f"  {'in all':63}{_number(all_flop / 1e12):>14}",
        f"{config.iterations} iterations: {_number(run / 1e12)} TFLOP",
        f"at {tflops or _UNIT_TFLOPS:g} TFLOP/s on {gpus}{'' if tflops else ' (--tflops)'}: "
        f"{_number(seconds)} s an iteration, {_number(seconds * config.iterations / 3600)} hours",
    ]


def _memory_lines(memory: Sequence[Memory], processes: int) -> list[str]:
    where = "the GPU" if processes == 1 else f"each of {processes} GPUs"
    return [
        f"GB (10^9 bytes) on {where}, during the update",
        *(f"  {part.name:41}{part.size / 1e9:12.2f}" for part in memory),
        f"  {'in all':41}{sum(part.size for part in memory) / 1e9:12.2f}",
    ]


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _number(value: float) -> str:
    """Three decimals or four digits, whichever is fewer; never an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 100 else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
