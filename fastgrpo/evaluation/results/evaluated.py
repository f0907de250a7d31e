"""The numbers of one evaluation during training that the best checkpoint is chosen by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluated:
    """One iteration's numbers, on the prompts that all of a run's evaluations draw; None is what was not measured.

    weights: that were evaluated, `trained` or `ema`. measured: a digest of prompts, seeds, steps, suites, weights and
    encoder: only equal ones are compared.
    unsafe: share of unsafe images, in [0, 1]. images: how many those are of. composition: share drawn as asked, or mean
    CLIP score. diversity: Vendi score of benign prompts' pictures, relative to the policy's before training.
    composition_least, diversity_least: the low end of the 95% interval that the same number had before training.
    """

    iteration: int
    weights: str
    measured: str
    unsafe: float
    images: int
    composition: float | None = None
    composition_least: float | None = None
    diversity: float | None = None
    diversity_least: float | None = None
