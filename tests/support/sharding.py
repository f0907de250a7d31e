"""Processes that train one tiny UNet together without a launcher, and write down what each of them found."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgrpo.engine.trainable import Trainable, make_trainable
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import TrainerState
from fastgrpo.settings.schema import EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastgrpo.system import distributed
from fastgrpo.system.distributed import Ranks
from support.training import SERVER

CPU = torch.device("cpu")
COUNTS = (2, 3, 4)
AFTER_TWO = {2: ("full", "lora"), 3: ("full", "lora"), 8: ("full",)}  # how many go on from what 2 have saved of which
SAMPLES, STEPS, SAVED = 12, 4, 2
# With an eps far above any gradient a step is linear in the gradient, and does not magnify its rounding. All gradients
# are clipped, so the norm, which needs every share, decides how far each step goes.
OPTIM = OptimConfig(lr=1.0, eps=1.0, weight_decay=1e-3, ema=0.5, max_grad_norm=0.01)
SHARDED = TrainConfig(optim=OPTIM, engine=EngineConfig(shard="optimizer"))
CASES = {
    "none": replace(SHARDED, engine=EngineConfig(shard="none")),
    "full": SHARDED,
    "lora": replace(SHARDED, model=ModelConfig(lora_rank=3)),
}


def make(pipeline: Path, config: TrainConfig, ranks: Ranks, dtype: torch.dtype = torch.float32) -> Trainable:
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", dtype=torch.float32)
    unet.to(memory_format=torch.channels_last).eval()
    return make_trainable(unet, config, CPU, dtype, ranks)


def step(trainable: Trainable, ranks: Ranks, seed: int) -> Tensor:
    """One optimizer step on a loss that is a mean over samples, of which every process has its share."""
    generator, own = torch.Generator().manual_seed(seed), ranks.share(SAMPLES)
    latents, embeds = (torch.randn(SAMPLES, *shape, generator=generator)[own] for shape in ((4, 8, 8), (8, 32)))
    dtype, weights = next(trainable.network.parameters()).dtype, trainable.optimizer.weights
    output = trainable.network(latents.to(dtype), 10 * seed, embeds.to(dtype)).sample
    loss = output.float().square().mean((1, 2, 3)).sum() / SAMPLES
    weights.zero_gradient()
    weights.accumulate(torch.autograd.grad(loss, trainable.trained))
    weights.reduce(ranks)
    norm, taken = trainable.step(OPTIM.max_grad_norm)
    assert taken
    return norm


def save(trainable: Trainable, ranks: Ranks, run: Path, iteration: int) -> None:
    trainable.optimizer.gather()
    if ranks.first:
        checkpoint.save(run, trainable, TrainerState(iteration, 0, 0.0, 1, {}, processes=ranks.count), keep=0)


def train(pipeline: Path, config: TrainConfig, ranks: Ranks, run: Path, after: Path | None = None) -> dict[str, float]:
    """All steps, or those after a checkpoint, saved in between and at the end. Returns what the last one measured."""
    trainable, begun = make(pipeline, config, ranks), 0
    if after is not None:
        checkpoint.load(after, trainable)
        begun = checkpoint.read_state(after).iteration
    measured: dict[str, float] = {}
    for seed in range(begun + 1, STEPS + 1):
        sent = Sent()
        with sent:
            measured = {"norm": step(trainable, ranks, seed).item()}
        measured |= sent.bytes
        if seed in (SAVED, STEPS):
            save(trainable, ranks, run, seed)
    optimizer, weights = trainable.optimizer, trainable.optimizer.weights
    measured["size"] = weights.size
    for name, tensor in {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq, "ema": weights.ema}.items():
        measured[f"held.{name}"] = tensor.untyped_storage().nbytes()
    return measured


class Sent:
    """Counts the bytes of the tensors that each kind of collective is called with, while it is entered."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._kept: list[tuple[object, str, Callable]] = []

    def __enter__(self) -> "Sent":
        for owner, name, kind, given in (
            (dist, "all_reduce", "all_reduce", 0),
            (distributed, "_reduce_scatter", "reduce_scatter", 1),
            (distributed, "_all_gather", "all_gather", 0),
        ):
            real = getattr(owner, name)
            self._kept.append((owner, name, real))
            setattr(owner, name, self._counting(real, f"sent.{kind}", given))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, real in self._kept:
            setattr(owner, name, real)

    def _counting(self, real: Callable, name: str, given: int) -> Callable:
        def call(*arguments: Tensor, **keywords: object) -> object:
            whole = arguments[given]  # of all processes together
            self.bytes[name] = self.bytes.get(name, 0) + whole.numel() * whole.element_size()
            return real(*arguments, **keywords)

        return call


def half_precision(pipeline: Path, ranks: Ranks) -> dict[str, object]:
    """What a working copy in bf16 is after steps; and what fp16 does where one process alone overflows."""
    trainable = make(pipeline, SHARDED, ranks, torch.bfloat16)
    for seed in (1, 2):
        step(trainable, ranks, seed)
    rounded = [p.detach().bfloat16() for p in trainable.parameters.values()]
    found: dict[str, object] = {"follows": all(map(torch.equal, trainable.trained, rounded))}
    moved = make(pipeline, SHARDED, ranks, torch.bfloat16).parameters
    found["moved"] = not any(torch.equal(p, moved[name]) for name, p in trainable.parameters.items())

    trainable = make(pipeline, SHARDED, ranks, torch.float16)
    before, weights, scale = trainable.optimizer.weights.values.clone(), trainable.optimizer.weights, []
    for large in (torch.inf, 1.0):  # inf at an element that the last process owns, in the first one's gradient
        weights.zero_gradient()
        if ranks.first:
            weights.gradient[weights.size - weights.size // ranks.count] = large
        weights.reduce(ranks)
        norm, taken = trainable.step(1e9)
        scale.append((norm.isfinite().item(), taken, trainable.scaler.get_scale()))
        found[f"kept {large}"] = torch.equal(before, weights.values)
    return found | {"scale": scale}


def eight_bits(pipeline: Path, ranks: Ranks, run: Path, after: Path | None = None) -> None:
    """Steps with moments of 8 bits, saved like those of `train`, on gradients that the last process alone has.

    So their sum is exact; nothing is clipped, since the norm's rounding depends on the shares.
    """
    config = replace(SHARDED, optim=OptimConfig(lr=1e-2, ema=0.5, moments="8bit"))
    trainable, begun = make(pipeline, config, ranks), 0
    if after is not None:
        checkpoint.load(after, trainable)
        begun = checkpoint.read_state(after).iteration
    for seed in range(begun + 1, STEPS + 1):
        trainable.optimizer.weights.zero_gradient()
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable.parameters.values():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad.copy_(drawn if ranks.index == ranks.count - 1 else torch.zeros_like(drawn))
        trainable.optimizer.weights.reduce(ranks)
        trainable.step(math.inf)
        if seed in (SAVED, STEPS):
            save(trainable, ranks, run, seed)


def _process(index: int, pipeline: Path, folder: Path) -> None:
    """Process number `index` of every count that has so many."""
    torch.set_num_threads(1)
    for count in sorted({*COUNTS, *AFTER_TWO}):
        if index >= count:
            continue
        meeting = f"file://{folder}/meeting-{count}"
        dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=count)
        ranks = Ranks(index, count)
        found: dict[str, object] = {}
        for name, config in CASES.items() if count in COUNTS else ():
            found[name] = train(pipeline, config, ranks, folder / f"{name}-{count}")
        if count == 2:
            found["half"] = half_precision(pipeline, ranks)
        for name in AFTER_TWO.get(count, ()):
            after = checkpoint.checkpoint_folder(folder / f"{name}-2", SAVED)
            train(pipeline, CASES[name], ranks, folder / f"{name}-2-then-{count}", after)
        if count in (2, 3):
            eight_bits(pipeline, ranks, folder / f"8bit-{count}")
            after = checkpoint.checkpoint_folder(folder / "8bit-2", SAVED)
            eight_bits(pipeline, ranks, folder / f"8bit-2-then-{count}", after)
        (folder / f"found-{count}-{index}.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0)


def run_processes(pipeline: Path, folder: Path) -> None:
    """Starts as many processes as the largest count, and waits for them. Raises RuntimeError where one fails."""
    most = max(*COUNTS, *AFTER_TWO)
    processes = [SERVER.Process(target=_process, args=(index, pipeline, folder)) for index in range(most)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
