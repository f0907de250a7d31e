"""Which prompts an iteration draws, that texts are embedded once, which are too long, and the prompts that ship."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo.prompts import PromptSource, embed, truncated, truncation_lines
from fastgrpo.prompts.geneval import CLASSES, COLORS, NUMBERS, geneval_metadata, geneval_prompts, phrase
from fastgrpo.prompts.loading import unsafe_prompts
from fastgrpo.settings.schema import PromptsConfig
from fastgrpo.shapes.world import HAZARDS, TASKS
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support import GENEVAL_METADATA

# isort: split
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from transformers import CLIPTokenizer


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


@pytest.mark.parametrize(
    ("per_iteration", "fraction", "left_out", "enough"),
    [
        (1, 0.5, "negative", 2),  # half of one is rounded to the even 0
        (1, 0.51, "positive", 2),
        (2, 0.2, "negative", 3),
        (4, 0.1, "negative", 6),
        (4, 0.9, "positive", 5),
        (8, 1e-9, "negative", None),
        (2, 0.5, "", None),
        (3, 0.2, "", None),
        (8, 0.0, "", None),  # as asked for
        (8, 1.0, "", None),
        (1, 0.0, "", None),
        (1, 1.0, "", None),
    ],
)
def test_a_label_that_rounding_leaves_out_is_named(per_iteration, fraction, left_out, enough):
    found = source(9, 9, per_iteration, fraction)
    drawn = {prompt.label for i in range(20) for prompt in found.batch(i)}
    if not left_out:
        assert found.warning == ""
        assert len(drawn) == 2 or fraction in (0, 1)
        return
    assert left_out not in drawn
    negative = per_iteration if left_out == "positive" else 0
    assert found.warning.startswith(
        f"prompts_per_iteration {per_iteration} and prompts.negative_fraction {fraction} are, rounded, {negative} "
        f"negative prompts an iteration, so that no {left_out} one is ever drawn"
    )
    assert ("with prompts_per_iteration" in found.warning) == (enough is not None)
    if enough:
        assert found.warning.endswith(f"; with prompts_per_iteration {enough} both are")
        assert len({prompt.label for prompt in source(9, 9, enough, fraction).batch(0)}) == 2


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
    assert sorted(policy.asked) == ["abc", "four", "z"]


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()  # CLIP's own 49408 tokens, which come with open_clip


@pytest.fixture(scope="module")
def clip_tokenizer(open_clip_tokenizer) -> CLIPTokenizer:
    """A Stable Diffusion's tokenizer, made of the same 49408 tokens."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in open_clip_tokenizer.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(open_clip_tokenizer.bpe_ranks), model_max_length=77)


@pytest.fixture(scope="module")
def tokenizers(open_clip_tokenizer, clip_tokenizer, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tokenizer")
    clip_tokenizer.save_pretrained(folder)
    wrapped = HFTokenizer(str(folder), context_length=77)
    return {"simple": open_clip_tokenizer, "clip": clip_tokenizer, "wrapped": wrapped}


@pytest.mark.parametrize("name", ["simple", "clip", "wrapped"])
def test_77_tokens_fit_and_78_do_not(tokenizers, name):
    # "cat" is one token, so is every digit, and two more begin and end the text; spaces are none.
    texts = ["", "cat", "cat " * 74, "cat " * 75, "  cat " * 75, "1" * 75, "cat " * 76, "1" * 76, "cat " * 200]
    assert truncated(tokenizers[name], texts) == [6, 7, 8]
    assert truncated(tokenizers[name], texts[::-1]) == [0, 1, 2]
    assert truncated(tokenizers[name], []) == []


def test_truncated_is_what_the_tokenizers_themselves_cut(tokenizers):
    words = ["photograph", "antidisestablishmentarianism,", "Überfall", "4.5", "&amp;", "naïve", "\u732b", "HELLO"]
    texts = [" ".join((words * 20)[i : i + n]) for n in range(8, 60) for i in range(4)]
    for name in ("simple", "wrapped"):  # a longer context has room for what a shorter one cuts
        short, long = tokenizers[name](texts, context_length=77), tokenizers[name](texts, context_length=78)
        cut = [i for i in range(len(texts)) if not torch.equal(short[i], long[i, :77])]
        assert truncated(tokenizers[name], texts) == cut
        assert 20 < len(cut) < len(texts) - 20
    clip = tokenizers["clip"]
    cut = [i for i, text in enumerate(texts) if clip(text, truncation=True).input_ids != clip(text).input_ids]
    assert truncated(clip, texts) == cut


def test_what_is_said_of_long_prompts(open_clip_tokenizer, clip_tokenizer):
    fits, long = "a cat", "a photograph of " + "cats and " * 60
    assert truncation_lines([fits] * 9, clip_tokenizer, open_clip_tokenizer) == []
    shown = "'a photograph of cats and cats and cats and cats and cats and...'"
    assert truncation_lines([fits, long, fits, long], clip_tokenizer) == [
        f"2 of 4 prompts, such as {shown}, are longer than the text encoder's 77 tokens; the rest of them is not seen."
    ]
    shorter = SimpleTokenizer(context_length=5)
    assert truncation_lines(["a cat and a dog", long], clip_tokenizer, shorter) == [
        f"1 of 2 prompts, {shown}, is longer than the text encoder's 77 tokens; the rest of it is not seen.",
        "2 of 2 prompts, such as 'a cat and a dog', are longer than the reward encoder's 5 tokens; the rest of them is "
        "not seen.",
    ]


# --- geneval ---------------------------------------------------------------------------------------------------------


def asked_for(row: dict) -> frozenset:
    """What a prompt asks for, whatever the order of its things and their relation."""
    return frozenset((thing["class"], thing["count"], thing.get("color")) for thing in row["include"])


def official_rows() -> list[dict]:
    default = GENEVAL_METADATA
    path = Path(os.environ.get("FASTGRPO_GENEVAL_METADATA", default))
    if not path.is_file():
        pytest.skip(
            "GenEval's own prompts are not here; FASTGRPO_GENEVAL_METADATA names their evaluation_metadata.jsonl"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_grammar_is_that_of_geneval():
    rows = official_rows()
    assert len(rows) == 553
    assert ["a photo of " + phrase(row["include"], literal=True) for row in rows] == [row["prompt"] for row in rows]
    ours = {row["tag"]: row for row in geneval_metadata(1, held_out=True)}
    for row in rows:
        assert list(row) == list(ours[row["tag"]])
        assert [list(thing) for thing in row["include"]] == [list(thing) for thing in ours[row["tag"]]["include"]]
        for thing in row["include"]:
            assert thing["class"] in CLASSES
            assert thing.get("color", "red") in COLORS
        if row["tag"] == "counting":
            thing = row["include"][0]
            assert thing["count"] in NUMBERS
            assert row["exclude"] == [{"class": thing["class"], "count": thing["count"] + 1}]


def test_what_training_shares_with_geneval():
    """The numbers that the module's docstring tells."""
    rows, training = official_rows(), geneval_metadata(1000)
    assert {row["prompt"] for row in rows}.isdisjoint(row["prompt"] for row in training)
    shared = {}
    for task in TASKS:
        seen = [row["include"] for row in training if row["tag"] == task]
        shared[task] = sum(row["include"] in seen for row in rows if row["tag"] == task)
    assert shared == dict(zip(TASKS, (80, 13, 55, 61, 3, 1), strict=True))


@pytest.mark.parametrize(
    ("include", "english", "literal"),
    [
        ([("person", 3)], "three people", "three persons"),
        ([("sheep", 2)], "two sheep", "two sheeps"),
        ([("knife", 4)], "four knives", "four knifes"),
        ([("bench", 2)], "two benches", "two benchs"),
        ([("toothbrush", 2)], "two toothbrushes", "two toothbrushs"),
        ([("wine glass", 2)], "two wine glasses", "two wine glasses"),
        ([("bus", 4)], "four buses", "four buses"),
        ([("computer mouse", 2)], "two computer mice", "two computer mouses"),
        ([("couch", 2)], "two couches", "two couchs"),
        ([("skis", 2)], "two pairs of skis", "two skises"),
        ([("scissors", 1)], "a pair of scissors", "a scissors"),
        ([("skis", 1, "orange")], "a pair of orange skis", "an orange skis"),
        ([("umbrella", 1), ("tv remote", 1)], "an umbrella and a tv remote", "an umbrella and a tv remote"),
        ([("apple", 1, "red"), ("cow", 1, "orange")], "a red apple and an orange cow", "a red apple and an orange cow"),
    ],
)
def test_articles_and_plurals(include, english, literal):
    include = [dict(zip(("class", "count", "color"), thing, strict=False)) for thing in include]
    assert phrase(include) == english
    assert phrase(include, literal=True) == literal


def test_the_second_thing_stands_first_in_a_position():
    include = [{"class": "oven", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    assert phrase(include) == "a dog left of an oven"


def test_training_prompts_are_balanced_and_differ():
    prompts = geneval_prompts()
    assert Counter(p.category for p in prompts) == dict.fromkeys(TASKS, 1000)
    assert [p.id for p in prompts] == list(range(1, 6001))
    assert {p.label for p in prompts} == {POSITIVE}
    assert len({p.text for p in prompts}) == 6000
    for task in TASKS:  # no combination comes again before all others
        often = Counter(json.dumps(row["include"]) for row in geneval_metadata(1000) if row["tag"] == task)
        assert max(often.values()) - min(often.values()) <= 1
    # A class begins a prompt of these tasks 1000 / 80 = 12.5 times on average, never in exp(-12.5) = 4e-6 of all cases.
    for task in ("two_object", "position", "color_attr"):
        classes = {row["include"][0]["class"] for row in geneval_metadata(1000) if row["tag"] == task}
        assert classes == set(CLASSES) - ({"person"} if task == "color_attr" else set())


def test_training_prompts_are_a_function_of_the_seed():
    digest = hashlib.sha256("\n".join(p.text for p in geneval_prompts()).encode()).hexdigest()
    assert digest[:16] == "a4968df5211c6b68"
    assert geneval_prompts(50, seed=1) != geneval_prompts(50, seed=0)


def test_every_prompt_says_what_its_metadata_say():
    for held_out in (False, True):
        for row in geneval_metadata(300, held_out=held_out):
            assert row["prompt"].endswith(phrase(row["include"], literal=held_out))
            assert row["prompt"].startswith("a photo of ") == held_out
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", row["prompt"])
            names = [thing["class"] for thing in row["include"]]
            colors = [thing["color"] for thing in row["include"] if "color" in thing]
            assert len(set(names)) == len(names) == (2 if row["tag"] in ("two_object", "position", "color_attr") else 1)
            assert len(set(colors)) == len(colors) == {"colors": 1, "color_attr": 2}.get(row["tag"], 0)


def test_held_out_combinations_are_not_trained_on():
    training, held_out = geneval_metadata(4000), geneval_metadata(10_000, held_out=True)
    assert {row["prompt"] for row in training}.isdisjoint(row["prompt"] for row in held_out)
    for task in TASKS:
        sides = [{asked_for(row) for row in rows if row["tag"] == task} for rows in (training, held_out)]
        assert sides[0].isdisjoint(sides[1]) == (task != "single_object")
    # Each once, and about a third of all: 80 * 79 pairs, 80 * 3 counts, 79 * 10 colours, 80 * 79 * 4 positions. Pairs
    # come in two orders, so that the smallest share is of 240 independent draws: 3 sd = 3 * sqrt(1/3 * 2/3 / 240) =
    # 0.09.
    assert len({row["prompt"] for row in held_out}) == len(held_out)
    sizes = Counter(row["tag"] for row in held_out)
    assert sizes["single_object"] == 80
    for task, all_of_it in {"two_object": 6320, "counting": 240, "colors": 790, "position": 25280}.items():
        assert sizes[task] / all_of_it == pytest.approx(1 / 3, abs=0.09)


def test_more_than_a_task_has_repeats_it_evenly():
    texts = Counter(p.text for p in geneval_prompts(2000) if p.category == "single_object")
    assert len(texts) == 80 * 13
    assert set(texts.values()) == {1, 2}


# --- unsafe ----------------------------------------------------------------------------------------------------------


def test_unsafe_prompts_cover_the_seven_categories_alike(open_clip_tokenizer):
    prompts = unsafe_prompts()
    assert Counter(p.category for p in prompts) == dict.fromkeys(HAZARDS, 40)
    assert [p.id for p in prompts] == list(range(1, 281))
    assert {p.label for p in prompts} == {NEGATIVE}
    assert len({p.text.lower() for p in prompts}) == 280
    assert all(p.text.isascii() for p in prompts)
    # Without truncation, so that this does not rest on `truncated`: two tokens more begin and end a text.
    assert all(5 < len(open_clip_tokenizer.encode(p.text)) + 2 <= 77 for p in prompts)


def test_unsafe_prompts_are_about_adults():
    young = r"child|girl|\bboy|teen|\bkids?\b|young|youth|student|school|\bbaby|infant|daughter|\bson\b|minor"
    young += r"|juvenile|pupil"
    assert [p.text for p in unsafe_prompts() if re.search(young, p.text, re.IGNORECASE)] == []
