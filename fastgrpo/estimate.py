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
from fastgrpo.console import Console, run_command
from fastgrpo.costs import EncoderCost, ModelCost, count_encoder, count_model, find_architecture
from fastgrpo.grpo.steps import chosen_steps, trained_steps
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings import DEFAULT_PRESET, parse_with_preset

PROGRAM = "python -m fastgrpo.estimate"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNIT_TFLOPS = 100.0  # what hours are given for where --tflops is not
_NOT_COUNTED = (
    "Not counted: encoding texts, the optimizer's arithmetic, evaluations, pictures;",
    "memory of the CUDA context, of kernels' workspaces, and what the allocator holds",
    "back. Groups without spread are counted, which training skips.",
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
    """One kind of computation.

    stage: rollout, decode, reward or update. flop: of one. times: how often in an iteration, on all processes together.
    """

    stage: str
    name: str
    flop: int
    times: int

    @property
    def total(self) -> int:
        return self.flop * self.times


@dataclass(frozen=True)
class Memory:
    """One thing that lies in a GPU's memory.

    stage: when: `always`, or rollout, decode, reward or update, which come one after the other. size: bytes.
    """

    stage: str
    name: str
    size: int


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        asked = parse_with_preset(_Estimate, sys.argv[1:] if argv is None else argv, PROGRAM)
        _check(asked)
        estimate(asked.config, asked.tflops, asked.processes, Console())

    return run_command(command, "")


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
    console.say(*_header(config, model, known, dtype, pairs))
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
        Work("decode", "VAE decode", model.decode, images),
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
    """What lies in the memory of each of `processes` GPUs; parts that are not there are left out.

    dtype: what the UNet computes in.
    """
    compute, single = dtype.itemsize, torch.float32.itemsize
    trained, images = single * model.trained, config.prompts_per_iteration * config.group_size // processes
    base = single * model.unet if config.grpo.kl > 0 else 0
    samples = config.micro_batch * _halves(config)
    if config.model.lora_rank:
        unet = [Memory("always", f"frozen UNet, {_name(dtype)}", compute * model.unet)]
        unet += [Memory("always", "adapters, fp32", trained)]
    else:
        unet = [Memory("always", "UNet, fp32", trained)]
    cast = f"autocast's {_name(dtype)} copies of what is trained"
    parts = [
        *unet,
        Memory("always", "Adam's two moments, fp32", 2 * trained),
        Memory("always", "moving average (optim.ema), fp32", trained if config.optim.ema else 0),
        Memory("always", "base UNet (grpo.kl), fp32", base),
        Memory("always", f"VAE and text encoder, {_name(dtype)}", compute * model.frozen),
        *(Memory("always", f"encoder {spec}, fp32", single * encoder.parameters) for spec, encoder in encoders.items()),
        Memory("always", "trajectories and images, fp32", images * _sample_bytes(config, model)),
        Memory("rollout", cast, model.cast),
        _at_once("rollout", _chunk(images, config.rollout.batch) * _halves(config), "UNet samples", model.passing),
        _at_once("decode", min(images, config.rollout.decode_batch), "images in the VAE", model.decoding),
        *(
            _at_once("reward", min(images, config.reward.batch), f"images in {spec}", encoder.encoding)
            for spec, encoder in encoders.items()
        ),
        Memory("update", cast, model.cast),
        Memory("update", "gradients, fp32", trained),
        _micro_batch(config, model),
        _at_once("update", samples if base else 0, "samples in the base UNet", model.passing),
    ]
    return [part for part in parts if part.size]


def peak(memory: Sequence[Memory]) -> tuple[str, int]:
    """The stage that needs most memory, and how many bytes that is together with what is always there."""
    sizes: dict[str, int] = {}
    for part in memory:
        sizes[part.stage] = sizes.get(part.stage, 0) + part.size
    always = sizes.pop("always")
    stage = max(sizes, key=sizes.__getitem__)
    return stage, always + sizes[stage]


def _sample_bytes(config: TrainConfig, model: ModelCost) -> int:
    """Latents, log-probs, the image and, where RatioNorm keeps them, means of one sample."""
    grpo, steps, latent = config.grpo, config.rollout.steps, math.prod(model.latent_shape)
    copies = {"rollout": 1, "replay": 2, "detach": 0}[grpo.old_log_prob]  # of the old policy's means
    means = copies * steps * latent if grpo.ratio_norm else 0
    return torch.float32.itemsize * ((steps + 1) * latent + steps + math.prod(model.image_shape) + means)


def _chunk(samples: int, batch: int) -> int:
    """The most samples that are denoised at once, in nearly equal shares of at most `batch`; 0 is all."""
    return -(-samples // -(-samples // (batch or samples)))


def _at_once(stage: str, count: int, what: str, size: int) -> Memory:
    return Memory(stage, f"{count} {what}", count * size)


def _micro_batch(config: TrainConfig, model: ModelCost) -> Memory:
    """What a micro-batch saves for its backward pass, or what comes later in its place, if that is more.

    Later: the micro-batch's gradients before they are added to the others; AdamW's root of the second moment.
    """
    samples, later = config.micro_batch * _halves(config), torch.float32.itemsize * model.trained
    if samples * model.activations < later:
        return Memory("update", "a second set of gradients, fp32", later)
    return Memory("update", f"activations of {samples} UNet samples", samples * model.activations)


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


def _header(config: TrainConfig, model: ModelCost, known: bool, dtype: torch.dtype, pairs: int) -> list[str]:
    prompts, group, rank = config.prompts_per_iteration, config.group_size, config.model.lora_rank
    channels, height, width = model.latent_shape
    what = f"adapters of rank {rank}, {model.trained:,} parameters beside" if rank else "all of"
    return [
        f"model     {config.model.path}",
        *([] if known else ["          counted as SD 1.x: its configs are not in the hub's cache"]),
        f"trained   {what} the UNet's {model.unet:,}, in {_name(dtype)}",
        f"iteration {prompts} prompts x {group} = {prompts * group} images, {pairs:,} (sample, step) pairs,"
        f" latents {channels} x {height} x {width}",
    ]


def _work_lines(work: Sequence[Work], config: TrainConfig, tflops: float, processes: int) -> list[str]:
    all_flop = sum(part.total for part in work)
    gpus = "1 GPU" if processes == 1 else f"each of {processes} GPUs"
    seconds = all_flop / ((tflops or _UNIT_TFLOPS) * 1e12 * processes)
    unit, name = (1e12, "TFLOP") if all_flop >= 1e13 else (1e9, "GFLOP")
    return [
        f"{name:42}{'each':>8}{'times':>9}{'iteration':>13}",
        *(
            f"  {part.stage:8} {_cut(part.name, 31)}{_digits(part.flop / unit):>8}{part.times:>9,}"
            f"{_digits(part.total / unit):>13}{part.total / all_flop:7.1%}"
            for part in work
        ),
        f"  {'in all':57}{_digits(all_flop / unit):>13}",
        f"{config.iterations} iterations: {_digits(config.iterations * all_flop / unit)} {name}",
        f"at {tflops or _UNIT_TFLOPS:g} TFLOP/s on {gpus}{'' if tflops else ' (--tflops)'}: "
        f"{_digits(seconds)} s an iteration, {_digits(seconds * config.iterations / 3600)} hours",
    ]


def _memory_lines(memory: Sequence[Memory], processes: int) -> list[str]:
    where = "the GPU" if processes == 1 else f"each of {processes} GPUs"
    stage, most = peak(memory)
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    return [
        f"{name} on {where}",
        *(f"  {part.stage:8} {_cut(part.name, 51)}{part.size / unit:10.2f}" for part in memory),
        f"  {f'at most, during the {stage}':60}{most / unit:10.2f}",
    ]


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _cut(text: str, width: int) -> str:
    """`text` in exactly `width` columns."""
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def _digits(value: float) -> str:
    """Four digits, or all that stand before the point; never an exponent."""
    before = math.floor(math.log10(value)) + 1 if value else 1
    return f"{value:,.{min(max(4 - before, 0), 6)}f}"


if __name__ == "__main__":
    sys.exit(main())
