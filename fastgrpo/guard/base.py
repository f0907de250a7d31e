"""What the policy's pictures of positive prompts are compared with: the base model's of the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.guard.alarm import ALIGNMENT, BETWEEN, WITHIN, Comparison
from fastgrpo.guard.diversity import between_distance, mean_features, within_distance

_LEAST_SPREAD = 1e-6  # of features that are all the same: rounding


@dataclass(frozen=True)
class BaseStatistics:
    """Of the base model's pictures of N positive prompts, on the CPU, float64.

    places: a prompt's id -> its row. within: [N], its pictures' distance. means: [N, D], their mean features.
    between: the mean distance of pictures of different prompts. texts: [N, D], the prompts' own features z_text.
    spread: the standard deviation of z . z_text within a prompt, pooled over prompts.
    """

    places: dict[int, int]
    within: Tensor
    means: Tensor
    between: float
    texts: Tensor
    spread: float

    @classmethod
    def of(cls, ids: Sequence[int], features: Tensor, texts: Tensor) -> "BaseStatistics":
        """ids: of N prompts, at least 2. features: [N, K, D] unit vectors of K pictures each, at least 2.

        texts: [N, D] unit vectors.
        """
        features, texts = features.detach().cpu(), texts.detach().cpu().double()
        means, places = mean_features(features), {each: place for place, each in enumerate(ids)}
        matches = torch.einsum("nkd,nd->nk", features.double(), texts)
        spread = max(float(matches.var(dim=1).mean().sqrt()), _LEAST_SPREAD)
        return cls(places, within_distance(features), means, float(between_distance(means)), texts, spread)

    @property
    def untrained(self) -> dict[str, Comparison]:
        """How the base model compares with itself: what a policy that has not moved is expected to."""
        within, alignment = float(self.within.mean()), self._alignment(self.means, torch.arange(len(self.means)))
        return {
            WITHIN: Comparison(within, within, 0),
            BETWEEN: Comparison(self.between, self.between, 0),
            ALIGNMENT: Comparison(alignment, alignment, 0),
        }

    def compare(self, ids: Sequence[int], features: Tensor) -> dict[str, Comparison]:
        """The policy's pictures of P positive prompts beside the base model's.

        ids: of the prompts, at least 2. features: [P, G, D] unit vectors. Where the base model has not drawn a prompt,
        the mean over all that it has drawn stands for it, but for the alignment, which is of the others alone.
        """
        features = features.detach().cpu()
        means, known = mean_features(features), [self.places.get(each, -1) for each in ids]
        rows = torch.tensor([place for place in known if place >= 0], dtype=torch.int64)
        there = torch.tensor([place >= 0 for place in known])
        count, shared = len(ids), len(rows)
        base_within = self.within[rows].sum() + (count - shared) * self.within.mean()
        pairs, known_pairs = count * (count - 1), shared * (shared - 1)
        base_between = self.between
        if known_pairs:
            own = float(between_distance(self.means[rows]))
            base_between = (known_pairs * own + (pairs - known_pairs) * self.between) / pairs
        found = {
            WITHIN: Comparison(float(within_distance(features).mean()), float(base_within) / count, count),
            BETWEEN: Comparison(float(between_distance(means)), base_between, count),
        }
        if shared:
            own, base_own = self._alignment(means[there], rows), self._alignment(self.means[rows], rows)
            found[ALIGNMENT] = Comparison(own, base_own, shared)
        return found

    def _alignment(self, means: Tensor, rows: Tensor) -> float:
        """The mean of z . z_text in units of `spread`. means: [M, D], mean features for the prompts of these M rows."""
        return float((means * self.texts[rows]).sum(dim=-1).mean()) / self.spread
