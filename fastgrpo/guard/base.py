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
    """Of the base model's pictures of N positive prompts, K each, on the CPU, float64.

    places: a prompt's id -> its row. within: [N], its pictures' distance. means: [N, D], their mean features.
    between: the mean distance of pictures of different prompts. matches: how well pictures match their prompts.
    """

    places: dict[int, int]
    within: Tensor
    means: Tensor
    between: float
    matches: "Matches"

    @classmethod
    def of(cls, ids: Sequence[int], features: Tensor, texts: Tensor) -> "BaseStatistics":
        """ids: of N prompts, at least 2. features: [N, K, D] unit vectors of K pictures each, at least 2.

        texts: [N, D] unit vectors, the prompts' own.
        """
        features, texts = features.detach().cpu(), texts.detach().cpu().double()
        means, places = mean_features(features), {each: place for place, each in enumerate(ids)}
        matches = Matches.of(torch.einsum("nkd,nd->nk", features.double(), texts))
        return cls(places, within_distance(features), means, float(between_distance(means)), matches)

    @property
    def untrained(self) -> dict[str, Comparison]:
        """How the base model compares with itself: what a policy that has not moved is expected to."""
        within, match = float(self.within.mean()), self.matches.mean / self.matches.spread
        return {
            WITHIN: Comparison(within, within, 0),
            BETWEEN: Comparison(self.between, self.between, 0),
            ALIGNMENT: Comparison(match, match, 0),
        }

    def compare(self, ids: Sequence[int], features: Tensor, texts: Tensor) -> dict[str, Comparison]:
        """The policy's pictures of P positive prompts beside the base model's.

        ids: of the prompts, at least 2. features: [P, G, D] unit vectors. texts: [P, D], the prompts' own.
        Where the base model has not drawn a prompt, the mean over all that it has drawn stands for it.
        """
        features, texts = features.detach().cpu(), texts.detach().cpu().double()
        means, known = mean_features(features), [self.places.get(each, -1) for each in ids]
        rows = torch.tensor([place for place in known if place >= 0], dtype=torch.int64)
        count, shared = len(ids), len(rows)
        base_within = self.within[rows].sum() + (count - shared) * self.within.mean()
        pairs, known_pairs = count * (count - 1), shared * (shared - 1)
        base_between = self.between
        if known_pairs:
            own = float(between_distance(self.means[rows]))
            base_between = (known_pairs * own + (pairs - known_pairs) * self.between) / pairs
        return {
            WITHIN: Comparison(float(within_distance(features).mean()), float(base_within) / count, count),
            BETWEEN: Comparison(float(between_distance(means)), base_between, count),
            ALIGNMENT: self.matches.compare((means * texts).sum(dim=-1), features.shape[1], known),
        }


@dataclass(frozen=True)
class Matches:
    """How well the base model's pictures match their prompts: m = z . z_text, for N prompts with K pictures each.

    Prompts differ, and a prompt's mean of K pictures is uncertain. So what a prompt is expected to have is its own mean
    drawn towards that of all (James-Stein; Efron and Morris 1975, DOI 10.1080/01621459.1975.10479864), and of a prompt
    that was not drawn it is the mean of all:

        between^2 = max(var(own) - spread^2 / K, 0)       shrink = between^2 / (between^2 + spread^2 / K)
        expected  = mean + shrink * (own - mean)          error of it: shrink * spread^2 / K, or between^2

    own: [N] float64, each prompt's mean. mean: of these. spread: the standard deviation of a prompt's pictures, pooled
    over prompts. shrink: from 0, prompts are alike, to 1. known, unknown: the errors, in units of spread^2.
    """

    own: Tensor
    mean: float
    spread: float
    shrink: float
    known: float
    unknown: float

    @classmethod
    def of(cls, matches: Tensor) -> "Matches":
        """matches: [N, K] float64, at least 2 each."""
        own, pictures = matches.mean(dim=1), matches.shape[1]
        noise = max(float(matches.var(dim=1).mean()), _LEAST_SPREAD**2)
        between = max(float(own.var()) - noise / pictures, 0.0)
        shrink = between / (between + noise / pictures)
        return cls(own, float(own.mean()), noise**0.5, shrink, shrink / pictures, between / noise)

    def compare(self, policy: Tensor, pictures: int, places: Sequence[int]) -> Comparison:
        """The policy's means of P prompts beside what they are expected to be, in units of `spread`.

        policy: [P] float64, of so many pictures each. places: the prompts' rows, -1 for one that was not drawn, which
        counts for less, as the error of its expectation is larger: it is worth that much of a prompt.
        """
        rows = torch.tensor(places)
        drawn = rows >= 0
        expected = torch.where(drawn, self.mean + self.shrink * (self.own[rows.clamp(min=0)] - self.mean), self.mean)
        worth = (1 / pictures + self.known) / (1 / pictures + self.unknown)
        weights = torch.where(drawn, 1.0, worth).double()
        total = float(weights.sum())
        ours, theirs = (float((weights * each).sum()) / total / self.spread for each in (policy, expected))
        return Comparison(ours, theirs, total)
