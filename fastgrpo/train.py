"""`python -m fastgrpo.train`: from the command line to a run's folder, one iteration after the other."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo import checkpoint
from fastgrpo.checkpoint import TrainerState, library_versions
from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.console import Console
from fastgrpo.engine.workers import available_cores
from fastgrpo.exam import Exam
from fastgrpo.files import write_atomically
from fastgrpo.grpo.update import pair_count, update
from fastgrpo.metrics import MetricsLog, Stopwatch
from fastgrpo.parts import Parts, load_parts
from fastgrpo.prompts import embed
from fastgrpo.randomness import generator_for
from fastgrpo.report import write_report
from fastgrpo.rewards.axis import axis_report
from fastgrpo.rewards.steering import reward_metrics
from fastgrpo.rollout import rollout
from fastgrpo.run import StopSignal, claim
from fastgrpo.settings import PROGRAM, dump_toml, parse_command


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0 done, 1 diverged, 2 refused, 130 or 143 stopped."""
    try:
        config, preset, resumed = parse_command(sys.argv[1:] if argv is None else argv)
        run = resumed or Path(config.run or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        with StopSignal() as stop, claim(run, resumed is not None):
            return train(config, run, stop, Console())
    except ConfigError as error:
        print(f"fastgrpo: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"fastgrpo: {error}; the checkpoints in {run / 'checkpoints'} are from before.", file=sys.stderr)
        return 1


def train(config: TrainConfig, run: Path, stop: StopSignal, console: Console) -> int:
    """Train in `run`, a claimed folder, from its newest checkpoint or the beginning. Returns the exit code."""
    began = time.monotonic()
    newest = checkpoint.latest(run)
    start = checkpoint.read_state(newest) if newest else _beginning(config)
    threads = config.engine.threads or start.threads
    torch.set_num_threads(1)  # each of the policy's workers is a thread already
    parts = load_parts(config, threads)
    # Without its own name: the folder may be moved, and the file may be the start of another run.
    write_atomically(run / "config.toml", dump_toml(dataclasses.replace(config, run="")).encode())
    _introduce(parts, config, run, start, console)

    exam = Exam(run, config, parts, console)
    before = exam.before()  # always with the weights as they were loaded
    if newest:
        checkpoint.load(newest, parts.policy.unet, parts.optimizer)
    log = MetricsLog(run, start.iteration)
    log.chart(0, before)
    embeds: dict[str, Tensor] = {}

    finished, stopped = start.iteration, stop.requested
    while finished < config.iterations and not stopped:
        values = iterate(parts, config, finished + 1, embeds, console)
        values |= _examine(exam, config, finished + 1)
        finished += 1
        seconds = start.seconds + time.monotonic() - began
        log.write(finished, seconds, values)
        console.iteration(finished, config.iterations, seconds, values)
        stopped = stop.requested
        if stopped or finished % config.checkpoint.every == 0 or finished == config.iterations:
            state = TrainerState(finished, config.seed, seconds, threads, library_versions())
            checkpoint.save(run, parts.policy.unet, parts.optimizer, state, config.checkpoint.keep)
    log.close()

    if finished < config.iterations:
        console.say(f"Stopped after {finished} iterations. To go on: {PROGRAM} --resume {run}")
        return stop.exit_code
    _conclude(exam, config, run, console)
    return 0


def iterate(
    parts: Parts, config: TrainConfig, iteration: int, embeds: dict[str, Tensor], console: Console
) -> dict[str, float]:
    """Iteration number `iteration` (from 1), top to bottom. Returns its metrics.

    embeds: text -> embedding, kept from one iteration to the next.
    """
    policy, schedule, watch = parts.policy, parts.schedule, Stopwatch(parts.policy.device)
    rollout_rng = generator_for(config.seed, iteration, "rollout", policy.device)
    update_rng = generator_for(config.seed, iteration, "update", "cpu")

    for group in parts.optimizer.param_groups:
        group["lr"] = learning_rate(config, iteration)
    prompts = embed(policy, parts.source.batch(iteration - 1), embeds)
    with watch("rollout"), console.bar("rollout", len(schedule)) as bar:
        trajectory = rollout(
            policy, prompts, schedule, config.rollout, config.group_size, rollout_rng, progress=bar.advance
        )
    with watch("reward"), console.bar("reward"):
        rewards = parts.reward(trajectory.images, prompts.prompts, config.group_size)
    with watch("update"), console.bar("update", pair_count(schedule, config)) as bar:
        stats = update(
            policy,
            prompts,
            trajectory,
            rewards,
            schedule,
            parts.optimizer,
            config,
            update_rng,
            base_unet=parts.base_unet,
            progress=bar.advance,
        )
    values = reward_metrics(rewards, prompts.negative) | stats.values | watch.metrics(images=trajectory.samples)
    return values | {"optim/lr": learning_rate(config, iteration)}


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """The learning rate of iteration number `iteration`, from 1."""
    if config.optim.schedule == "constant":
        return config.optim.lr
    return config.optim.lr * (1 - (iteration - 1) / config.iterations)


def _beginning(config: TrainConfig) -> TrainerState:
    return TrainerState(0, config.seed, 0.0, available_cores(), library_versions())


def _examine(exam: Exam, config: TrainConfig, iteration: int) -> dict[str, float]:
    """eval/* and time/eval_s after an iteration that is evaluated; nothing after the others."""
    began = time.monotonic()
    if iteration == config.iterations:
        values = exam.after()
    elif config.eval.every and iteration % config.eval.every == 0:
        values = exam.between(iteration)
    else:
        return {}
    return values | {"time/eval_s": time.monotonic() - began}


def _introduce(parts: Parts, config: TrainConfig, run: Path, start: TrainerState, console: Console) -> None:
    """Say what is about to happen, and where steering leaves the prompts."""
    policy = parts.policy
    weights = sum(parameter.numel() for parameter in policy.unet.parameters())
    console.say(
        f"run {run}",
        f"UNet of {weights:,} parameters on {policy.device}, {policy.dtype}, {policy.workers.count} CPU threads; "
        f"{config.prompts_per_iteration} prompts x {config.group_size} images an iteration, seed {config.seed}",
    )
    report = axis_report(parts.reward, parts.prompts)
    console.say(*report.lines())
    if report.warning:
        console.say(f"warning: {report.warning}")
    if start.iteration:
        console.say(f"resuming after iteration {start.iteration} of {config.iterations}")
    if start.versions != library_versions():
        console.say(f"warning: the checkpoint was made with {start.versions}; results will not be bit for bit the same")


def _conclude(exam: Exam, config: TrainConfig, run: Path, console: Console) -> None:
    """The table of before and after, and where the files are."""
    table = exam.table()
    if table:
        console.say(table)
    console.say(
        f"weights   {checkpoint.checkpoint_folder(run, config.iterations) / 'unet'}",
        f"pictures  {run / 'samples' / 'before_after.png'}",
        f"report    {write_report(run)}",
        f"metrics   {run / 'metrics.jsonl'}   (tensorboard --logdir {run / 'tensorboard'})",
    )


if __name__ == "__main__":
    sys.exit(main())
