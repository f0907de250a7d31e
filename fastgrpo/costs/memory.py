"""What lies in a GPU's memory, counted from the models part by part, and which micro-batches are worth trying there.

engine/batch_size.py then tries them on the device, beginning with the one that is predicted here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastgrpo.costs.counting import EncoderCost, ModelCost
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.devices import DTYPE_NAMES, is_on

CPU_MICRO_BATCH = 32
"""What micro_batch 0 stands for on a CPU, where memory is not what bounds it."""
_AS_FULL = 0.005  # so much more padding than the least, in an iteration's work, is as good
_MOST_PADDING = 0.25  # that a larger micro-batch could make up for by being faster
_BLOCK = 256  # elements of a moment in 8 bits that share a float32 scale
_STEPPED = 2**20  # elements that a step of theirs is about at a time
_A_STEP = 50  # bytes that each of these takes meanwhile
_APART = 1.25  # of two sizes that are closer the smaller is tried: their passes are as fast


@dataclass(frozen=True)
class Memory:
    """Bytes in a GPU's memory. stage: `always`, or texts, rollout, decode, reward, update or step, one by one."""

    stage: str
    name: str
    size: int


@dataclass(frozen=True)
class Iteration:
    """What one process computes in an iteration, for choosing a micro-batch.

    samples: images that a rollout draws in passes of a micro-batch's size; 0 where rollout.batch says another.
    steps: denoising steps of each. updates: optimizer steps. pairs: of each optimizer step.
    forwards: how many forward passes cost as much as one with its backward pass: 3, with gradient checkpointing 4.
    """

    samples: int
    steps: int
    updates: int
    pairs: int
    forwards: int = 3

    def passes(self, size: int) -> float:
        """Returns how many forward and backward passes of `size` pairs it takes; the last one is filled up.

        A rollout's pass counts as a share of one.
        """
        rollout = self.steps * math.ceil(self.samples / size) / self.forwards
        return rollout + self.updates * math.ceil(self.pairs / size)

    def padding(self, size: int) -> float:
        """Returns what filling up adds to an iteration's work: 0.05 is one twentieth more."""
        return size * self.passes(size) / (self.steps * self.samples / self.forwards + self.updates * self.pairs) - 1


def iteration_of(
    config: TrainConfig, steps: int, pairs: int, processes: int, gradient_checkpointing: bool = False
) -> Iteration:
    """Divides an iteration among processes. steps: of the schedule. pairs: of all processes together."""
    return Iteration(
        samples=0 if config.rollout.batch else config.prompts_per_iteration * config.group_size // processes,
        steps=steps,
        updates=config.updates_per_iteration,
        pairs=-(-pairs // config.updates_per_iteration // processes),
        forwards=4 if gradient_checkpointing else 3,
    )


def memory_plan(
    config: TrainConfig,
    model: ModelCost,
    encoders: Mapping[str, EncoderCost],
    dtype: torch.dtype,
    processes: int,
    micro_batch: int,
) -> tuple[Memory, ...]:
    """Lists what lies in the memory of each of `processes` GPUs; parts that are not there are left out.

    dtype: what the UNet computes in and `model` was counted in. micro_batch: pairs. With engine.shard `optimizer` each
    GPU has a share of the optimizer's state; `auto` counts as none, until `choose_shard` has decided.
    A rollout that draws as many samples at once as a micro-batch has pairs runs the update's passes, which save
    activations, for log-probs of the same bits; with another rollout.batch it saves nothing. CUDA graphs keep one pool
    for rollout and update, beside which decoding and scoring need theirs. Without graphs, scoring while the next images
    are drawn (engine.overlap) needs the rollout's beside its own. With engine.offload `on`, here as good as `off` where
    it is `auto`, VAE and encoders are there in the stages that use them.
    """
    compute, single, name = dtype.itemsize, torch.float32.itemsize, DTYPE_NAMES[dtype]
    trained, images = single * model.trained, config.prompts_per_iteration * config.group_size // processes
    samples, drawn = micro_batch * config.rollout.halves, min(images, config.rollout.batch or micro_batch)
    frozen = compute * model.unet if config.model.lora_rank else 0
    working = compute * model.trained if dtype != torch.float32 else 0
    away, towers = offloads(config), [single * (cost.parameters - cost.text) for cost in encoders.values()]
    read = {"text encoder, " + name: compute * model.text_encoder}
    read |= {f"text tower of {spec}, fp32": single * cost.text for spec, cost in encoders.items()}
    reader = max(read, key=read.__getitem__)  # they are there one at a time
    base = model.trained if config.model.lora_rank else model.unet  # a base model shares what is frozen
    owners = processes if config.engine.shard == "optimizer" else 1
    own, part_of = -(-trained // owners), f", 1/{owners}" if owners > 1 else ""
    eight = config.optim.moments == "8bit"
    # A code and a share of a block's scale, for each of two moments.
    moments = 2 * (own // single + own // _BLOCK) if eight else 2 * own
    stepped = min(own // single, _STEPPED) * _A_STEP if eight else 0
    averaged = config.optim.ema > 0 and not (away and owners == 1)
    saving, kept = drawn == min(images, micro_batch), "checkpointed, " if model.gradient_checkpointing else ""
    parts = [
        Memory("always", f"frozen UNet, {name}", frozen),
        Memory("always", "adapters, fp32" if config.model.lora_rank else "UNet, fp32", trained),
        Memory("always", f"working copy of what is trained, {name}", working),
        Memory("always", f"Adam's two moments, {'8 bits' if eight else 'fp32'}{part_of}", moments),
        Memory("always", "gradient, fp32", trained),
        Memory("always", f"moving average (optim.ema), fp32{part_of}", own if averaged else 0),
        Memory("always", f"base UNet's own (grpo.kl), {name}", compute * base if config.kl_term else 0),
        Memory("always", f"VAE and text encoder, {name}", 0 if away else compute * model.frozen),
        *(
            Memory("always", f"encoder {spec}, fp32", 0 if away else single * cost.parameters)
            for spec, cost in encoders.items()
        ),
        Memory("always", "trajectories and images, fp32", images * _sample_bytes(config, model)),
        Memory("texts", reader, read[reader] if away else 0),
        _at_once(
            "rollout",
            (drawn if saving else _chunk(images, drawn)) * config.rollout.halves,
            f"UNet samples, {'as in the update' if saving else 'nothing saved'}",
            model.saving if saving else model.passing,
        ),
        Memory("decode", f"VAE, {name}", compute * (model.frozen - model.text_encoder) if away else 0),
        _at_once("decode", min(images, config.rollout.decode_batch), "images in the VAE", model.decoding),
        *(
            Memory("reward", f"image tower of {spec}, fp32", tower if away else 0)
            for spec, tower in zip(encoders, towers, strict=True)
        ),
        *(
            _at_once("reward", min(images, config.reward.batch), f"images in {spec}", encoder.encoding)
            for spec, encoder in encoders.items()
        ),
        _at_once("update", samples, f"UNet samples' activations, {kept}{name}", model.activations),
        _beside_activations(config, model, samples, name),
        Memory("step", "a piece of the moments, fp32 and codes", stepped),
    ]
    sizes = _by_stage(parts)
    held, name = 0, ""
    if is_on(config.engine.graphs, planned_device(config)):
        held, name = max(sizes["rollout"], sizes["update"]), "CUDA graphs, of rollout and update"
    elif config.engine.overlap and not away and planned_device(config).type != "cpu":
        held, name = sizes["rollout"], "the rollout that goes on meanwhile"
    parts += [Memory(stage, name, held) for stage in ("texts", "decode", "reward", "step") if sizes.get(stage)]
    return tuple(part for part in parts if part.size)


def beside_a_pass(
    config: TrainConfig, model: ModelCost, encoders: Mapping[str, EncoderCost], dtype: torch.dtype, processes: int
) -> int:
    """Returns the bytes to leave when a pass of the update is tried before there is anything to learn from.

    They are for trajectories, and beside CUDA graphs, which keep theirs, for decoding, scoring or drawing pictures.
    """
    images = config.prompts_per_iteration * config.group_size // processes
    trajectories = images * _sample_bytes(config, model)
    if not is_on(config.engine.graphs, planned_device(config)):
        return trajectories
    pictures = config.rollout.decode_batch * config.rollout.halves * model.passing
    decoding = min(images, config.rollout.decode_batch) * model.decoding
    scoring = {spec: min(images, config.reward.batch) * encoder.encoding for spec, encoder in encoders.items()}
    if offloads(config):  # then they come for it
        decoding += dtype.itemsize * (model.frozen - model.text_encoder)
        for spec, cost in encoders.items():
            scoring[spec] += torch.float32.itemsize * (cost.parameters - cost.text)
    return trajectories + max(decoding, *scoring.values(), pictures)


def offloads(config: TrainConfig) -> bool:
    """Returns whether engine.offload moves something: `auto`, unless `choose_offload` was asked, does not."""
    return config.engine.offload == "on" and planned_device(config).type != "cpu"


def with_offload(config: TrainConfig, on: bool) -> TrainConfig:
    """Returns the config with engine.offload decided."""
    return replace(config, engine=replace(config.engine, offload="on" if on else "off"))


def with_shard(config: TrainConfig, shard: Literal["none", "optimizer"]) -> TrainConfig:
    """Returns the config with engine.shard decided."""
    return replace(config, engine=replace(config.engine, shard=shard))


def planned_device(config: TrainConfig) -> torch.device:
    """Returns the kind of device that a training is for: a GPU unless engine.device is cpu, whatever is here."""
    return torch.device("cpu" if config.engine.device == "cpu" else "cuda")


def _by_stage(memory: Sequence[Memory]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in memory:
        sizes[part.stage] = sizes.get(part.stage, 0) + part.size
    return sizes


def peak(memory: Sequence[Memory]) -> tuple[str, int]:
    """Returns the stage that needs most memory, and its bytes together with what is always there."""
    sizes = _by_stage(memory)
    always = sizes.pop("always")
    stage = max(sizes, key=sizes.__getitem__)
    return stage, always + sizes[stage]


def memory_lines(memory: Sequence[Memory], where: str) -> list[str]:
    """Writes a table of the parts and the peak. where: "the GPU", for example."""
    stage, most = peak(memory)
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    return [
        f"{name} on {where}",
        *(f"  {part.stage:8} {cut(part.name, 51)}{part.size / unit:10.2f}" for part in memory),
        f"  {f'at most, during the {stage}':60}{most / unit:10.2f}",
    ]


def cut(text: str, width: int) -> str:
    """Cuts or pads `text` to exactly `width` columns."""
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def predicted_micro_batch(
    config: TrainConfig,
    model: ModelCost,
    encoders: Mapping[str, EncoderCost],
    dtype: torch.dtype,
    processes: int,
    room: int,
    sizes: Sequence[int],
) -> int:
    """Returns the largest of `sizes` with which the plan stays within `room` bytes; the smallest where none does."""

    def needed(size: int) -> int:
        return peak(memory_plan(config, model, encoders, dtype, processes, size))[1]

    return max((size for size in sizes if needed(size) <= room), default=min(sizes))


def choose_offload(
    config: TrainConfig,
    count: Callable[[bool], ModelCost],
    encoders: Mapping[str, EncoderCost],
    dtype: torch.dtype,
    processes: int,
    room: int | None,
) -> tuple[bool, str]:
    """Decides engine.offload `auto`: on where the plan of one pair at once says that memory is short.

    Asked before `choose_gradient_checkpointing`, which costs more time. Arguments and result are as there.
    """

    def needed(on: bool) -> int:
        model = count(config.engine.gradient_checkpointing == "on")
        return peak(memory_plan(with_offload(config, on), model, encoders, dtype, processes, 1))[1]

    return _where_short("offloading", "offload", config.engine.offload, needed, room)


def choose_gradient_checkpointing(
    config: TrainConfig,
    count: Callable[[bool], ModelCost],
    encoders: Mapping[str, EncoderCost],
    dtype: torch.dtype,
    processes: int,
    room: int | None,
) -> tuple[bool, str]:
    """Decides engine.gradient_checkpointing `auto`: on where the plan of one pair at once says that memory is short.

    count: counts the model without gradient checkpointing or with it. room: bytes that may be filled; None on a CPU.
    Returns whether it is on, and a line that says why.
    """

    def needed(on: bool) -> int:
        return peak(memory_plan(config, count(on), encoders, dtype, processes, 1))[1]

    asked = config.engine.gradient_checkpointing
    return _where_short("gradient checkpointing", "gradient_checkpointing", asked, needed, room)


def _where_short(
    name: str, field: str, setting: str, needed: Callable[[bool], int], room: int | None
) -> tuple[bool, str]:
    """Decides a setting of EngineConfig that is on, off or `auto`: on where one pair does not fit without it.

    needed: bytes of one pair without it or with it. Returns whether it is on, and a line that says why.
    """
    if setting != "auto":
        return setting == "on", f"{name} is {setting}, as engine.{field} says"
    if room is None:
        return False, f"{name} is off, as auto is on a CPU"
    without = needed(False)
    needs = f"of {room / 1e9:.2f} GB one pair needs {without / 1e9:.2f}"
    if without <= room:
        return False, f"{name} is off: {needs}"
    with_it = needed(True)
    if with_it < without:
        return True, f"{name} is on: {needs} without it, {with_it / 1e9:.2f} with it"
    return False, f"{name} is off: {needs}, and with it no less"


def choose_shard(
    config: TrainConfig,
    count: Callable[[bool], ModelCost],
    encoders: Mapping[str, EncoderCost],
    dtype: torch.dtype,
    processes: int,
    room: int | None,
) -> tuple[Literal["none", "optimizer"], str]:
    """Decides engine.shard `auto`: `optimizer` where a micro-batch, or one pair, does not fit beside the whole state.

    Before gradient checkpointing is decided: a step sends and computes as much with it as without, and passes do not
    become slower. count, room: as of `choose_gradient_checkpointing`.
    Returns what is shared out, and a line that says why; it is empty where nothing was to be decided.
    """
    setting = config.engine.shard
    if processes == 1:
        return "none", "" if setting in ("auto", "none") else "nothing is sharded: there is one process"
    if setting != "auto":
        return setting, f"sharded over {processes} processes: {setting}, as engine.shard says"
    if room is None:
        return "none", "sharded: none, as auto is on a CPU"
    pairs, model = max(config.micro_batch, 1), count(config.engine.gradient_checkpointing == "on")

    def needed(shard: Literal["none", "optimizer"]) -> int:
        return peak(memory_plan(with_shard(config, shard), model, encoders, dtype, processes, pairs))[1]

    whole, needs = needed("none"), f"of {room / 1e9:.2f} GB {'one pair' if pairs == 1 else f'{pairs} pairs'}"
    if whole <= room:
        return "none", f"sharded: none, {needs} need{'s' * (pairs == 1)} {whole / 1e9:.2f}"
    sharded = needed("optimizer")
    needs += f" need{'s' * (pairs == 1)} {whole / 1e9:.2f} with the optimizer's whole state"
    return (
        "optimizer",
        f"sharded over {processes} processes: optimizer, {needs}, {sharded / 1e9:.2f} with a share of it",
    )


def candidates(work: Iteration) -> tuple[int, ...]:
    """Picks a few micro-batches with little padding, ascending: one from each power of two to the next.

    Of those that are nearly as full as the fullest it takes the largest: 196 pairs fill 6 passes of 33, while 32 take
    7, one nearly empty. A product's rows are all samples' pixels or tokens, so odd sizes fill tensor cores' tiles too.
    """
    sizes, low = [1], 1
    while low < work.pairs:
        high = min(2 * low, work.pairs)
        padding = {size: work.padding(size) for size in range(low + 1, high + 1)}
        bound = min(min(padding.values()) + _AS_FULL, _MOST_PADDING)
        size = max((size for size, more in padding.items() if more <= bound), default=0)
        if size >= _APART * sizes[-1]:
            sizes.append(size)
        low = high
    return tuple(sizes)


def _sample_bytes(config: TrainConfig, model: ModelCost) -> int:
    """Returns the bytes of a sample's latents, log-probs, image and, where RatioNorm keeps them, means."""
    grpo, steps, latent = config.grpo, config.rollout_steps, math.prod(model.latent_shape)
    means = steps * latent if grpo.ratio_norm and grpo.old_log_prob != "detach" else 0  # of the old policy
    return torch.float32.itemsize * ((steps + 1) * latent + steps + math.prod(model.image_shape) + means)


def _chunk(samples: int, batch: int) -> int:
    """Returns the most samples that are denoised at once, in nearly equal shares of at most `batch`."""
    return -(-samples // -(-samples // batch))


def _at_once(stage: str, count: int, what: str, size: int) -> Memory:
    return Memory(stage, f"{count} {what}", count * size)


def _beside_activations(config: TrainConfig, model: ModelCost, samples: int, dtype: str) -> Memory:
    """What the update holds at its worst moment beyond all activations: for the backward pass or the base model's."""
    backward = model.learning.bytes(samples) - samples * model.activations
    base = samples * model.passing if config.kl_term else 0
    if base > backward:
        return Memory("update", f"{samples} samples in the base UNet", base)
    return Memory("update", f"more in the backward pass, with gradients, {dtype}", backward)
