"""What held-out prompts say about the policy before, during and after training: rates and pictures, in the run's folder.

evaluation_before.json   the untrained policy's rates, kept so that a resumed run need not measure them again
evaluation.json          before and after
samples/                 before.png, iter-000010.png, ..., after.png and before_after.png: same prompts, same seeds
evaluation/in-training/  eval.suites: evaluation.json and .md, with the images
"""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table

from fastgrpo import pictures
from fastgrpo.config import TrainConfig
from fastgrpo.console import Console
from fastgrpo.evaluation.in_training import SuiteExam
from fastgrpo.evaluation.result import Evaluation, comparison_table, read_evaluation, write_evaluation
from fastgrpo.evaluation.suite import make_suite
from fastgrpo.files import reading, write_atomically
from fastgrpo.finite import Request
from fastgrpo.parts import Parts
from fastgrpo.randomness import seed_for
from fastgrpo.rollout import sample
from fastgrpo.shapes.world import HAZARDS
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

PICTURES_PER_PROMPT = 4
PICTURED_PROMPTS_PER_LABEL = 4  # where there is no suite to say what to draw


class Exam:
    """Examines one run's policy: by the shapes world's own suite where it is trained, by those of eval.suites, and in pictures."""

    def __init__(self, run: Path, config: TrainConfig, parts: Parts, console: Console):
        self.run = run
        self.config = config
        self.policy = parts.policy
        ema = parts.trainable.ema if config.eval.weights == "ema" else None
        self._weights = ema.in_place if ema else nullcontext
        self.console = console
        self.suite = make_suite(config)
        self.prompts = self.suite.picture_prompts() if self.suite else _first_of_each_label(parts.prompts)
        self.schedule = parts.eval_schedule
        self._held_out = parts.held_out
        self._suites = SuiteExam(run, config, parts.policy, parts.judged, console) if parts.judged else None
        self._before = run / "evaluation_before.json"
        self._comparison = run / "evaluation.json"
        (run / "samples").mkdir(exist_ok=True)

    def before(self) -> dict[str, float]:
        """Examine the policy that has not been trained yet, unless this run has done so already. Returns eval/*."""
        drawn = {} if self._picture("before").is_file() else self._draw("before")
        drawn |= self._suites.before() if self._suites else {}
        if self.suite is None:
            return drawn
        if not self._before.is_file():
            evaluation = self._evaluate(quick=False)
            write_atomically(self._before, json.dumps(evaluation.to_json(), indent=2).encode())
        return self._read_before().metrics() | drawn

    def between(self, iteration: int) -> dict[str, float]:
        """A quick evaluation and a grid. Returns eval/*."""
        with self._weights():
            drawn = self._draw(f"iter-{iteration:06d}")
            drawn |= self._suites.between(f"iter-{iteration:06d}") if self._suites else {}
            return (self._evaluate(quick=True).metrics() if self.suite else {}) | drawn

    def after(self) -> dict[str, float]:
        """The full evaluation beside the one before, and the grids side by side. Returns eval/*."""
        with self._weights():
            drawn = self._draw("after")
            drawn |= self._suites.after() if self._suites else {}
            evaluation = self._evaluate(quick=False) if self.suite else None
        with Image.open(self._picture("before")) as before, Image.open(self._picture("after")) as after:
            pictures.write_png(self._picture("before_after"), pictures.side_by_side(before, after))
        if evaluation is None:
            return drawn
        trained = self._trained_categories()
        write_evaluation(self._comparison, self.suite.protocol, trained, self._read_before(), evaluation)
        return evaluation.metrics() | drawn

    def tables(self) -> list[Table | str]:
        """Before and after, once `after` has been called."""
        shown = self._suites.tables() if self._suites else []
        if self.suite:
            found = read_evaluation(self._comparison)
            shown.append(comparison_table(found.before, found.after, found.trained_categories))
        return shown

    def _evaluate(self, quick: bool) -> Evaluation:
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
            images = sample(
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

    def _read_before(self) -> Evaluation:
        with reading(self._before):
            return Evaluation.from_json(json.loads(self._before.read_text(encoding="utf-8")))

    def _trained_categories(self) -> tuple[str, ...]:
        """Hazard categories that training prompts come from; a prompt file does not say."""
        return (self.config.prompts.categories or HAZARDS) if self.config.prompts.negative == "shapes" else ()


def _first_of_each_label(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    return tuple(
        prompt
        for label in (POSITIVE, NEGATIVE)
        for prompt in [p for p in prompts if p.label == label][:PICTURED_PROMPTS_PER_LABEL]
    )
