"""What `python -m fastgrpo.estimate` does: it says what a training would cost in computation and memory.

It is computed from the configs (costs/counting.py counts the models). Nothing is measured, no weights are needed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastgrpo.costs.counting import EncoderCost, ModelCost, count_encoders, count_model, find_architecture
from fastgrpo.costs.memory import (
    CPU_MICRO_BATCH,
    candidates,
    choose_gradient_checkpointing,
    choose_offload,
    choose_shard,
    cut,
    iteration_of,
    memory_lines,
    memory_plan,
    planned_device,
    predicted_micro_batch,
    with_offload,
    with_shard,
)
from fastgrpo.grpo.steps import drawn_per_iteration, pairs_per_iteration, passes_per_iteration, rollout_schedule
from fastgrpo.models.configs import Description
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.devices import DTYPE_NAMES, choose_dtype, is_on

_UNIT_TFLOPS = 100.0  # what hours are given for where --tflops is not
_NOT_COUNTED = (
    "Not counted: encoding texts, the optimizer's arithmetic, evaluations, pictures;",
    "memory of the CUDA context, of kernels' workspaces, of CUDA graphs' inputs, and what",
    "the allocator holds back; what torch.compile spares. Groups without spread are counted,",
    "which training skips.",
)


@dataclass(frozen=True)
class CostRow:
    """A table's row. stage: rollout, decode, reward or update. flop: of one. times: in an iteration, all processes."""

    stage: str
    name: str
    flop: int
    times: int

    @property
    def total(self) -> int:
        return self.flop * self.times


@dataclass(frozen=True)
class Plan:
    """What a training computes in an iteration, and what lies in the memory of each device that it runs on.

    config: with engine.shard and engine.offload decided. encoders: the reward's. left_out: lines on those of its terms
    that cannot be counted. pairs: (sample, step) pairs of an iteration. passes: of the UNet that learn from them, fewer
    where siblings share one. drawn: latents that a rollout's steps start from. micro_batch: how many of them at once.
    sized: why so many. reasons: what else was decided and why, on gradient checkpointing last.
    """

    config: TrainConfig
    model: ModelCost
    encoders: Mapping[str, EncoderCost]
    left_out: Sequence[str]
    dtype: torch.dtype
    processes: int
    pairs: int
    passes: int
    drawn: int
    micro_batch: int
    sized: str
    reasons: tuple[str, ...]

    def memory_lines(self, where: str) -> list[str]:
        """Writes the table of what lies in the memory of `where`."""
        parts = self.config, self.model, self.encoders, self.dtype, self.processes, self.micro_batch
        return memory_lines(memory_plan(*parts), where)

    def header(self) -> list[str]:
        """Writes which model is trained, and of what an iteration consists."""
        config, model = self.config, self.model
        prompts, group, rank = config.prompts_per_iteration, config.group_size, config.model.lora_rank
        channels, height, width = model.latent_shape
        what = f"adapters of rank {rank}, {model.trained:,} parameters beside" if rank else "all of"
        return [
            f"model     {config.model.path}",
            f"trained   {what} the UNet's {model.unet:,}, in {DTYPE_NAMES[self.dtype]}",
            f"iteration {prompts} prompts x {group} = {prompts * group} images, {self.pairs:,} (sample, step) pairs,"
            f" latents {channels} x {height} x {width}",
        ]


def make_plan(config: TrainConfig, description: Description, dtype: torch.dtype, processes: int, room: int) -> Plan:
    """Counts a model as it is to be trained, on a GPU unless engine.device is cpu. Nothing is measured or loaded.

    dtype: what the UNet computes in. processes: devices that share the work. room: bytes of a GPU that may be filled.
    Raises ConfigError for a model that cannot be trained.
    """
    device = planned_device(config)
    schedule = rollout_schedule(description.scheduler, config, torch.device("cpu"))
    pairs, passes = pairs_per_iteration(config, schedule), passes_per_iteration(config, schedule)
    drawn = drawn_per_iteration(description.scheduler, config)

    def count(gradient_checkpointing: bool) -> ModelCost:
        return count_model(
            description, config.model, dtype, is_on(config.engine.kernels, device), gradient_checkpointing
        )

    encoders, left_out = count_encoders(config.reward)
    short = encoders, dtype, processes, room if device.type == "cuda" else None
    shard, shared = choose_shard(config, count, *short)
    config = with_shard(config, shard)
    offload, moved = choose_offload(config, count, *short)
    config = with_offload(config, offload)
    checkpointing, chosen = choose_gradient_checkpointing(config, count, *short)
    model = count(checkpointing)
    sizes = candidates(iteration_of(config, len(schedule), passes, processes, checkpointing))
    micro_batch, sized = _micro_batch(config, model, encoders, dtype, processes, room, sizes)
    reasons = tuple(line for line in (shared, moved, chosen) if line)
    numbers = processes, pairs, passes, drawn, micro_batch
    return Plan(config, model, encoders, left_out, dtype, *numbers, sized, reasons)


def estimate(
    config: TrainConfig, tflops: float, processes: int, link_gb_s: float, gpu_gb: float, console: Console
) -> None:
    """Counts the config's models and says what a training costs. Raises ConfigError for a model that cannot be trained.

    tflops: what each GPU sustains, in TFLOP/s; 0 stands for 100. processes: GPUs that share the work.
    link_gb_s: what each sends to the others, in GB/s. gpu_gb: memory of each.
    """
    description, known = find_architecture(config.model)
    dtype = choose_dtype(config.engine.dtype, planned_device(config))
    with console.bar("counting"):
        plan = make_plan(config, description, dtype, processes, int(config.engine.memory * gpu_gb * 1e9))
    config, model = plan.config, plan.model
    first, *header = plan.header()

    console.say("Computed from the configs, not measured.", "", first)
    console.say(*([] if known else ["          counted as SD 1.x: its configs are not in the hub's cache"]), *header)
    console.say(
        "", *_table(iteration_rows(config, model, plan.encoders, plan.passes, plan.drawn), config, tflops, processes)
    )
    if processes > 1:
        console.say(_network(config, model.trained, processes, link_gb_s))
    console.say("", *plan.memory_lines("the GPU" if processes == 1 else f"each of {processes} GPUs"))
    console.say(*(f"  {line}" for line in (plan.sized, *plan.reasons)))
    console.say("", *plan.left_out, *_NOT_COUNTED)


def iteration_rows(
    config: TrainConfig, model: ModelCost, encoders: Mapping[str, EncoderCost], passes: int, drawn: int
) -> list[CostRow]:
    """Lists what an iteration computes on all processes. encoders: the reward's. passes, drawn: as of `Plan`."""
    images = config.prompts_per_iteration * config.group_size
    samples = config.rollout.halves
    forward = "2 x forward" if model.gradient_checkpointing else "forward"
    rows = [
        CostRow("rollout", "UNet forward", model.forward, drawn * samples),
        CostRow("decode", "VAE decode", model.decode, images),
        *(CostRow("reward", f"image tower, {spec}", encoder.image, images) for spec, encoder in encoders.items()),
        CostRow("update", f"UNet {forward} + backward", model.forward_backward, passes * samples),
    ]
    if config.grpo.old_log_prob == "replay":
        later = passes - -(-passes // config.updates_per_iteration)  # than the first optimizer step's
        rows.append(CostRow("update", "UNet forward, replay", model.forward, later * samples))
    if config.kl_term:
        rows.append(CostRow("update", "UNet forward, KL's base", model.forward, passes * samples))
    return rows


def _micro_batch(
    config: TrainConfig,
    model: ModelCost,
    encoders: Mapping[str, EncoderCost],
    dtype: torch.dtype,
    processes: int,
    room: int,
    sizes: Sequence[int],
) -> tuple[int, str]:
    """Returns the pairs in a micro-batch, and a line that says why.

    room: bytes of a GPU that may be filled. sizes: those that training would try.
    """
    if config.micro_batch:
        return config.micro_batch, f"micro_batch = {config.micro_batch} (sample, step) pairs, as configured"
    if planned_device(config).type == "cpu":
        return CPU_MICRO_BATCH, f"micro_batch = 0: {CPU_MICRO_BATCH} pairs on a CPU"
    size = predicted_micro_batch(config, model, encoders, dtype, processes, room, sizes)
    why = f"{size} pairs, the most that {room / 1e9:.1f} GB should hold (engine.memory)"
    return size, f"micro_batch = 0: {why}"


def _table(rows: Sequence[CostRow], config: TrainConfig, tflops: float, processes: int) -> list[str]:
    all_flop = sum(row.total for row in rows)
    gpus = "1 GPU" if processes == 1 else f"each of {processes} GPUs"
    seconds = all_flop / ((tflops or _UNIT_TFLOPS) * 1e12 * processes)
    unit, name = (1e12, "TFLOP") if all_flop >= 1e13 else (1e9, "GFLOP")
    return [
        f"{name:42}{'each':>8}{'times':>9}{'iteration':>13}",
        *(
            f"  {row.stage:8} {cut(row.name, 31)}{_digits(row.flop / unit):>8}{row.times:>9,}"
            f"{_digits(row.total / unit):>13}{row.total / all_flop:7.1%}"
            for row in rows
        ),
        f"  {'in all':57}{_digits(all_flop / unit):>13}",
        f"{config.iterations} iterations: {_digits(config.iterations * all_flop / unit)} {name}",
        f"at {tflops or _UNIT_TFLOPS:g} TFLOP/s on {gpus}{'' if tflops else ' (--tflops)'}: "
        f"{_digits(seconds)} s an iteration, {_digits(seconds * config.iterations / 3600)} hours",
    ]


def sent_in_a_step(trained: int, processes: int) -> float:
    """Bytes that each process sends in an optimizer step, for float32 gradients of so many `trained` parameters.

    2 (N - 1) / N times the gradient, the least that N processes can send to sum it (Patarasuk and Yuan, 2009). Whether
    all of them sum all of it, or each a share whose stepped weights it then sends to the others, makes no difference.
    """
    return 2 * (processes - 1) / processes * 4 * trained


def _network(config: TrainConfig, trained: int, processes: int, link_gb_s: float) -> str:
    step = sent_in_a_step(trained, processes) / 1e9
    iteration = step * config.updates_per_iteration
    return (
        f"each sends {_digits(step)} GB an optimizer step, {_digits(iteration)} GB an iteration: "
        f"{_digits(iteration / link_gb_s)} s at {link_gb_s:g} GB/s (--link-gb-s)"
    )


def _digits(value: float) -> str:
    """Writes four digits, or all that stand before the point; never an exponent."""
    before = math.floor(math.log10(value)) + 1 if value else 1
    return f"{value:,.{min(max(4 - before, 0), 6)}f}"
