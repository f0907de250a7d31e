"""Which prompts an iteration draws, and that texts are embedded once."""

from collections import Counter

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo.config import ConfigError, PromptsConfig
from fastgrpo.prompts import PromptSource, embed
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

# isort: split
import torch


def pool(count: int, label: str) -> list[Prompt]:
    return [Prompt(f"{label} {i}", label, id=i) for i in range(count)]


def source(positives: int, negatives: int, per_iteration: int, fraction: float = 0.5, seed: int = 0) -> PromptSource:
    config = PromptsConfig(negative_fraction=fraction)
    return PromptSource(pool(positives, POSITIVE), pool(negatives, NEGATIVE), config, seed, per_iteration)


# --- which prompts ---------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_iteration_only():
    onward = source(23, 31, 8)
    batches = [onward.batch(i) for i in range(40)]
    for i in reversed(range(40)):
        assert source(23, 31, 8).batch(i) == batches[i]
    assert source(23, 31, 8, seed=1).batch(0) != batches[0]


@pytest.mark.parametrize(
    ("per_iteration", "fraction", "negatives"), [(8, 0.5, 4), (8, 0.0, 0), (8, 1.0, 8), (10, 0.33, 3), (6, 0.6, 4)]
)
def test_share_of_negatives_and_order(per_iteration, fraction, negatives):
    labels = [p.label for p in source(30, 30, per_iteration, fraction).batch(3)]
    assert labels == [POSITIVE] * (per_iteration - negatives) + [NEGATIVE] * negatives


# Pools that iterations divide and do not divide, down to one that is only just as large as an iteration needs.
@pytest.mark.parametrize("size", [4, 5, 7, 8, 9, 11, 16, 23, 101])
def test_every_prompt_equally_often_and_none_twice_in_an_iteration(size):
    dealt = Counter()
    deal = source(size, size, 8)
    for iteration in range(60):
        batch = deal.batch(iteration)
        assert len(set(batch)) == 8
        dealt.update(p.id for p in batch if p.label == NEGATIVE)
        assert dealt.total() == 4 * (iteration + 1)
        counts = [dealt[i] for i in range(size)]
        assert max(counts) - min(counts) <= 1


def test_each_epoch_has_its_own_order():
    deal = source(12, 12, 8)  # three iterations an epoch
    epochs = [[p.id for i in range(3) for p in deal.batch(3 * e + i)[4:]] for e in range(4)]
    assert all(sorted(order) == list(range(12)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


def test_labels_are_shuffled_independently():
    deal = source(50, 50, 20)
    batch = deal.batch(0)
    assert [p.id for p in batch[:10]] != [p.id for p in batch[10:]]


def test_a_pool_smaller_than_an_iteration_is_repeated_evenly():
    deal = source(3, 50, 16)
    counts = Counter(p.id for p in deal.batch(7) if p.label == POSITIVE)
    assert sorted(counts.values()) == [2, 3, 3]
    assert len(deal.batch(7)) == 16


def test_a_label_without_prompts_is_refused_only_when_asked_for():
    with pytest.raises(ConfigError, match=r"negative_fraction: 0\.5 asks for 4 negative"):
        source(5, 0, 8)
    assert len(source(8, 0, 8, fraction=0.0).batch(0)) == 8


# --- embeddings ------------------------------------------------------------------------------------------------------


class CountingPolicy:
    """Embeds a text by its length; remembers what it was asked for."""

    def __init__(self):
        self.asked: list[str] = []

    def encode(self, texts):
        self.asked += texts
        return torch.stack([torch.full((5, 2), float(len(text))) for text in texts])


def test_texts_are_embedded_once_and_in_order():
    policy, cache = CountingPolicy(), {}
    first = embed(policy, [Prompt("abc", POSITIVE), Prompt("z", NEGATIVE), Prompt("abc", NEGATIVE)], cache)
    second = embed(policy, [Prompt("z", NEGATIVE), Prompt("four", POSITIVE)], cache)
    assert first.embeds.shape == (3, 5, 2)
    assert first.embeds[:, 0, 0].tolist() == [3.0, 1.0, 3.0]
    assert second.embeds[:, 0, 0].tolist() == [1.0, 4.0]
    assert first.negative.tolist() == [False, True, True]
    assert sorted(policy.asked) == ["abc", "four", "z"]
