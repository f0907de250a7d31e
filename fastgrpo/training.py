"""What `python -m fastgrpo.train` does: from a config to a run's folder, one iteration after the other."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.assembly import Training, load_training
from fastgrpo.base_pictures import BasePictures, base_pictures
from fastgrpo.costs.profile import profiled
from fastgrpo.costs.throughput import count_and_measure, memory_peak, rollout_rows, update_rows
from fastgrpo.engine.record import EngineRecord
from fastgrpo.evaluation.during_training import Subject, TrainingEvaluation
from fastgrpo.grpo.branches import tree_of
from fastgrpo.hooks import Hooks, Step
from fastgrpo.prompts import embed
from fastgrpo.rewards.reward import Scoring
from fastgrpo.rewards.steering import reward_metrics
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.rollout import draw_images, rollout
from fastgrpo.run import checkpoint
from fastgrpo.run.failures import explain, kept
from fastgrpo.run.folder import StopSignal, claim, new_folder
from fastgrpo.run.inputs import input_digests
from fastgrpo.run.introduction import differences, introduce
from fastgrpo.run.left_out import LeftOut
from fastgrpo.run.metrics import Stopwatch
from fastgrpo.run.recorder import RunRecorder
from fastgrpo.run.recovery import recover
from fastgrpo.run.unscored import Unscored, all_scored
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console, complain
from fastgrpo.system.distributed import Ranks, join
from fastgrpo.system.pulse import PULSE
from fastgrpo.system.randomness import generator_for
from fastgrpo.system.watchdog import OthersEnded
from fastgrpo.types import NEGATIVE, PromptBatch, Rewards
from fastgrpo.update import update

HALTED = 3
"""Exit code of a training that the guard has stopped."""


def start(config: TrainConfig, preset: str, resumed: Path | None) -> int:
    """Train in the config's folder, a new one named after `preset`, or the one to resume. Returns the exit code.

    Raises ConfigError, and KeyboardInterrupt where no iteration was begun.
    """
    runs: list[Path] = []
    try:
        return begin(config, preset, resumed, found=runs.append)
    except OthersEnded:
        return 1
    except (FloatingPointError, RuntimeError, MemoryError, OSError) as error:
        complain(explain(error, runs[0] if runs else None))
        return 1


def begin(
    config: TrainConfig,
    preset: str,
    resumed: Path | None,
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen)
    quiet: bool = False,
    found: Callable[[Path], object] = lambda run: None,
) -> int:
    """As `start`, but raises what goes wrong. found: told the run's folder. quiet: nothing on the terminal."""
    with join(config.engine.device, config.engine.stuck_after) as ranks:
        run = resumed or Path(config.run or ranks.once("fastgrpo/run", lambda: str(new_folder(preset))))
        found(run)
        if ranks.restarts and not resumed and (run / "config.toml").is_file():
            # torchrun has started all again, by the same command, after one had died (--max-restarts).
            resumed, config = run, replace(load_toml(run / "config.toml"), run=str(run))
        claimed = claim(run, resumed is not None) if ranks.first else nullcontext()
        with claimed, StopSignal(ranks.count) as stop:
            ranks.agree("the folder is ours")
            console = Console(quiet=quiet or not ranks.first, every_phase=True)
            return train(config, run, console, ranks, stop, hooks)


def train(
    config: TrainConfig,
    run: Path,
    console: Console,
    ranks: Ranks,
    stop: StopSignal,
    hooks: Hooks = Hooks(),  # noqa: B008
) -> int:
    """Train in `run`, a claimed folder, from its newest good checkpoint or the beginning. Returns the exit code."""
    with console.waiting("loading"):
        newest = recover(run, ranks)
        start = checkpoint.read_state(newest) if newest else checkpoint.beginning(config, ranks.count)
        threads = config.engine.threads or start.threads
        training = load_training(config, threads, ranks, EngineRecord(**start.engine), console.say, hooks)
        accounting = count_and_measure(config, training.policy)
        training = replace(training, accounting=accounting)
        console.say(accounting.rates.line())
        inputs = input_digests(config, training) if ranks.first else {}
        introduce(training, run, start, console)
        console.say(*differences(config, start, inputs, ranks))
        training.guard.restore(start.guard)
        training.guard.watch(_base_pictures(training, run, console), training.reward.encoder)
    PULSE.kept = kept(run)
    PULSE.begin(start.iteration)
    with PULSE.patiently():
        recorder = RunRecorder(run, config, training, start, threads, inputs, console) if ranks.first else None
        evaluation = TrainingEvaluation(run, config, _subject(training), console, ranks)
        before = evaluation.before()  # of the weights that there are before a checkpoint is loaded
        if recorder:
            recorder.begin(evaluation, before)
    with recorder or nullcontext():
        if newest:
            checkpoint.load(newest, training.trainable)
        memory_peak(training.policy.device)  # what the start needed does not count

        finished, stopped, left_out = start.iteration, False, LeftOut(config, training.ranks, run)
        saved, unscored, enough = finished, None, False
        stop.begin_iterations()
        while finished < config.iterations and not stopped:
            PULSE.begin(finished + 1)
            with profiled(run, ranks.first and finished + 1 == config.engine.profile):
                try:
                    values = iterate(training, finished + 1, console, left_out)
                except Unscored as error:
                    unscored = error
                    break
            finished += 1
            with PULSE.patiently():
                found = evaluation.of(finished)
                if recorder:
                    recorder.write(finished, values, found)
            enough, trouble = _tell(hooks, training, run, finished, values | (found.values if found else {}))
            stopped = stop.agreed(ranks) or training.guard.halts or enough
            if _save(training, recorder, finished, stopped, run):
                saved = finished
            if trouble:
                raise trouble
        if unscored and saved < finished:
            _save(training, recorder, finished, True, run)
        if recorder:
            with PULSE.patiently():
                recorder.close(finished)
    if unscored:
        unscored.say(run, ranks)
        return 1
    # A launcher that sees one process end with a signal's exit code ends the others, and the first may still be saving.
    ranks.agree("all is written")
    if training.guard.halts:
        return HALTED
    return 0 if enough or finished == config.iterations else stop.exit_code


def _tell(
    hooks: Hooks, training: Training, run: Path, iteration: int, metrics: dict[str, float]
) -> tuple[bool, Exception | None]:
    """Call the callbacks of a finished iteration on the first process.

    Returns, on all processes, whether training is to stop; and, where a callback raised, what.
    """
    if not hooks.callbacks:
        return False, None

    def draw(texts: Sequence[str], seed: int) -> Tensor:
        config, policy = training.config, training.policy
        batch = config.rollout.decode_batch
        with torch.no_grad():
            embeds = policy.encode(list(texts))
            schedule, guidance = training.eval_schedule, config.rollout.guidance
            return draw_images(policy, embeds, schedule, guidance, [seed] * len(texts), batch, batch)

    enough, trouble = False, None
    if training.ranks.first:
        try:
            with PULSE.patiently():
                step = Step(run, iteration, metrics, draw)
                answers = [callback(step) for callback in hooks.callbacks]
            enough = any(answer is True for answer in answers)
        except Exception as error:  # the user's code may raise anything; first the iteration is saved
            enough, trouble = True, error
    return training.ranks.any(enough), trouble


def _save(training: Training, recorder: RunRecorder | None, finished: int, stopped: bool, run: Path) -> bool:
    """Write a checkpoint where one is due. All processes call this together; returns whether it was."""
    due = training.ranks.any(recorder is not None and recorder.saves(finished, stopped))
    if due:
        training.trainable.optimizer.gather()
    if recorder:
        with PULSE.patiently():
            recorder.save(finished, stopped)
        PULSE.kept = kept(run)
    return due


def iterate(training: Training, iteration: int, console: Console, left_out: LeftOut | None = None) -> dict[str, float]:
    """Iteration number `iteration` (from 1), top to bottom. Returns its metrics.

    left_out: keeps what was not finite; without it that is forgotten. Raises FloatingPointError, or OthersEnded where
    that was said, for what is not finite and not to be left out; Unscored where servers do not give their scores.
    """
    left_out = left_out or LeftOut(training.config, training.ranks)
    config, policy, engine = training.config, training.policy, training.engine
    watch = Stopwatch(policy.device)
    drawing = generator_for(config.seed, iteration, "rollout", policy.device)
    dealing = generator_for(config.seed, iteration, "update", "cpu")
    used = training.guard.begin(iteration, training.trainable, engine.loss.kl_weight)

    chosen = training.source.batch(iteration - 1)
    prompts = replace(embed(policy, chosen[training.ranks.share(len(chosen))], training.embeds), iteration=iteration)
    scores = _Scores(training, prompts)
    with watch("rollout"), console.bar("rollout") as bar:
        trajectory = rollout(engine, prompts, drawing, scores.add, bar.reach)
    with watch("reward"), console.bar("reward"):
        rewards = scores.rewards(trajectory.images)
    with left_out.explained(), watch("update"), console.bar("update") as bar:
        stats = update(engine, prompts, trajectory, rewards, iteration, dealing, bar.reach)

    images, whole = rewards.total.numel(), rewards.whole.cpu()
    values = left_out.counted(iteration, scores.broken, whole, stats) | stats.values | watch.metrics(images)
    if not whole.all():
        rewards = rewards.only(whole.to(rewards.total.device))
        chosen = tuple(prompt for prompt, there in zip(chosen, whole.tolist(), strict=True) if there)
    negative = torch.tensor([prompt.label == NEGATIVE for prompt in chosen], dtype=torch.bool)
    values |= reward_metrics(rewards, negative) if chosen else {}
    if training.accounting:
        drawn = rollout_rows(config, len(trajectory.images), scores.early, tree_of(engine.schedule, config))
        rows = {"rollout": drawn, "update": update_rows(config, stats)}
        values |= training.accounting.metrics(rows, watch.seconds, images) | memory_peak(policy.device)
    return values | used | (training.guard.end(iteration, chosen, rewards, stats) if chosen else {})


class _Scores:
    """Collects the scores of an iteration's images, group by group.

    early: whether some came during the rollout. broken: this process's scores that were not finite, where the groups
    that have one are to be left out.
    """

    def __init__(self, training: Training, prompts: PromptBatch):
        self._training, self._prompts = training, prompts
        self._begun: list[Scoring] = []
        self.early = False
        self.broken: list[BrokenReward] = []

    def add(self, part: slice, images: Tensor) -> None:
        """Score all images of these prompts, while the rollout goes on: what servers score is not waited for."""
        self.early = True
        self._begin(part, images)

    def rewards(self, images: Tensor) -> Rewards:
        """What all images of all processes are worth; `images` are scored now unless the rollout did."""
        if not self.early:
            self._begin(slice(None), images)
        ranks, reward = self._training.ranks, self._training.reward
        scored = all_scored(self._results, ranks) if reward.elsewhere else self._results()
        return reward.combine({name: ranks.gather(torch.cat([each[name] for each in scored])) for name in scored[0]})

    def _results(self) -> list[dict[str, Tensor]]:
        return [each.result() for each in self._begun]

    def _begin(self, part: slice, images: Tensor) -> None:
        config = self._training.config
        broken = self.broken if config.engine.not_finite == "skip" else None
        prompts = self._prompts.prompts[part]
        self._begun.append(self._training.reward.begin(images, prompts, config.group_size, broken))


def _subject(training: Training) -> Subject:
    """What is evaluated."""
    shared = (training.held_out or training.reward).encoder
    return Subject(
        training.policy,
        training.trainable.ema,
        training.prompts,
        training.eval_schedule,
        training.suites,
        training.held_out,
        shared.encoder if shared else None,
    )


def _base_pictures(training: Training, run: Path, console: Console) -> BasePictures | None:
    """What the guard compares with, drawn before a checkpoint is loaded; None where it has no use for it."""
    encoder = training.reward.encoder
    if encoder is None or not training.guard.watches:
        return None
    parts = training.config, training.policy, training.schedule, encoder, training.prompts
    return base_pictures(*parts, run, training.ranks, console.say)
