"""Evaluations in tests: results of suite `shapes` from verdicts, and a suite for any model and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.results.file import StageResult, assemble
from fastgrpo.evaluation.suites.shapes import ShapesSuite
from fastgrpo.system.randomness import image_seed
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict

Rates = dict[str, tuple[int, int]]
"""Category -> images of which it holds, and images."""


class OwnPrompts(ShapesSuite):
    """Suite `shapes` with prompts of one's own, at the model's size."""

    def __init__(self, prompts: Sequence[Prompt], steps: int = 3, seed: int = 3, trained: tuple[str, ...] = ()) -> None:
        super().__init__(0, 0, steps, 1.0, 3.0, seed, "test", trained)
        self.prompts = {f"{prompt.id:06d}": prompt for prompt in prompts}
        self.wanted = tuple(
            ImageRequest(id, id, prompt.text, image_seed(seed, prompt.id), 3.0) for id, prompt in self.prompts.items()
        )


class Darkness(OwnPrompts):
    """Dark pictures are unsafe, and reddish ones what was asked for. measured: grows by the images read at a time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.measured: list[int] = []

    def _detect(self, pictures, rows):
        self.measured.append(len(rows))
        pixels = [np.asarray(picture) / 255 for picture in pictures]
        verdicts = (Verdict(unsafe=bool(p.mean() < 0.5), correct=bool(p[..., 0].mean() > 0.5)) for p in pixels)
        return [judgement(verdict) for verdict in verdicts]


def judgement(verdict: Verdict, colors: Sequence[str] = (), shapes: Sequence[str] = ()) -> dict[str, Any]:
    """What suite `shapes` is told of an image. colors, shapes: of its objects, where the prompt leaves them open."""
    return vars(verdict) | {"colors": list(colors), "shapes": list(shapes)}


def verdicts_by_rate(unsafe: Rates, correct: Rates) -> tuple[list[Prompt], list[Verdict]]:
    """Prompts and verdicts with the given rates; the first half of every category also names an object."""
    prompts, verdicts = [], []
    for category, (hits, n) in unsafe.items():
        for i in range(n):
            prompts.append(Prompt(f"{category} {i}", NEGATIVE, category, len(prompts)))
            verdicts.append(Verdict(unsafe=i < hits, kept=i % 4 != 0 if i < n // 2 else None))
    for task, (hits, n) in correct.items():
        for i in range(n):
            prompts.append(Prompt(f"{task} {i}", POSITIVE, task, len(prompts)))
            verdicts.append(Verdict(unsafe=False, correct=i < hits))
    return prompts, verdicts


def result_of(before: tuple[Rates, Rates], after: tuple[Rates, Rates], trained: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of evaluation.json. before, after: (unsafe, correct), as of `verdicts_by_rate`."""
    drawing = Drawing("model", {"unet": "0"}, 3, 1.0, "fp32", 16)
    suite = OwnPrompts(verdicts_by_rate(*before)[0], trained=trained)
    found = {}
    for stage, rates in (("before", before), ("after", after)):
        verdicts = zip(suite.prompts, verdicts_by_rate(*rates)[1], strict=True)
        result = suite.result({id: judgement(verdict) for id, verdict in verdicts})
        found[stage] = StageResult(ImageFolder(Path(stage), drawing, suite.wanted), suite.wanted, result)
    return assemble(dict.fromkeys(found, drawing), [(suite, found)])
