"""What all evaluations of a training are compared by: the prompts that each of them draws.

Evaluations in between draw a share of the prompts, and the last one all: numbers of different prompts differ by the
prompts. So the numbers that the best checkpoint is chosen by are of that share, in every evaluation; where there are
none in between (eval.every 0) they are of all.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from fastgrpo.evaluation.feature_distance import FeatureDistance
from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.evaluation.results.before_after import BEFORE
from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.evaluation.results.file import StageResult
from fastgrpo.evaluation.statistics.intervals import Estimate, mean, plain_mean, rate
from fastgrpo.evaluation.suites.base import Metric, Suite, tally
from fastgrpo.evaluation.suites.shapes import ShapesSuite
from fastgrpo.settings.paths import absolute
from fastgrpo.settings.schema import EvalConfig

Found = Sequence[tuple[Suite, dict[str, StageResult]]]
"""What each suite found, by stage."""


def quick_share(suite: Suite, fraction: float) -> tuple[ImageRequest, ...]:
    """The images of a suite that evaluations in between draw: a share of its prompts. fraction: in (0, 1]."""
    return suite.quick(fraction) if isinstance(suite, ShapesSuite) else share(suite.wanted, fraction)


def share(wanted: Sequence[ImageRequest], fraction: float) -> tuple[ImageRequest, ...]:
    """All images of a share of the prompts, rounded up: evenly spaced by id. fraction: in (0, 1]."""
    prompts = sorted({row.prompt for row in wanted})
    count = math.ceil(fraction * len(prompts))
    chosen = {prompts[k * len(prompts) // count] for k in range(count)}
    return tuple(row for row in wanted if row.prompt in chosen)


class SharedPrompts:
    """The images, of every suite, that all evaluations of a run have. digest: of them and of how they are drawn."""

    def __init__(self, suites: Sequence[Suite], config: EvalConfig, encoder: str) -> None:
        """encoder: whose features are compared; "" is none's."""
        fraction = config.quick_fraction if config.every else 1.0
        rows = {suite.name: quick_share(suite, fraction) for suite in suites}
        self._ids = {name: {row.id for row in own} for name, own in rows.items()}
        self._weights = config.weights
        judge = config.captions.encoder  # a resumed run has it with its whole path
        protocols = [suite.protocol.replace(judge, absolute(judge)) for suite in suites]
        drawn = [[s.name, s.steps, s.eta, [asdict(row) for row in rows[s.name]]] for s in suites]
        text = json.dumps([drawn, protocols, config.weights, encoder], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def ids(self, suite: Suite) -> set[str]:
        """Of a suite's images."""
        return self._ids[suite.name]

    def evaluated(
        self, iteration: int, before: Found, now: tuple[str, Found], distance: FeatureDistance | None
    ) -> Evaluated | None:
        """What the best checkpoint is chosen by; None where no suite counts unsafe images.

        before: of the policy before training, on all prompts. now: a stage and what was found then. distance: of these
        images' features.
        """
        stage, found = now
        unsafe = self._unsafe(found, stage)
        if not unsafe:
            return None
        one, two = self._composition(before, BEFORE), self._composition(found, stage)
        return Evaluated(
            iteration=iteration,
            weights=self._weights,
            measured=self.digest,
            unsafe=sum(unsafe) / len(unsafe),
            images=len(unsafe),
            composition=two.value if two else None,
            composition_least=one.low if one else None,
            diversity=distance.ratio.value if distance else None,
            diversity_least=distance.least if distance else None,
        )

    def _unsafe(self, found: Found, stage: str) -> list[bool]:
        """Of every image that a safety suite looked at, whether any detector of any suite objects to it."""
        said: dict[tuple[str, str], bool] = {}
        for suite, results in found:
            for metric in results[stage].found.metrics:
                if metric.binary and metric.better == "lower":
                    for id in metric.values.keys() & self.ids(suite):
                        key = suite.folder, id  # two suites may look at the same images
                        said[key] = said.get(key, False) or bool(metric.values[id])
        return list(said.values())

    def _composition(self, found: Found, stage: str) -> Estimate | None:
        here = benign(found, stage)
        if here is None:
            return None
        suite, metric = here
        rows = next(results[stage].rows for each, results in found if each is suite)
        return _estimate(metric, [row for row in rows if row.id in self.ids(suite)])


def benign(found: Found, stage: str) -> tuple[Suite, Metric] | None:
    """The first suite that measures how well its prompts are drawn, and what it found of each image."""
    for suite, results in found:
        for metric in results[stage].found.metrics:
            if metric.better == "higher" and metric.values:
                return suite, metric
    return None


def _estimate(metric: Metric, rows: Sequence[ImageRequest]) -> Estimate | None:
    """A metric's mean over the images of some rows, of grouped images the plain mean of the groups' means, with its
    interval; None where it has none of them.
    """
    values = {row.id: metric.values[row.id] for row in rows if row.id in metric.values}
    if not values:
        return None
    own = tally(rows, values)
    if metric.groups is None:
        return (rate if metric.binary else mean)(own.totals, own.counts)
    groups = {row.prompt: metric.groups[row.id] for row in rows if row.id in values}
    names = sorted(set(groups.values()))
    members = [[groups[prompt] == name for name in names] for prompt in own.prompts]
    return plain_mean(own.totals, own.counts, members)
