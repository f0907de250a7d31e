"""The Vendi score where it is known in closed form, and its influence function against differences."""

import numpy as np
import pytest

from fastgrpo.evaluation.metrics.vendi import vendi


def features(count: int, dim: int) -> np.ndarray:
    values = np.random.default_rng(count).normal(size=(count, dim)) + 1.0
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def by_similarities(features: np.ndarray, weights: np.ndarray) -> float:
    """From the eigenvalues of the similarities, as the score is defined; images count by their weights, of sum 1."""
    root = np.sqrt(weights)
    values = np.linalg.eigvalsh(root[:, None] * (features @ features.T) * root[None])
    values = values[values > 1e-15]
    return float(np.exp(-(values * np.log(values)).sum()))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_closed_forms(count: int) -> None:
    alike = np.tile(np.float32([0.6, 0.8, 0.0]), (count, 1))
    assert vendi(alike).score == pytest.approx(1.0, abs=1e-6)  # float32's unit vectors
    assert vendi(np.eye(count, 10)).score == pytest.approx(count, rel=1e-12)
    assert np.abs(vendi(np.eye(count, 10)).influence).max() < 1e-12


def test_two_images_by_their_cosine() -> None:
    """The eigenvalues of [[1, c], [c, 1]] / 2 are (1 + c) / 2 and (1 - c) / 2."""
    for cosine in (-0.3, 0.2, 0.9):
        halves = np.array([(1 + cosine) / 2, (1 - cosine) / 2])
        found = vendi(np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])).score
        assert found == pytest.approx(float(np.exp(-(halves * np.log(halves)).sum())), rel=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(5, 12), (12, 5)])
def test_the_score_and_the_influence_of_an_image(count: int, dim: int) -> None:
    own, even = features(count, dim), np.full(count, 1 / count)
    found = vendi(own)
    assert found.score == pytest.approx(by_similarities(own, even), rel=1e-10)
    assert found.influence.mean() == pytest.approx(0.0, abs=1e-12)
    step = 1e-5
    for i in range(count):
        ends = [np.log(by_similarities(own, (1 - e) * even + e * np.eye(count)[i])) for e in (step, -step)]
        # The differences' own error is step^2 = 1e-10 times third derivatives, and 1e-16 / step of rounding.
        assert found.influence[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)
