"""How far training has moved the pictures of benign prompts, and how much of their diversity is left.

An encoder's features of the pictures before training and of those now, of the same held-out prompts and seeds, are
compared: by squared MMD (metrics/mmd.py), which is 0 where the two are drawn alike, and by the ratio of their Vendi
scores (metrics/vendi.py), below 1 where the pictures have become more alike. A reward that is gamed, and a policy that
collapses, show in both long before rates do. The pictures are those that a suite has drawn anyway.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastgrpo.evaluation.images.files import BATCH, ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest, Requests
from fastgrpo.evaluation.metrics.clip_images import ClipImages
from fastgrpo.evaluation.metrics.mmd import PairedMmd, paired_mmd
from fastgrpo.evaluation.metrics.vendi import vendi
from fastgrpo.evaluation.statistics.intervals import DELTA, NO_INTERVAL, Estimate, delta_half_width
from fastgrpo.evaluation.suites.base import tally
from fastgrpo.rewards.encoder import OpenClipEncoder
from fastgrpo.settings.paths import absolute

MOST_PROMPTS = 1000  # whose pictures are compared: bounds time and memory, which grow with the square


@dataclass(frozen=True)
class FeatureDistance:
    """Pictures now beside those of the same prompts and seeds before training.

    mmd: their squared MMD. before, after: Vendi scores. ratio: after / before, with the delta method's interval over
    prompts, of the logarithm. least: the low end of the score's own interval before training, relative to the score.
    """

    mmd: PairedMmd
    before: float
    after: float
    ratio: Estimate
    least: float

    def metrics(self) -> dict[str, float]:
        """eval/distance_mmd and eval/diversity_vendi with their intervals' ends, and the test's p."""
        ends = {"distance_mmd": self.mmd.squared, "diversity_vendi": self.ratio}
        values = {f"eval/{name}": each.value for name, each in ends.items()} | {"eval/distance_mmd_p": self.mmd.p}
        for name, each in ends.items():
            if each.low is not None and each.high is not None:
                values |= {f"eval/{name}_low": each.low, f"eval/{name}_high": each.high}
        return values

    def to_json(self) -> dict[str, Any]:
        """ "distance" of evaluation.json, without which pictures and whose features they are."""
        mmd = {"value": self.mmd.squared.value, "low": self.mmd.squared.low, "high": self.mmd.squared.high}
        ratio = {"ratio": self.ratio.value, "low": self.ratio.low, "high": self.ratio.high}
        scores = {"before": self.before, "after": self.after}
        return {"images": self.ratio.n, "mmd": mmd | {"p": self.mmd.p}, "vendi": scores | ratio}


@dataclass(frozen=True)
class PicturePairs:
    """N pictures before training and now. rows: [N]. before, after: [N, E] float32 unit vectors."""

    rows: tuple[ImageRequest, ...]
    before: np.ndarray
    after: np.ndarray

    def distance(self, ids: Collection[str] | None = None) -> FeatureDistance | None:
        """Compare the pictures with these ids, None being all; None where they are of fewer than two prompts."""
        kept = [i for i, row in enumerate(self.rows) if ids is None or row.id in ids]
        rows = [self.rows[i] for i in kept]
        prompts = [row.prompt for row in rows]
        if len(set(prompts)) < 2:
            return None
        first, second = vendi(self.before[kept]), vendi(self.after[kept])
        changes = dict(zip((row.id for row in rows), second.influence - first.influence, strict=True))
        alone = dict(zip((row.id for row in rows), first.influence, strict=True))
        half, own = (delta_half_width(each.totals, each.counts) for each in (tally(rows, changes), tally(rows, alone)))
        ratio, n = second.score / first.score, len(rows)
        interval = (ratio * math.exp(-half), ratio * math.exp(half), DELTA) if half else (None, None, NO_INTERVAL)
        mmd = paired_mmd(self.before[kept], self.after[kept], prompts)
        return FeatureDistance(mmd, first.score, second.score, Estimate(ratio, n, *interval), math.exp(-own))


class PictureFeatures:
    """An encoder's features of a run's pictures; those before training are computed once.

    spec: what the settings call the encoder, from whatever folder the run goes on.
    """

    def __init__(self, encoder: OpenClipEncoder) -> None:
        self.spec = absolute(encoder.spec)
        self._clip = ClipImages(encoder)
        self._before: dict[str, np.ndarray] = {}

    def pairs(self, before: ImageFolder, now: ImageFolder, benign: Collection[str]) -> PicturePairs:
        """The pictures that both folders have, of the benign ids; of more than MOST_PROMPTS prompts, the first.

        To be called by all processes.
        """
        if not self._before:
            rows = _first_prompts([row for row in before.present() if row.id in benign])
            self._before = dict(zip((row.id for row in rows), self._features(before, rows), strict=True))
        rows = [row for row in now.present() if row.id in self._before]
        first = np.stack([self._before[row.id] for row in rows]) if rows else np.zeros((0, 1), np.float32)
        return PicturePairs(tuple(rows), first, self._features(now, rows) if rows else first)

    def _features(self, folder: ImageFolder, rows: Requests) -> np.ndarray:
        """[N, E] float32 of these images, on all processes, each of which computes a share of the passes."""

        def look(images: ImageFiles, _: Requests) -> bytes:
            return torch.cat(list(self._clip(images))).cpu().numpy().tobytes()

        found = folder.look([rows[start : start + BATCH] for start in range(0, len(rows), BATCH)], look)
        each = [np.frombuffer(data, np.float32).reshape(len(part), -1) for part, data in found]
        return np.concatenate(each) if each else np.zeros((0, 1), np.float32)


def _first_prompts(rows: Requests) -> list[ImageRequest]:
    chosen = set(sorted({row.prompt for row in rows})[:MOST_PROMPTS])
    return [row for row in rows if row.prompt in chosen]
