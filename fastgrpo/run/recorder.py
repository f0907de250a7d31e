"""What the first process of a run writes down: metrics, logs, checkpoints, the report, lines on the terminal."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rich.text import Text

from fastgrpo.assembly import Training
from fastgrpo.evaluation.during_training import Evaluation, TrainingEvaluation
from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.evaluation.sentences import STYLES
from fastgrpo.rewards.axis.report import axis_report
from fastgrpo.run import best, checkpoint
from fastgrpo.run.axis_file import write_axis
from fastgrpo.run.checkpoint import TrainerState, library_versions
from fastgrpo.run.logs.base import Entry, LoggedTable
from fastgrpo.run.logs.registry import SINKS
from fastgrpo.run.logs.run import logged_run
from fastgrpo.run.logs.worker import Logs
from fastgrpo.run.metrics import MetricsLog
from fastgrpo.run.page.document import write_report
from fastgrpo.settings.command_line import PROGRAM
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import run_config
from fastgrpo.system.console import Console, warn
from fastgrpo.system.files import write_atomically
from fastgrpo.system.progress import Pace
from fastgrpo.system.pulse import PULSE


class RunRecorder:
    """One run's records. As a context it ends the logs, also where training fails."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        training: Training,
        start: TrainerState,
        threads: int,
        inputs: Mapping[str, str],
        console: Console,
    ):
        """start: where the run goes on. threads: CPU threads that share the batches. inputs: as `input_digests`."""
        self.run, self.config, self.training, self.console = run, config, training, console
        self._start, self._threads, self._inputs, self._began = start, threads, inputs, time.monotonic()
        if not (run / "config.toml").is_file():
            self._write_config()
        training.record.write(run)
        if training.reward.steering:
            write_axis(run, axis_report(training.reward.steering, training.prompts), config.reward)
        self._pace = Pace(config.iterations, config.eval.every, start.iteration)
        console.follow(self._pace)
        # All that this run found so far; best.json may be older where a kill came between the two.
        self._evaluations = [Evaluated(**each) for each in start.evaluations]
        checkpoint.record_best(run, start)
        self._logs: Logs | None = None

    def begin(self, evaluation: TrainingEvaluation, before: dict[str, float]) -> None:
        """Log and show what was found before training. To be called before the other methods."""
        self._evaluation = evaluation
        self._write_config()  # other settings of a resumed run, once nothing has refused them
        self._metrics = MetricsLog(self.run, self._start.iteration)
        self._logs = Logs(logged_run(self.run, self.config, self._start.iteration), SINKS)
        self._logs.put(Entry(0, before, evaluation.pictures(0)))
        self._pace.started(evaluation=time.monotonic() - self._began)
        if not self._start.iteration:
            self.console.iteration(0, self.config.iterations, self._seconds(), before)

    def write(self, iteration: int, values: dict[str, float], evaluation: Evaluation | None) -> None:
        """Log and show the finished iteration. evaluation: of the policy after it, where it was due."""
        config = self.config
        if evaluation:
            values = values | evaluation.values
            self._evaluations += [evaluation.evaluated] if evaluation.evaluated else []
        self._metrics.write(iteration, self._seconds(), values)
        if self._logs:
            pictures = self._evaluation.pictures(iteration) if evaluation else {}
            self._logs.put(Entry(iteration, values, pictures, self._tables() if iteration == config.iterations else {}))
        self._pace.finished(iteration, values.get("time/eval_s", 0.0))
        self.console.iteration(iteration, config.iterations, self._seconds(), values, config.engine.show_speed)
        self._tell()

    def saves(self, iteration: int, stopped: bool) -> bool:
        """Whether a checkpoint is due: every so often, at the end, before a stop, and of the best so far."""
        due = stopped or iteration % self.config.checkpoint.every == 0 or iteration == self.config.iterations
        return due or self._is_best(iteration)

    def save(self, iteration: int, stopped: bool) -> None:
        """A checkpoint where it is due. All processes have called `FlatAdamW.gather` then."""
        rule = self.config.checkpoint
        if self.saves(iteration, stopped):
            state = TrainerState(
                iteration,
                self.config.seed,
                self._seconds(),
                self._threads,
                library_versions(self.config.optim),
                processes=self.training.ranks.count,
                engine=self.training.record.to_json(),
                inputs=dict(self._inputs),
                iterations=self.config.iterations,
                evaluated=self._evaluation.due(iteration),
                guard=self.training.guard.state(),
                evaluations=[dataclasses.asdict(each) for each in self._evaluations],
            )
            with self.console.bar("checkpoint"):
                trainable, good = self.training.trainable, self._last_good()
                checkpoint.save(self.run, trainable, state, rule.keep, rule.keep_evaluated, protected=[good])
            self.training.record.write(self.run)

    def close(self, iteration: int) -> None:
        """Say how to go on after a stop, or what came of it all and where it is."""
        self._metrics.close()
        named = [self._best_line(best.choose(self._evaluations))] if self._evaluations else []
        if self.training.guard.halts:
            good = self._last_good()
            left = f"the last checkpoint from before is {good}" if good else "no checkpoint is from before"
            self.console.say(f"The guard has stopped the training after {iteration} iterations; {left}.")
            if iteration < self.config.iterations:
                self.console.say(*named)
                self.console.say(f"To go on all the same: {PROGRAM} --resume {self.run} --guard.action warn")
                self.console.say(f"report    {write_report(self.run)}")
                return
        if iteration < self.config.iterations:
            self.console.say(*named)
            self.console.say(f"Stopped after {iteration} iterations. To go on: {PROGRAM} --resume {self.run}")
            return
        self.console.say(*self._evaluation.tables())
        charts = self.run / "tensorboard" if "tensorboard" in self.config.log.to else None
        for sentence in self._evaluation.sentences():
            self.console.say(Text(sentence.text, STYLES.get(sentence.verdict, "")))
        self.console.say(
            f"weights   {checkpoint.checkpoint_folder(self.run, self.config.iterations) / 'unet'}",
            *named,
            f"pictures  {self.run / 'samples' / 'before_after.png'}",
            f"report    {write_report(self.run)}",
            f"metrics   {self.run / 'metrics.jsonl'}" + (f"   (tensorboard --logdir {charts})" if charts else ""),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._logs:
            with PULSE.patiently():
                self._logs.close(failed=kind is not None)
            self._tell()
            self._logs = None

    def _tell(self) -> None:
        """Say what sinks have to say."""
        if self._logs:
            self.console.say(*self._logs.news())
            for sentence in self._logs.warnings():
                warn(sentence)

    def _tables(self) -> dict[str, LoggedTable]:
        """The evaluation's tables, before and after."""
        found = self._evaluation.plain_tables()
        return {
            f"evaluation/{name}": LoggedTable(tuple(head), tuple(map(tuple, rows)))
            for name, (head, *rows) in found.items()
        }

    def _last_good(self) -> Path | None:
        """The newest checkpoint that drew within the guard's limits, where something is beyond them now."""
        until = self.training.guard.good_until
        return None if until is None else checkpoint.newest_until(self.run, until)

    def _is_best(self, iteration: int) -> bool:
        """Whether the policy was evaluated after this iteration and is the best so far."""
        return bool(self._evaluations) and best.choose(self._evaluations).iteration == iteration

    def _best_line(self, choice: best.Choice) -> str:
        if choice.iteration is None:
            return f"best      there is no best checkpoint: {choice.why}"
        return f"best      {checkpoint.checkpoint_folder(self.run, choice.iteration)}: {choice.why}"

    def _write_config(self) -> None:
        write_atomically(self.run / "config.toml", run_config(self.config).encode())

    def _seconds(self) -> float:
        """Wall clock of the run so far, over all resumes."""
        return self._start.seconds + time.monotonic() - self._began
