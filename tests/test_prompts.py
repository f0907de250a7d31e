"""Which prompts an iteration draws, how files are read, and that texts are embedded once."""

from collections import Counter

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo.config import ConfigError, PromptsConfig
from fastgrpo.prompts import PromptSource, embed, load_prompts, read_prompt_file
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


# --- files -----------------------------------------------------------------------------------------------------------


def test_lines_become_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  ein Hündchen \n\n   \na line\u2028separator".encode())
    assert read_prompt_file(path, NEGATIVE) == [
        Prompt("a cat", NEGATIVE, id=1),
        Prompt("ein Hündchen", NEGATIVE, id=3),
        Prompt("a line\u2028separator", NEGATIVE, id=6),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"\n  \r\n\t\n", "holds no prompt"),
        (b"\xef\xbb\xbf\n", "holds no prompt"),
        (b"a cat\na d\x00g\n", "NUL byte in line 2"),
        ("a cat\n".encode("utf-16"), "NUL byte in line 1"),
        (b"a cat\nb\nH\xfcndchen\n", "byte 0xfc in line 3, offset 9"),
        (b"a cat\n\xe2\x82", "byte 0xe2 in line 2, offset 6"),
    ],
)
def test_bad_files(tmp_path, content, says):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"prompts\.negative: '.*prompts\.txt' .*{says}"):
        read_prompt_file(path, NEGATIVE)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.positive: cannot read '.*none\.txt' \(No such file"):
        read_prompt_file(tmp_path / "none.txt", POSITIVE)
    with pytest.raises(ConfigError, match=r"\(Is a directory\)"):
        read_prompt_file(tmp_path, POSITIVE)


def test_files_and_shapes_can_be_mixed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n")
    positives, negatives = load_prompts(PromptsConfig(positive=str(path), negative="shapes", categories=("shocking",)))
    assert [p.text for p in positives] == ["a cat", "a dog"]
    assert {p.label for p in positives} == {POSITIVE}
    assert {p.category for p in negatives} == {"shocking"}
    assert {p.label for p in negatives} == {NEGATIVE}


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
