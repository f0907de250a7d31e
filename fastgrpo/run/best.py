"""Which of a run's checkpoints is the best, by a stated rule, and RUN/checkpoints/best.json, which names it.

    {"iteration": N or null, "checkpoint": "iter-00000N" or null, "weights": "trained" | "ema", "why": SENTENCE,
     "rule": SENTENCE, "evaluations": [EVALUATED]}

An EVALUATED is one of evaluation/results/evaluated.py, with "fails": the conditions that it does not meet. The file is
a function of the evaluations so far, which every checkpoint holds: a run that was killed and resumed has the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.system.files import reading, write_atomically

RULE = (
    "fewest unsafe images among the evaluated iterations whose composition and diversity are not below the low end of "
    "the 95% interval that they had before training, all on the same prompts and seeds; of equals the earliest"
)
COMPOSITION, DIVERSITY = "composition", "diversity"
_UNMEASURED = {
    COMPOSITION: "composition was not measured, which takes suite shapes, geneval or clip-score",
    DIVERSITY: "diversity was not measured, which takes pictures of two benign prompts and the encoder of a reward "
    "or eval.encoder",
}


@dataclass(frozen=True)
class Choice:
    """iteration: of the best checkpoint, None where there is none. why: its numbers, or which condition none meets."""

    iteration: int | None
    why: str


def failures(evaluated: Evaluated) -> tuple[str, ...]:
    """The conditions that an evaluation does not meet; what was not measured is not met."""
    values = {
        COMPOSITION: (evaluated.composition, evaluated.composition_least),
        DIVERSITY: (evaluated.diversity, evaluated.diversity_least),
    }
    return tuple(n for n, (value, least) in values.items() if value is None or least is None or value < least)


def choose(evaluations: Sequence[Evaluated]) -> Choice:
    """The best of a run's evaluations by RULE. evaluations: in order, one or more.

    Those that measured otherwise than the newest, as after a resume with other eval.* settings, are left out.
    """
    newest = evaluations[-1]
    compared = [each for each in evaluations if each.measured == newest.measured]
    fit = [each for each in compared if not failures(each)]
    if not fit:
        return Choice(None, _why_none(compared))
    best = min(fit, key=lambda each: (each.unsafe, each.iteration))
    why = (
        f"after iteration {best.iteration} {100 * best.unsafe:.1f}% of {best.images} images are unsafe, composition is "
        f"{_limited(best.composition, best.composition_least)}, diversity "
        f"{_limited(best.diversity, best.diversity_least)} of before"
    )
    return Choice(best.iteration, why)


def record(run: Path, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
    """Write best.json, or remove it where there is no evaluation. Returns the best iteration, if any.

    evaluations: of a `TrainerState`. Raises OSError where it cannot be written.
    """
    path = best_file(run)
    if not evaluations:
        path.unlink(missing_ok=True)
        return None
    own = [Evaluated(**each) for each in evaluations]
    choice = choose(own)
    name = None if choice.iteration is None else f"iter-{choice.iteration:06d}"
    content: dict[str, Any] = {
        "iteration": choice.iteration,
        "checkpoint": name,
        "weights": own[-1].weights,
        "why": choice.why,
    }
    content |= {"rule": RULE, "evaluations": [asdict(each) | {"fails": failures(each)} for each in own]}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return choice.iteration


def best_file(run: Path) -> Path:
    return run / "checkpoints" / "best.json"


@dataclass(frozen=True)
class Best(Choice):
    """What best.json says. weights: that were evaluated, `trained` or `ema`.

    fails: an evaluated iteration -> the conditions that it does not meet, in order of the iterations.
    """

    weights: str
    fails: Mapping[int, tuple[str, ...]]


def read(run: Path) -> Best | None:
    """What `record` wrote; None where it wrote nothing. Raises ConfigError where the file is damaged."""
    path = best_file(run)
    if not path.is_file():
        return None
    with reading(path):
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        iteration = found["iteration"]
        if iteration is not None and not isinstance(iteration, int):
            raise ValueError(f"iteration is {iteration!r}")
        fails = {int(each["iteration"]): tuple(each["fails"]) for each in found["evaluations"]}
        return Best(iteration, str(found["why"]), str(found["weights"]), fails)


def _why_none(compared: Sequence[Evaluated]) -> str:
    said = []
    for name in (COMPOSITION, DIVERSITY):
        failed = [each.iteration for each in compared if name in failures(each)]
        least = getattr(compared[-1], f"{name}_least")
        if failed and (least is None or getattr(compared[-1], name) is None):
            said.append(_UNMEASURED[name])
        elif failed:
            of = " of before" if name == DIVERSITY else ""
            said.append(f"{name} is below {least:.3f}{of} after {_counted(failed)}")
    return " and ".join(said)


def _counted(iterations: Sequence[int]) -> str:
    """Such as "iteration 4" or "iterations 4, 8 and 12"."""
    *first, last = map(str, iterations)
    return f"iterations {', '.join(first)} and {last}" if first else f"iteration {last}"


def _limited(value: float | None, least: float | None) -> str:
    return f"{value:.3f} (at least {least:.3f})"
