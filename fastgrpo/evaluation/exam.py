"""What held-out prompts say about the policy before, during and after training: rates and pictures, in the run's folder.

evaluation_before.json   the untrained policy's rates and verdicts, kept so that a resumed run need not measure them again
evaluation_after.json    the trained policy's
evaluation.json          before and after, and the paired test of every rate
samples/                 before.png, iter-000010.png, ..., after.png and before_after.png: same prompts, same seeds;
                         prompts.json, the prompts of their rows
evaluation/in-training/  eval.suites: evaluation.json and .md, with the images
"""

import dataclasses
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from fastgrpo.engine.trainable import Ema
from fastgrpo.evaluation import stages
from fastgrpo.evaluation.during_training import LoadedSuite, SuiteExam
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.evaluation.results.before_after import (
    Comparison,
    comparison_table,
    read_evaluation,
    verdicts,
    write_evaluation,
)
from fastgrpo.evaluation.results.comparison import compare_examined
from fastgrpo.evaluation.results.summary import Examined
from fastgrpo.evaluation.sentences import Sentence
from fastgrpo.evaluation.stages import Stage, read_stage, write_stage
from fastgrpo.evaluation.suite import make_suite
from fastgrpo.policy import Policy
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import DDIM
from fastgrpo.shapes.world import HAZARDS
from fastgrpo.system import pictures
from fastgrpo.system.console import Console
from fastgrpo.system.files import reading, write_atomically
from fastgrpo.system.finite import Request
from fastgrpo.system.randomness import seed_for
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

PICTURES_PER_PROMPT = 4
PICTURED_PROMPTS_PER_LABEL = 4  # where there is no suite to say what to draw


@dataclass(frozen=True)
class Examinee:
    """Who is examined and with what.

    ema: the moving average of its weights, if one is kept. prompts: all of the training. schedule: steps of pictures and evaluations.
    judged: suites of eval.suites. held_out: scores what is pictured, where eval.encoder names one.
    """

    policy: Policy
    ema: Ema | None
    prompts: tuple[Prompt, ...]
    schedule: Schedule
    judged: tuple[LoadedSuite, ...] = ()
    held_out: HeldOutReward | None = None


class Exam:
    """Examines one run's policy: by the shapes world's own suite where it is trained, by those of eval.suites, and in pictures."""

    def __init__(self, run: Path, config: TrainConfig, examinee: Examinee, console: Console):
        self.run = run
        self.config = config
        self.policy = examinee.policy
        ema = examinee.ema if config.eval.weights == "ema" else None
        self._weights = ema.in_place if ema else nullcontext
        self.console = console
        self.suite = make_suite(config)
        self.prompts = self.suite.picture_prompts() if self.suite else _first_of_each_label(examinee.prompts)
        self.schedule = examinee.schedule
        self._held_out = examinee.held_out
        self._settings = self._said_settings()
        self._suites = SuiteExam(run, config, examinee.policy, examinee.judged, console) if examinee.judged else None
        self._before, self._after = run / stages.BEFORE, run / stages.AFTER
        self._comparison = run / "evaluation.json"
        (run / "samples").mkdir(exist_ok=True)
        rows = [dataclasses.asdict(prompt) for prompt in self.prompts]
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        write_atomically(run / "samples" / stages.PROMPTS_FILE, f"{text}\n".encode())

    def before(self) -> dict[str, float]:
        """Examine the policy that has not been trained yet, unless this run has done so already. Returns eval/*."""
        stage = self._kept()
        if stage is None:
            drawn = self._draw("before")
            stage = self._stage(self._evaluate(quick=False) if self.suite else None, drawn)
            write_stage(self._before, stage)  # eval.suites may take hours
        elif not self._picture("before").is_file():
            self._draw("before")
        if self._suites:
            stage = dataclasses.replace(stage, metrics=stage.metrics | self._suites.before())
            write_stage(self._before, stage)
        return stage.metrics

    def between(self, iteration: int) -> dict[str, float]:
        """A quick evaluation and a grid. Returns eval/*."""
        with self._weights():
            drawn = self._draw(f"iter-{iteration:06d}")
            drawn |= self._suites.between(f"iter-{iteration:06d}") if self._suites else {}
            return (self._evaluate(quick=True).rates.metrics() if self.suite else {}) | drawn

    def after(self) -> dict[str, float]:
        """The full evaluation beside the one before, and the grids side by side. Returns eval/*."""
        with self._weights():
            drawn = self._draw("after")
            drawn |= self._suites.after() if self._suites else {}
            stage = self._stage(self._evaluate(quick=False) if self.suite else None, drawn)
        with Image.open(self._picture("before")) as before, Image.open(self._picture("after")) as after:
            pictures.write_png(self._picture("before_after"), pictures.side_by_side(before, after))
        write_stage(self._after, stage)
        if self.suite:
            write_evaluation(self._comparison, self._compare(read_stage(self._before), stage))
        return stage.metrics

    def tables(self) -> list[Table | str]:
        """Before and after, once `after` has been called."""
        shown = self._suites.tables() if self._suites else []
        return [*shown, comparison_table(self._read_comparison())] if self.suite else shown

    def verdicts(self) -> list[Sentence]:
        """Better, worse or undecided, once `after` has been called: unsafe, composition, and of eval.suites every metric."""
        own = verdicts(self._read_comparison()) if self.suite else []
        return own + (self._suites.verdicts() if self._suites else [])

    def _stage(self, examined: Examined | None, metrics: dict[str, float]) -> Stage:
        return Stage.of(examined, self._settings, metrics) if examined else Stage(self._settings, metrics)

    def _kept(self) -> Stage | None:
        """What is known of the policy before training, unless it was examined in another way than it is now."""
        stage = read_stage(self._before) if self._before.is_file() else None
        return stage if stage and stage.settings in ({}, self._settings) else None

    def _compare(self, before: Stage, after: Stage) -> Comparison:
        trained, prompts = self._trained_categories(), self.suite.prompts
        tests = compare_examined(before.examined(prompts), after.examined(prompts), trained)
        about = self.suite.about(self._settings)
        return Comparison(self.suite.protocol, trained, before.rates, after.rates, tests, about)

    def _read_comparison(self) -> Comparison:
        with reading(self._comparison):
            return read_evaluation(self._comparison)

    def _evaluate(self, quick: bool) -> Examined:
        guidance = self.config.rollout.guidance
        with self.console.bar("evaluation") as bar:
            return self.suite.evaluate(self.policy, self.schedule, guidance, quick, progress=bar.reach)

    def _draw(self, name: str) -> dict[str, float]:
        """A grid of `prompts`, PICTURES_PER_PROMPT seeds each. Returns what the held-out encoder says of it."""
        embeds = self.policy.encode([prompt.text for prompt in self.prompts])
        seeds = [
            seed_for(self.config.eval.seed, prompt.id, f"picture {k} of a {prompt.label} prompt")
            for prompt in self.prompts
            for k in range(PICTURES_PER_PROMPT)
        ]
        with self.console.bar("pictures"), torch.no_grad():
            embeds = embeds.repeat_interleave(PICTURES_PER_PROMPT, dim=0)
            rollout = self.config.rollout
            images = draw_images(
                self.policy,
                embeds,
                self.schedule,
                rollout.guidance,
                seeds,
                # On CUDA no more than are decoded together: most of the memory is the training's.
                batch=rollout.batch or (len(seeds) if self.policy.device.type == "cpu" else rollout.decode_batch),
                decode_batch=rollout.decode_batch,
                requests=[
                    Request(f"{name}.png, picture {k + 1}", prompt.text)
                    for prompt in self.prompts
                    for k in range(PICTURES_PER_PROMPT)
                ],
            )
        pictures.write_png(self._picture(name), pictures.grid(images, self.prompts))
        return self._held_out(images, self.prompts, PICTURES_PER_PROMPT) if self._held_out else {}

    def _picture(self, name: str) -> Path:
        return self.run / "samples" / f"{name}.png"

    def _said_settings(self) -> dict[str, Any]:
        """What numbers and pictures of one policy depend on."""
        config = self.config
        drawing = {"sampler": DDIM, "steps": len(self.schedule), "eta": config.rollout.eta}
        drawing |= {"guidance": config.rollout.guidance, "seed": config.eval.seed, "encoder": config.eval.encoder}
        pictured = {"pictured": [prompt.text for prompt in self.prompts]}
        return drawing | pictured | (self.suite.settings() if self.suite else {})

    def _trained_categories(self) -> tuple[str, ...]:
        """Hazard categories that training prompts come from; a prompt file does not say."""
        return (self.config.prompts.categories or HAZARDS) if self.config.prompts.negative == "shapes" else ()


def _first_of_each_label(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    return tuple(
        prompt
        for label in (POSITIVE, NEGATIVE)
        for prompt in [p for p in prompts if p.label == label][:PICTURED_PROMPTS_PER_LABEL]
    )
