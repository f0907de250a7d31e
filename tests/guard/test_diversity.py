"""Distances of pictures against loops over pairs in float64, and the policy's beside the base model's."""

import math
from itertools import combinations, product
from statistics import variance

import pytest
import torch
import torch.nn.functional as F

from fastgrpo.guard.alarm import ALIGNMENT, BETWEEN, WITHIN
from fastgrpo.guard.base import BaseStatistics, Matches
from fastgrpo.guard.diversity import between_distance, mean_features, within_distance

ROUNDING = 1e-6  # of float32 unit vectors, whose squared length is off 1 by some 1e-7


def unit_vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32, around one direction each prompt, as an encoder's are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(shape[0], 1, shape[-1], generator=generator)
    return F.normalize(centres + torch.randn(shape, generator=generator), dim=-1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return 1 - float(F.cosine_similarity(a.double(), b.double(), dim=0))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def within_by_pairs(images: torch.Tensor) -> float:
    return mean([distance(a, b) for a, b in combinations(images, 2)])


def between_by_pairs(features: torch.Tensor) -> float:
    """Over the images of every two prompts."""
    return mean([distance(a, b) for one, other in combinations(features, 2) for a, b in product(one, other)])


@pytest.mark.parametrize("group", [2, 5])
def test_distances_are_means_over_pairs(group: int) -> None:
    features = unit_vectors(4, group, 7)
    within = [within_by_pairs(images) for images in features]
    assert within_distance(features).tolist() == pytest.approx(within, abs=ROUNDING)
    assert float(between_distance(mean_features(features))) == pytest.approx(between_by_pairs(features), abs=ROUNDING)


def test_closed_forms() -> None:
    """Equal pictures are 0 apart, orthogonal ones 1, opposite ones 2."""
    e = torch.eye(3)
    alike, orthogonal, opposite = e[:1].expand(2, 3), e[:2], torch.stack([e[0], -e[0]])
    assert within_distance(torch.stack([alike, orthogonal, opposite])).tolist() == [0, 1, 2]
    assert float(between_distance(mean_features(torch.stack([alike, e[1:2].expand(2, 3)])))) == 1


BASE = unit_vectors(5, 2, 7, seed=2)
TEXTS = unit_vectors(5, 1, 7, seed=5)[:, 0]
IDS = (3, 14, 15, 92, 65)


def match(row: int, image: torch.Tensor) -> float:
    return 1 - distance(image, TEXTS[row])


def expected_matches(base: torch.Tensor) -> tuple[list[float], float, float, float]:
    """Of each prompt, drawn towards the mean, number by number; then the spread, the mean and the share of its own."""
    own = [[match(row, image) for image in base[row]] for row in range(len(base))]
    means, noise = [mean(each) for each in own], mean([variance(each) for each in own])
    between = max(variance(means) - noise / len(own[0]), 0)
    shrink = between / (between + noise / len(own[0]))
    middle = mean(means)
    return [middle + shrink * (each - middle) for each in means], math.sqrt(noise), middle, shrink


def test_a_policy_that_draws_what_the_base_model_draws_is_as_diverse() -> None:
    statistics = BaseStatistics.of(IDS, BASE, TEXTS)
    rows = [2, 0, 4]
    found = statistics.compare([15, 3, 65], BASE[rows], TEXTS[rows])
    for name in (WITHIN, BETWEEN):
        assert found[name].policy == pytest.approx(found[name].base, rel=1e-12)
        assert found[name].prompts == 3
    every = statistics.compare(IDS, BASE, TEXTS)[ALIGNMENT]
    assert every.policy == pytest.approx(every.base, rel=1e-12)
    assert every.prompts == 5


def test_the_base_model_is_asked_about_the_same_prompts() -> None:
    statistics, pictures = BaseStatistics.of(IDS, BASE, TEXTS), unit_vectors(3, 4, 7, seed=3)
    rows = [3, 1, 0]
    found = statistics.compare([92, 14, 3], pictures, TEXTS[rows])
    within = mean([within_by_pairs(BASE[row]) for row in rows])
    assert found[WITHIN].policy == pytest.approx(mean([within_by_pairs(each) for each in pictures]), abs=ROUNDING)
    assert found[WITHIN].base == pytest.approx(within, abs=ROUNDING)
    assert found[BETWEEN].base == pytest.approx(between_by_pairs(BASE[rows]), abs=ROUNDING)
    expected, spread, _, shrink = expected_matches(BASE)
    assert 0.1 < shrink < 0.9
    ours = mean([match(row, image) for row, each in zip(rows, pictures, strict=True) for image in each])
    assert found[ALIGNMENT].policy == pytest.approx(ours / spread, abs=ROUNDING / spread)
    assert found[ALIGNMENT].base == pytest.approx(mean([expected[row] for row in rows]) / spread, abs=ROUNDING / spread)
    assert found[ALIGNMENT].prompts == 3


def test_the_mean_stands_for_prompts_that_the_base_model_has_not_drawn() -> None:
    statistics, pictures = BaseStatistics.of(IDS, BASE, TEXTS), unit_vectors(3, 4, 7, seed=3)
    rows = [3, 2, 0]  # the second goes by an id that the base model has not drawn
    found = statistics.compare([92, 1000, 3], pictures, TEXTS[rows])
    every = mean([within_by_pairs(each) for each in BASE])
    assert found[WITHIN].base == pytest.approx(
        mean([within_by_pairs(BASE[3]), every, within_by_pairs(BASE[0])]), abs=ROUNDING
    )
    known, others = between_by_pairs(BASE[[3, 0]]), between_by_pairs(BASE)
    assert found[BETWEEN].base == pytest.approx((known + 2 * others) / 3, abs=ROUNDING)
    expected, spread, middle, shrink = expected_matches(BASE)
    # In units of a picture's variance: of the policy's four pictures, and of what is expected of the prompt.
    between = shrink / (1 - shrink) / BASE.shape[1]
    worth = (1 / 4 + shrink / BASE.shape[1]) / (1 / 4 + between)
    assert 0 < worth < 1
    weights = [1, worth, 1]

    def weighted(values: list[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights) / spread

    ours = [mean([match(row, image) for image in each]) for row, each in zip(rows, pictures, strict=True)]
    assert found[ALIGNMENT].prompts == pytest.approx(2 + worth, rel=1e-4)
    assert found[ALIGNMENT].policy == pytest.approx(weighted(ours), abs=ROUNDING / spread)
    theirs = weighted([expected[3], middle, expected[0]])
    assert found[ALIGNMENT].base == pytest.approx(theirs, abs=ROUNDING / spread)


@pytest.mark.parametrize(("between", "pictures"), [(0.7, 4), (1.5, 2), (0.2, 2)])
def test_what_is_expected_of_a_prompt_is_as_uncertain_as_it_says(between: float, pictures: int) -> None:
    """Prompts whose true means are known: the errors are those stated, and smaller than that of the plain mean."""
    generator = torch.Generator().manual_seed(1)
    count, spread = 2_000_000, 0.3
    truth = 0.4 + spread * between * torch.randn(count, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, pictures, generator=generator, dtype=torch.float64)
    matches = Matches.of(truth[:, None] + spread * noise)
    expected = matches.mean + matches.shrink * (matches.own - matches.mean)
    error = float((expected - truth).square().mean()) / spread**2
    # Variances of n numbers are uncertain by sqrt(2 / n), 0.1%. What is left of two of them, at worst 0.04 of 0.54 and
    # 0.5, is so by 0.001 * sqrt(0.54^2 + 0.5^2) / 0.04, 1.8%, and the shares with it: five times that.
    assert matches.known == pytest.approx(error, rel=0.1)
    assert matches.unknown == pytest.approx(between**2, rel=0.1)
    assert error < 0.95 / pictures


def test_prompts_that_match_alike_are_expected_alike() -> None:
    """No prompt differs from another by more than its pictures do: every one counts the same, drawn or not."""
    matches = Matches.of(torch.tensor([[0.1, 0.5], [0.5, 0.1], [0.3, 0.3]], dtype=torch.float64))
    assert (matches.shrink, matches.known, matches.unknown) == (0, 0, 0)
    found = matches.compare(torch.tensor([0.3, 0.5], dtype=torch.float64), 4, [-1, 2])
    assert (found.prompts, found.base) == (2, pytest.approx(0.3 / matches.spread))


def test_collapsed_pictures_are_seen() -> None:
    """One picture for all prompts is not diverse at all; pictures of the prompts' opposite match them less."""
    statistics = BaseStatistics.of(IDS, BASE, TEXTS)
    one = F.normalize(-BASE.mean(dim=(0, 1)), dim=0).expand(3, 4, 7)
    found = statistics.compare(IDS[:3], one, TEXTS[:3])
    assert found[WITHIN].policy == pytest.approx(0, abs=ROUNDING)
    assert found[BETWEEN].policy == pytest.approx(0, abs=ROUNDING)
    opposite = statistics.compare(IDS, -TEXTS[:, None].expand(5, 2, 7), TEXTS)[ALIGNMENT]
    spread = statistics.matches.spread
    assert opposite.policy == pytest.approx(-1 / spread, abs=ROUNDING / spread)
