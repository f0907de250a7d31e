"""What `python -m fastgrpo.train` does: from a config to a run's folder, one iteration after the other."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.assembly import Training, load_training
from fastgrpo.costs.profile import profiled
from fastgrpo.costs.throughput import Accounting, count_and_measure, memory_peak, rollout_rows, update_rows
from fastgrpo.engine.record import EngineRecord
from fastgrpo.prompts import embed, truncation_lines
from fastgrpo.rewards.axis.report import axis_report
from fastgrpo.rewards.steering import reward_metrics
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.rollout import rollout
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import TrainerState, library_versions
from fastgrpo.run.folder import StopSignal, claim, keep_evidence, new_folder
from fastgrpo.run.inputs import changed_inputs, input_digests
from fastgrpo.run.metrics import Stopwatch
from fastgrpo.run.recorder import Journal
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console, complain, memory_full, reason
from fastgrpo.system.distributed import Ranks, join
from fastgrpo.system.finite import BrokenPicture
from fastgrpo.system.randomness import generator_for
from fastgrpo.system.workers import available_cores
from fastgrpo.types import NEGATIVE
from fastgrpo.update import update


def start(config: TrainConfig, preset: str, resumed: Path | None) -> int:
    """Train, in the folder of the config, a new one or the one to resume. Returns the exit code.

    preset: the name of a folder that the config does not name. Raises ConfigError, and KeyboardInterrupt where no iteration was begun.
    """
    run: Path | None = None
    try:
        with join(config.engine.device) as ranks:
            run = resumed or Path(config.run or ranks.agree(str(new_folder(preset)) if ranks.first else ""))
            claimed = claim(run, resumed is not None) if ranks.first else nullcontext()
            with claimed, StopSignal(ranks.count) as stop:
                ranks.agree("the folder is ours")
                console = Console(quiet=not ranks.first, every_phase=True)
                return train(config, run, console, ranks, stop)
    except FloatingPointError as error:
        return _fail(f"{error}; {_kept(run)}")
    except BrokenReward as error:
        return _fail(f"{error}; {_evidence(run, error)}")
    except BrokenPicture as error:
        return _fail(f"{error.sentence('engine.dtype')}; {_evidence(run, error)}; {_kept(run)}")
    except (RuntimeError, MemoryError) as error:
        if not (full := memory_full(error)):
            raise
        return _fail(f"{full}: lower micro_batch, rollout.batch, rollout.decode_batch or reward.batch; {_kept(run)}")
    except OSError as error:
        return _fail(f"{reason(error)}; {_kept(run)}")


def _fail(sentence: str) -> int:
    complain(sentence)
    return 1


def _kept(run: Path | None) -> str:
    """What there is to go on from."""
    newest = checkpoint.newest(run) if run else None
    return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _evidence(run: Path, error: BrokenReward | BrokenPicture) -> str:
    """Where prompt and image are now."""
    try:
        record, image = keep_evidence(run, error)
    except OSError as trouble:
        return f"prompt and image cannot be kept: {reason(trouble)}"
    return f"prompt and image are in {record} and {image.name} beside it"


def train(config: TrainConfig, run: Path, console: Console, ranks: Ranks, stop: StopSignal) -> int:
    """Train in `run`, a claimed folder, from its newest checkpoint or the beginning. Returns the exit code."""
    with console.waiting("loading"):
        newest = checkpoint.latest(run)
        start = checkpoint.read_state(newest) if newest else _beginning(config, ranks)
        threads = config.engine.threads or start.threads
        parts = load_training(config, threads, ranks, EngineRecord(**start.engine), console.say)
        accounting = count_and_measure(config, policy=parts.policy)
        console.say(accounting.rates.line())
        inputs = input_digests(config, parts) if ranks.first else {}
        _introduce(parts, config, run, start, console)
        console.say(*_differences(config, start, inputs, ranks))
    journal = Journal(run, config, parts, start, threads, inputs, console) if ranks.first else None
    if newest:
        checkpoint.load(newest, parts.trainable)
    embeds: dict[str, Tensor] = {}
    memory_peak(parts.policy.device)  # what the start needed does not count

    finished, stopped = start.iteration, False
    stop.begin_iterations()
    while finished < config.iterations and not stopped:
        with profiled(run, ranks.first and finished + 1 == config.engine.profile):
            values = iterate(parts, config, finished + 1, embeds, console, accounting)
        finished += 1
        if journal:
            journal.write(finished, values)
        stopped = ranks.any(stop.requested)
        if journal:
            journal.save(finished, stopped)
    if journal:
        journal.close(finished)
    return 0 if finished == config.iterations else stop.exit_code


def iterate(
    parts: Training,
    config: TrainConfig,
    iteration: int,
    embeds: dict[str, Tensor],
    console: Console,
    accounting: Accounting | None = None,
) -> dict[str, float]:
    """Iteration number `iteration` (from 1), top to bottom. Returns its metrics.

    embeds: text -> embedding, kept from one iteration to the next. accounting: turns passes into TFLOP/s; None leaves that out.
    """
    policy, ranks, watch = parts.policy, parts.ranks, Stopwatch(parts.policy.device)
    rollout_rng = generator_for(config.seed, iteration, "rollout", policy.device)
    update_rng = generator_for(config.seed, iteration, "update", "cpu")
    keep_means = config.grpo.ratio_norm and parts.engine.old_log_prob == "rollout"

    for group in parts.trainable.optimizer.param_groups:
        group["lr"] = learning_rate(config, iteration)
    drawn = parts.source.batch(iteration - 1)
    prompts = embed(policy, drawn[ranks.share(len(drawn))], embeds)
    scored: list[dict[str, Tensor]] = []

    def score(part: slice, images: Tensor) -> None:
        scored.append(parts.reward.score(images, prompts.prompts[part], config.group_size))

    early = parts.engine.scores_early(len(prompts) * config.group_size)
    with watch("rollout"), console.bar("rollout") as bar:
        trajectory = rollout(
            parts.engine,
            prompts,
            config.rollout,
            config.group_size,
            rollout_rng,
            keep_means=keep_means,
            ranks=ranks,
            progress=bar.reach,
            score=score if early else None,
            when=f"iteration {iteration}, ",
        )
    with watch("reward"), console.bar("reward"):
        if not early:
            score(slice(None), trajectory.images)
        together = {name: ranks.gather(torch.cat([each[name] for each in scored])) for name in scored[0]}
        rewards = parts.reward.combine(together)
    with watch("update"), console.bar("update") as bar:
        stats = update(
            parts.engine,
            prompts,
            trajectory,
            rewards,
            parts.trainable,
            config,
            iteration,
            update_rng,
            ranks=ranks,
            progress=bar.reach,
        )
    negative = torch.tensor([prompt.label == NEGATIVE for prompt in drawn])
    values = reward_metrics(rewards, negative) | stats.values | watch.metrics(images=rewards.total.numel())
    if accounting:
        work = {"rollout": rollout_rows(config, len(trajectory.images), early), "update": update_rows(config, stats)}
        values |= accounting.metrics(work, watch.seconds, rewards.total.numel()) | memory_peak(policy.device)
    return values | {"optim/lr": learning_rate(config, iteration)}


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """The learning rate of iteration number `iteration`, from 1.

    Iteration i of W warm-up iterations has i / W of `lr`. Of the others `linear` and `cosine` fall from `lr` in the
    first to what would be 0 after the last.
    """
    optim = config.optim
    if iteration <= optim.warmup:
        return optim.lr * iteration / optim.warmup
    progress = (iteration - 1 - optim.warmup) / (config.iterations - optim.warmup)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return optim.lr * factors[optim.schedule]


def _beginning(config: TrainConfig, ranks: Ranks) -> TrainerState:
    return TrainerState(0, config.seed, 0.0, available_cores(), library_versions(), processes=ranks.count)


def _introduce(parts: Training, config: TrainConfig, run: Path, start: TrainerState, console: Console) -> None:
    """Say what is about to happen, and where steering leaves the prompts."""
    policy, trainable = parts.policy, parts.trainable
    weights = sum(parameter.numel() for parameter in policy.unet.parameters())
    trained = sum(parameter.numel() for parameter in trainable.parameters.values())
    where = f"{policy.workers.count} CPU threads" if policy.device.type == "cpu" else f"{policy.device}"
    console.say(
        f"run {run}",
        f"UNet of {weights:,} parameters, {trained:,} trained, on {where}, {policy.dtype}"
        + (f", {parts.ranks.count} processes" if parts.ranks.count > 1 else ""),
        f"{config.prompts_per_iteration} prompts x {config.group_size} images an iteration, seed {config.seed}",
    )
    if parts.source.warning:
        console.say(f"warning: {parts.source.warning}")
    steering = parts.reward.steering
    texts = [prompt.text for prompt in parts.prompts]
    console.say(*truncation_lines(texts, policy.tokenizer, steering.encoder.tokenizer if steering else None))
    if steering:
        report = axis_report(steering, parts.prompts)
        console.say(*report.lines())
        if report.warning:
            console.say(f"warning: {report.warning}")
    if start.iteration:
        console.say(f"resuming after iteration {start.iteration} of {config.iterations}")


def _differences(config: TrainConfig, start: TrainerState, inputs: Mapping[str, str], ranks: Ranks) -> list[str]:
    """Warnings of what is not as it was when the checkpoint was made."""
    lines = []
    if start.versions != library_versions():
        lines.append(
            f"warning: the checkpoint was made with {start.versions}; results will not be bit for bit the same"
        )
    if start.processes != ranks.count:
        lines.append(f"warning: the checkpoint is of {start.processes} processes; sums will be rounded otherwise")
    lines += [
        f"warning: {name} is another than until iteration {start.iteration}, and so is what is learned from here on"
        for name in changed_inputs(start.inputs, inputs)
    ]
    if start.iterations not in (0, config.iterations) and config.optim.schedule != "constant":
        lines.append(
            f"warning: with {config.iterations} iterations instead of {start.iterations}, optim.schedule "
            f"{config.optim.schedule} goes on at {learning_rate(config, start.iteration + 1):.3g}, as if there had been "
            "so many from the start; what was learned until here followed the shorter one"
        )
    return lines
