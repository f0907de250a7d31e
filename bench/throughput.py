"""Whole iterations, measured: ours beside the plain trainer's, and the ladder from one to the other.

Every iteration is a row of its own, written when it is done. On a CPU trainings take turns, so that what else the
machine does meets them all; on CUDA, where two would not fit, one comes after the other.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from baseline import BATCH, PLAIN, Techniques
from measure import CUDA, DEVICE, free, host_waits, seconds_of
from throughput_table import counted
from workload import Ours, Plain, Trainer, altered, ours, paper, plain, shapes

from fastgrpo.costs.throughput import Accounting, Rows, rollout_rows
from fastgrpo.engine.graphs import no_host_sync
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.setup import CPU_AGREEMENT
from fastgrpo.grpo.micro_batch import Experience, Remembered
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.prompts import embed
from fastgrpo.rollout import rollout
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.randomness import generator_for
from fastgrpo.system.workers import available_cores
from fastgrpo.types import Trajectory

Builder = Callable[[], Trainer]

RATES_OF = (1, 1) if CUDA else (available_cores(), 10)
"""For `accounting_of`: cores that multiply and copy side by side, and how often."""

KEPT = ("time/", "throughput/", "memory/", "reward/mean", "ratio/max_abs_dev_first")
"""What is kept of an iteration's metrics: names that begin so."""


# ---------------------------------------------------------------------------------------------------------------------
# The step


def step_config() -> TrainConfig:
    """On a CPU a quarter of the preset's iteration: 3 of 12 prompts, 1 of 4 optimizer steps, 24 images, 192 pairs."""
    return paper() if CUDA else altered(shapes(prompts=3), updates_per_iteration=1)


def about() -> dict[str, Any]:
    """What step.json says of the iterations in it."""
    config = step_config()
    return {
        "what": "SD 1.5 at 512 x 512, random weights" if CUDA else "preset shapes, a quarter of an iteration",
        "steps": config.rollout.steps,
        "updates": config.updates_per_iteration,
    }


def one_prompt(config: TrainConfig) -> TrainConfig:
    """With the images of one of its prompts, and as many pairs in an optimizer step."""
    updates = max(1, config.updates_per_iteration // config.prompts_per_iteration)
    return altered(config, prompts_per_iteration=1, updates_per_iteration=updates)


def step_trainings(config: TrainConfig) -> dict[str, Builder]:
    """The plain trainer's time is proportional to the images: on CUDA it draws those of one prompt.

    On a CPU PyTorch's default is a thread for each core; so small a UNet may run faster with one, so both are measured.
    """
    if CUDA:
        return {"fastgrpo": lambda: ours(config), "plain": lambda: plain(one_prompt(config))}
    threads = sorted({1, available_cores()})
    return {"fastgrpo": lambda: ours(config)} | {
        f"plain, {counted(count, 'thread')}": lambda count=count: plain(config, threads=count) for count in threads
    }


# ---------------------------------------------------------------------------------------------------------------------
# The ladder


@dataclass(frozen=True)
class Rung:
    """A row of the ladder: what it adds to the row before. engine: our settings; None: the plain trainer, `techniques`.

    workers: of ours on a CPU, where all rows before those have one thread: the small UNet gains nothing from two.
    where: the devices that have it.
    """

    name: str
    techniques: Techniques = PLAIN
    engine: Mapping[str, Any] | None = None
    workers: int = 0
    where: tuple[str, ...] = ("cuda", "cpu")


_OFF = {
    "kernels": "off", "attention": "sdpa", "compile": "off", "graphs": "off", "reuse": "off", "overlap": False,
}  # fmt: skip


def ladder(batch: int) -> tuple[Rung, ...]:
    """From the plain trainer to the engine, one technique a row, each with all before it.

    batch: pairs in a pass from row 2 on.
    """
    rungs = [
        Rung("the plain trainer"),
        Rung("pairs of any steps in large micro-batches", Techniques(batch)),
        Rung("step operators on the device", Techniques(batch, operators=True)),
        Rung("rewards in batches on the device", Techniques(batch, operators=True, rewards=True)),
        Rung("channels_last, half-precision working copy, flat AdamW", engine=_OFF, where=("cuda",)),
        Rung("channels_last, flat AdamW", engine=_OFF, workers=1, where=("cpu",)),
        Rung("a share of the batch for each core", engine=_OFF, where=("cpu",)),
    ]
    engine = dict(_OFF)
    for name, change, where in (
        ("own kernels for norms and activations", {"kernels": "on"}, ("cuda",)),
        ("attention chosen by measurement", {"attention": "auto"}, ("cuda",)),
        ("torch.compile", {"compile": "on"}, ("cuda",)),
        ("CUDA graphs", {"graphs": "on"}, ("cuda",)),
    ):
        if DEVICE.type in where:
            engine |= change
        rungs.append(Rung(name, engine=dict(engine), where=where))
    return tuple(rung for rung in rungs if DEVICE.type in rung.where)


def ladder_config() -> TrainConfig:
    """On CUDA 7 of 50 steps, 6 of them learned from, in 2 updates of 192 pairs: `whole` says what 50 steps take."""
    if CUDA:
        return altered(paper(), rollout__steps=7, updates_per_iteration=2, micro_batch=16)
    return step_config()


def rung_training(rung: Rung, config: TrainConfig) -> Trainer:
    if rung.engine is None:
        if CUDA:  # as in the step
            config = altered(config, prompts_per_iteration=1, updates_per_iteration=1)
        return plain(config, rung.techniques, threads=1)
    return ours(altered(config, **{f"engine__{name}": value for name, value in rung.engine.items()}), rung.workers)


@dataclass(frozen=True)
class Whole:
    """What an iteration takes, an image: seconds, and FLOP in rollout and update."""

    rollout: float
    reward: float
    update: float
    rollout_flop: float
    update_flop: float

    @staticmethod
    def of(training: Trainer, values: Mapping[str, float], target: TrainConfig, accounting: Accounting) -> "Whole":
        """Of an iteration of `target`, from one with fewer steps.

        A rollout's passes and an update's grow with the steps, decoding and scoring do not. Where the steps are as
        many, these are the measured seconds.
        """
        config = training.config
        images = config.prompts_per_iteration * config.group_size
        steps = target.rollout_steps / config.rollout_steps
        pairs = learned_steps(target) / learned_steps(config)
        decoding = 0.0 if steps == 1 else decode_seconds(training)
        passes = target.rollout.halves * learned_steps(target)
        base = passes if target.grpo.kl > 0 else 0
        return Whole(
            rollout=((values["time/rollout_s"] - decoding) * steps + decoding) / images,
            reward=values["time/reward_s"] / images,
            update=values["time/update_s"] * pairs / images,
            rollout_flop=accounting.flop(rollout_rows(target, 1)),
            update_flop=accounting.flop(Rows(forward=base, forward_backward=passes)),
        )

    def row(self, rate: float) -> dict[str, float]:
        """rate: FLOP/s of the device's matrix products."""
        rollout, update = self.rollout_flop / self.rollout, self.update_flop / self.update
        return {
            "images_per_s": 1 / (self.rollout + self.reward + self.update),
            "rollout_tflops": rollout / 1e12,
            "rollout_share": rollout / rate,
            "update_tflops": update / 1e12,
            "update_share": update / rate,
        }


def learned_steps(config: TrainConfig) -> int:
    """Steps of a sample that are learned from; none of the last ones is deterministic."""
    return config.rollout.steps - config.grpo.drop_last_steps


def decode_seconds(training: Trainer) -> float:
    """Of the latents of one iteration, in the batches that the training decodes."""
    config, policy = training.config, training.policy
    images = config.prompts_per_iteration * config.group_size
    plain_size = training.baseline.techniques.batch or BATCH if isinstance(training, Plain) else 0
    size = plain_size or config.rollout.decode_batch
    latents = torch.randn(images, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return seconds_of(lambda: policy.decode(latents, size))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def iterations(
    builders: Mapping[str, Builder],
    repeats: int,
    accounting: Accounting,
    failed: Callable[[str, str], object],
    in_time: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[str, Trainer, dict[str, Any]]]:
    """(name, training, row) of every iteration that is kept: `repeats` of each.

    On a CPU the trainings exist side by side and take turns, after an iteration each that is not kept. On CUDA they
    come one after the other and all iterations are: the row of one that also compiles and captures says `first`.
    failed: told which training could not go on there, and why; the next ones are measured. in_time: whether to go on.
    """
    if not CUDA:
        trainings = {name: build() for name, build in builders.items()}
        for number in range(repeats + 1):
            for name, training in trainings.items():
                row = row_of(name, training, number + 1, accounting)
                if number:
                    yield name, training, row
        return
    for name, build in builders.items():
        if not in_time():
            failed(name, "no time was left")
            continue
        try:
            training = build()
            for number in range(repeats):
                row = row_of(name, training, number + 1, accounting)
                yield name, training, row | ({} if number else {"first": True})
        except (RuntimeError, ConfigError, ImportError) as error:  # out of memory too
            failed(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        training = None
        free()


def row_of(name: str, training: Trainer, number: int, accounting: Accounting) -> dict[str, Any]:
    """What is kept of iteration `number` of a training, which is run for it."""
    training.use_threads()
    if CUDA:  # what the start needed, such as the search for a micro-batch, is not the iteration's
        torch.cuda.reset_peak_memory_stats()
    values = training.iterate(number, accounting)
    images = training.config.prompts_per_iteration * training.config.group_size
    return {
        "name": name,
        "images": images,
        "values": {key: value for key, value in values.items() if key.startswith(KEPT)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checks of a training that has run an iteration


@dataclass(frozen=True)
class Check:
    """What is to hold, whether it does, and what was seen."""

    name: str
    holds: bool
    seen: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def checks(training: Ours, in_time: Callable[[], bool] = lambda: True) -> Iterator[Check]:
    """On CUDA: nothing waits for the device in a rollout or a micro-batch, by PyTorch's own watch and in a trace.

    Elsewhere the passes run all the same, and there is nothing to wait for. in_time: whether another may begin.
    """
    if not in_time():
        return
    with _few_steps(training.loaded.engine):
        stages = _Stages(training)
        for name, call in (("rollout", stages.rollout), ("micro-batches", stages.learn)):
            try:
                with no_host_sync():
                    call()
                yield Check(f"no wait for the device in {name}", True, "none raised")
            except RuntimeError as error:
                yield Check(f"no wait for the device in {name}", False, " ".join(str(error).split())[:200])
            waits = host_waits(call)
            seen = ", ".join(f"{count} x {event}" for event, count in waits.items()) or "none in the trace"
            yield Check(f"no wait for the device in a trace of {name}", not waits, seen)
            if not in_time():
                return


def ratio_check(apart: float) -> Check:
    """apart: how far from 1 a ratio was before the first optimizer step."""
    allowed = 0.0 if CUDA else CPU_AGREEMENT
    return Check(
        f"the ratio is 1 before the first optimizer step, within {allowed:g}", apart <= allowed, f"{apart:.1e}"
    )


def memory_check(planned: float, measured: float, compiled: bool) -> Check:
    """planned, measured: GB at most during an iteration.

    The plan counts plain calls: compiled ones save less, never more.
    """
    off = measured / planned - 1
    name = "peak memory at most 5% above the plan" if compiled else "peak memory as planned, within 5%"
    holds = off <= 0.05 and (compiled or off >= -0.05)
    return Check(name, holds, f"{planned:.2f} GB planned, {measured:.2f} ({off:+.1%})")


@contextmanager
def _few_steps(engine: Passes, count: int = 4) -> Iterator[None]:
    """The engine's rollouts take the first steps alone, which is all there is to see.

    Captured graphs serve as they are.
    """
    loss, schedule = engine.loss, engine.schedule
    few = {name: getattr(schedule, name)[:count] for name in ("timesteps", "trainable")}
    first = replace(schedule, tables=schedule.tables[:, :count].contiguous(), **few)
    engine.loss = replace(loss, schedule=first)
    try:
        yield
    finally:
        engine.loss = loss


class _Stages:
    """The rollout of an iteration, and micro-batches of its pairs, by themselves."""

    def __init__(self, training: Ours):
        self._training, parts = training, training.loaded
        self._prompts = embed(parts.policy, parts.source.batch(0), parts.embeds)
        self._trajectory = self.rollout()
        count, steps = self._trajectory.samples, self._trajectory.steps
        # Two full micro-batches and a rest.
        chosen = torch.randperm(count * steps, generator=torch.Generator().manual_seed(0))
        chosen = chosen[: 2 * parts.engine.micro_batch + 1]
        self._pairs = Pairs((chosen % count).to(DEVICE), (chosen // count).to(DEVICE))
        self.learn()

    def rollout(self) -> Trajectory:
        parts, config = self._training.loaded, self._training.config
        generator = generator_for(config.seed, 1, "rollout", DEVICE)
        return rollout(parts.engine, self._prompts, generator)

    def learn(self) -> None:
        engine = self._training.loaded.engine
        config = self._training.config
        rewards = torch.rand(len(self._prompts), config.group_size, device=DEVICE)
        experience = Experience.of(self._prompts, self._trajectory, rewards, config.grpo)
        engine.learn(self._pairs, experience, Remembered.of(self._trajectory, ratio_norm=False), weight=1.0)
        engine.clear()
