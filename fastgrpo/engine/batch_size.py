"""How many pairs a micro-batch has: tries begin at the memory plan's prediction, and what fits is timed."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fastgrpo.costs.counting import EncoderCost, ModelCost, count_encoders, count_model
from fastgrpo.costs.memory import (
    CPU_MICRO_BATCH,
    Iteration,
    beside_a_pass,
    candidates,
    choose_gradient_checkpointing,
    choose_offload,
    choose_shard,
    iteration_of,
    memory_lines,
    memory_plan,
    predicted_micro_batch,
)
from fastgrpo.costs.rates import device_name, seconds_of
from fastgrpo.engine.record import EngineRecord, Say
from fastgrpo.grpo.steps import passes_per_iteration, rollout_schedule
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Description
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.devices import is_on
from fastgrpo.system.distributed import Ranks

GRANULE = 8
"""Above this many pairs only multiples of it are tried."""
_TOLERANCE = 0.02  # a micro-batch this much slower than the fastest counts as equally fast: timings vary by that
_TIMED = 4  # sizes that are timed: each needs passes of its own
_REPEATS = 3

RunPass = Callable[[int], object]
"""Runs one forward and backward pass of n pairs."""
FindMicroBatch = Callable[[RunPass, int, Callable[[int], object], bool], int]
"""(runs a pass, the settled size or 0, is told the size that is expected before any is tried, whether there is gradient
checkpointing) -> the size to use."""


@dataclass(frozen=True)
class MicroBatchChoice:
    """A micro-batch found by measurement. A resumed run takes it over, since another size rounds differently.

    size: pairs. largest: the largest that fit. seconds: (size, seconds of forward and backward pass) of those timed,
    neither compiled nor captured, which takes too long for several sizes.
    """

    size: int
    largest: int
    seconds: tuple[tuple[int, float], ...]

    def line(self) -> str:
        """For the start-up print: what was chosen and why."""
        timed = ", ".join(f"{size}: {1e3 * took / size:.1f} ms a pair" for size, took in self.seconds)
        found = f"micro-batch of {self.size} pairs; {self.largest} is the largest tried that fits"
        return f"{found}; timed uncompiled {timed}"


@dataclass(frozen=True)
class MicroBatchFinder:
    """A `FindMicroBatch`: takes the settled size, else 32 on a CPU. On CUDA it measures, and says why."""

    config: TrainConfig
    description: Description
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    say: Say

    def __call__(
        self, run: RunPass, settled: int, expect: Callable[[int], object], gradient_checkpointing: bool = False
    ) -> int:
        config = self.config
        if self.device.type == "cpu":
            return settled or CPU_MICRO_BATCH
        kernels = is_on(config.engine.kernels, self.device)
        model = count_model(self.description, config.model, self.dtype, kernels, gradient_checkpointing)
        encoders, _ = count_encoders(config.reward)
        if settled:
            says = "micro_batch says" if settled == config.micro_batch else "the run had them before"
            size, why = settled, f"micro-batch of {settled} pairs, as {says}"
        else:
            choice = self._measure(run, expect, model, encoders)
            size, why = int(self.ranks.agree(str(choice.size))), choice.line()
        plan = memory_plan(config, model, encoders, self.dtype, self.ranks.count, size)
        for line in (*memory_lines(plan, str(self.device)), why):
            self.say(line)
        return size

    def _measure(
        self, run: RunPass, expect: Callable[[int], object], model: ModelCost, encoders: Mapping[str, EncoderCost]
    ) -> MicroBatchChoice:
        config, processes = self.config, self.ranks.count
        room = memory_room(self.device, config.engine.memory)
        schedule = rollout_schedule(self.description.scheduler, config, torch.device("cpu"))
        passes, checkpointing = passes_per_iteration(config, schedule), model.gradient_checkpointing
        work = iteration_of(config, len(schedule), passes, processes, checkpointing)
        predicted = predicted_micro_batch(config, model, encoders, self.dtype, processes, room, candidates(work))
        predicted = int(self.ranks.agree(str(predicted)))  # room may differ by process, attention may not
        expect(predicted)
        alone = room - beside_a_pass(config, model, encoders, self.dtype, processes)
        return find_micro_batch(fits_within(run, self.device, alone), timed(run, self.device), work, predicted)


def decide_gradient_checkpointing(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> tuple[bool, str]:
    """Returns whether passes have gradient checkpointing, the same on all processes, and a line that says why.

    On CUDA `auto` asks the memory plan of one pair at once; one process that is short of memory decides for all.
    """
    asks = config.engine.gradient_checkpointing == "auto"
    return _decide(choose_gradient_checkpointing, "gradient checkpointing", asks, config, device, dtype, ranks)


def decide_offload(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, ranks: Ranks, record: EngineRecord
) -> tuple[bool, str]:
    """Returns whether what the UNet's passes do not need is kept in the host's memory, and a line that says why.

    As `decide_gradient_checkpointing`; `auto` does what the run has done before where as much of this kind of device
    may be filled, on a CPU never.
    """
    if device.type == "cpu":
        return False, "offloading is off: a CPU's memory is the host's"
    before = (record.settings or {}).get("engine.offload")
    if config.engine.offload == "auto" and before and _is_as_before(config, device, record):
        return before == "on", f"offloading is {before}, as the run had it before"
    return _decide(choose_offload, "offloading", config.engine.offload == "auto", config, device, dtype, ranks)


def _decide(
    choose: Callable[..., tuple[bool, str]],
    what: str,
    asks: bool,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> tuple[bool, str]:
    """What `choose` says of the memory here, or, where one process has too little, for all. asks: whether it looks."""

    def count(gradient_checkpointing: bool) -> ModelCost:
        kernels = is_on(config.engine.kernels, device)
        return count_model(describe(config.model), config.model, dtype, kernels, gradient_checkpointing)

    measured = asks and device.type == "cuda"
    room = memory_room(device, config.engine.memory) if measured else None
    encoders = count_encoders(config.reward)[0] if measured else {}
    on, why = choose(config, count, encoders, dtype, ranks.count, room)
    if measured and ranks.any(on) and not on:
        return True, f"{what} is on, as another process has less memory"
    return on, why


def decide_shard(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, ranks: Ranks, record: EngineRecord
) -> tuple[Literal["none", "optimizer"], str]:
    """Returns what the processes share out, the same on all of them, and a line that says why; "" where it is plain.

    `auto` goes on with the record's decision for as many processes on such a device. Otherwise on CUDA it asks the
    memory plan; one process that is short of memory decides for all.
    """

    def count(gradient_checkpointing: bool) -> ModelCost:
        kernels = is_on(config.engine.kernels, device)
        return count_model(describe(config.model), config.model, dtype, kernels, gradient_checkpointing)

    before = (record.shard or {}).get(str(ranks.count))
    if config.engine.shard == "auto" and before is not None and _is_as_before(config, device, record):
        return before, f"sharded: {before}, as the run had it before"
    measured = config.engine.shard == "auto" and device.type == "cuda" and ranks.count > 1
    room = memory_room(device, config.engine.memory) if measured else None
    encoders = count_encoders(config.reward)[0] if measured else {}
    shard, why = choose_shard(config, count, encoders, dtype, ranks.count, room)
    if measured and ranks.any(shard == "optimizer") and shard == "none":
        return "optimizer", "sharded: optimizer, as another process has less memory"
    return shard, why


def _is_as_before(config: TrainConfig, device: torch.device, record: EngineRecord) -> bool:
    """Whether a record is of this kind of device, and of the same share of it that may be filled."""
    return (device_name(device), config.engine.memory) == (record.device, (record.settings or {}).get("engine.memory"))


def largest_micro_batch(fits: Callable[[int], bool], limit: int, predicted: int, sizes: Sequence[int] = ()) -> int:
    """The largest micro-batch that fits, found with few tries: from `predicted` doubling or halving, then between.

    fits: tries a size, none twice. limit: the largest worth trying. sizes: the only ones tried; without, all up to 8,
    then multiples of 8. What is returned did fit, even where fitting is not monotone.
    Raises torch.OutOfMemoryError where none does.
    """
    sizes = sorted(size for size in sizes or (*range(1, GRANULE), *range(GRANULE, limit + 1, GRANULE)) if size <= limit)
    good, bad = -1, len(sizes)  # positions: of the largest that fits, of the smallest beyond that does not

    def position(size: float) -> int:
        """Of the largest that is at most `size`, between good and bad."""
        return min(max(sum(other <= size for other in sizes) - 1, good + 1), bad - 1)

    here = position(predicted)
    while bad - good > 1:
        good, bad = (here, bad) if fits(sizes[here]) else (good, here)
        if good < 0:
            here = position(sizes[bad] / 2)
        elif bad == len(sizes):
            here = position(sizes[good] * 2)
        else:
            here = (good + bad) // 2
    if good < 0:
        raise torch.OutOfMemoryError("not even the smallest micro-batch fits into the GPU's memory")
    return sizes[good]


def choose_size(seconds: Mapping[int, float], work: Iteration) -> int:
    """The smallest micro-batch that makes an iteration as fast as any, to 2 %.

    seconds: micro-batch -> of one forward and backward pass.
    """
    took = {size: each * work.passes(size) for size, each in seconds.items()}
    return min(size for size in took if took[size] <= min(took.values()) * (1 + _TOLERANCE))


def find_micro_batch(
    fits: Callable[[int], bool], seconds: Callable[[int], float], work: Iteration, predicted: int
) -> MicroBatchChoice:
    """Time the largest micro-batch that fits and the next smaller ones, and choose. Raises torch.OutOfMemoryError.

    fits, seconds: of a micro-batch, for instance `fits_within` and `timed`.
    """
    sizes = candidates(work)
    largest = largest_micro_batch(fits, sizes[-1], predicted, sizes)
    took = {size: seconds(size) for size in [size for size in sizes if size <= largest][-_TIMED:]}
    return MicroBatchChoice(choose_size(took, work), largest, tuple(took.items()))


def fits_within(run: Callable[[int], object], device: torch.device, room: int) -> Callable[[int], bool]:
    """Tells whether a forward and backward pass of n pairs, which `run(n)` does, stays within `room` bytes.

    All that the allocator has reserved counts, not only what is in use: others cannot have its holes.
    """

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run(size)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_reserved(device) <= room

    return fits


def timed(
    run: Callable[[int], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """Seconds that `run(n)` takes: the median of three calls after one that does not count."""
    return lambda size: statistics.median(
        [seconds_of(partial(run, size), device, clock) for _ in range(_REPEATS + 1)][1:]
    )


def memory_room(device: torch.device, share: float) -> int:
    """Bytes that this process may reserve if `share` of the CUDA device's memory is to be filled, others' included."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(share * total) - others
