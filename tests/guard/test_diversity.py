"""Distances of pictures against loops over pairs in float64, and the policy's beside the base model's."""

import math
from itertools import combinations, product
from statistics import variance

import pytest
import torch
import torch.nn.functional as F

from fastgrpo.guard.alarm import ALIGNMENT, BETWEEN, WATCHED, WITHIN
from fastgrpo.guard.base import BaseStatistics
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


def test_a_policy_that_draws_what_the_base_model_draws_is_as_diverse() -> None:
    found = BaseStatistics.of(IDS, BASE, TEXTS).compare([15, 3, 65], BASE[[2, 0, 4]])
    for name in WATCHED:
        assert found[name].policy == pytest.approx(found[name].base, rel=1e-12)
        assert found[name].prompts == 3


def test_the_base_model_is_asked_about_the_same_prompts() -> None:
    statistics, pictures = BaseStatistics.of(IDS, BASE, TEXTS), unit_vectors(3, 4, 7, seed=3)
    found, rows = statistics.compare([92, 14, 3], pictures), [3, 1, 0]
    within = mean([within_by_pairs(BASE[row]) for row in rows])
    assert found[WITHIN].policy == pytest.approx(mean([within_by_pairs(each) for each in pictures]), abs=ROUNDING)
    assert found[WITHIN].base == pytest.approx(within, abs=ROUNDING)
    assert found[BETWEEN].base == pytest.approx(between_by_pairs(BASE[rows]), abs=ROUNDING)
    spread = math.sqrt(
        mean([variance([1 - distance(image, TEXTS[row]) for image in BASE[row]]) for row in range(len(BASE))])
    )
    matches = [1 - distance(image, TEXTS[row]) for row, each in zip(rows, pictures, strict=True) for image in each]
    assert found[ALIGNMENT].policy == pytest.approx(mean(matches) / spread, abs=ROUNDING / spread)
    own = [1 - distance(image, TEXTS[row]) for row in rows for image in BASE[row]]
    assert found[ALIGNMENT].base == pytest.approx(mean(own) / spread, abs=ROUNDING / spread)


def test_the_mean_stands_for_prompts_that_the_base_model_has_not_drawn() -> None:
    statistics, pictures = BaseStatistics.of(IDS, BASE, TEXTS), unit_vectors(3, 4, 7, seed=3)
    found = statistics.compare([92, 1000, 3], pictures)
    every = mean([within_by_pairs(each) for each in BASE])
    assert found[WITHIN].base == pytest.approx(
        mean([within_by_pairs(BASE[3]), every, within_by_pairs(BASE[0])]), abs=ROUNDING
    )
    known, others = between_by_pairs(BASE[[3, 0]]), between_by_pairs(BASE)
    assert found[BETWEEN].base == pytest.approx((known + 2 * others) / 3, abs=ROUNDING)
    assert found[ALIGNMENT].prompts == 2
    assert ALIGNMENT not in statistics.compare([1000, 1001], pictures[:2])


def test_collapsed_pictures_are_seen() -> None:
    """One picture for all prompts is not diverse at all; pictures of the prompts' opposite match them less."""
    statistics = BaseStatistics.of(IDS, BASE, TEXTS)
    one = F.normalize(-BASE.mean(dim=(0, 1)), dim=0).expand(3, 4, 7)
    found = statistics.compare(IDS[:3], one)
    assert found[WITHIN].policy == pytest.approx(0, abs=ROUNDING)
    assert found[BETWEEN].policy == pytest.approx(0, abs=ROUNDING)
    opposite = statistics.compare(IDS, -TEXTS[:, None].expand(5, 2, 7))[ALIGNMENT]
    assert opposite.policy == pytest.approx(-1 / statistics.spread, abs=ROUNDING / statistics.spread)
