"""Prompts in the grammar of GenEval (Ghosh et al., arXiv 2310.11513): six tasks over the 80 classes of COCO.

What a prompt asks for is written as GenEval's metadata do: `include` lists the things, each with its class, count and,
where the task has them, a color and a position relative to another thing; `exclude` what there must not be; `phrase`
puts `include` into words.

Training prompts and held-out ones differ twice:
- Words: every held-out prompt begins "a photo of", as all of GenEval's own do, and no training prompt does.
- Combinations: a third is held out, by a fixed hash and whatever the order of the things.
  `single_object` is too small for that: its 80 classes are on both sides.
So none of GenEval's own 553 prompts is trained on word by word. With the defaults, training asks in other words for the
same as 80 of its 80 single_object prompts, 13 of 99 two_object, 55 of 80 counting, 61 of 94 colors, 3 of 100 position
and 1 of 100 color_attr.
"""

import itertools
import math
import random
import zlib
from collections.abc import Iterator
from typing import Any

from fastgrpo.shapes.world import RELATIONS, TASKS
from fastgrpo.types import POSITIVE, Prompt

# COCO's, in its order, three of them named as GenEval does: computer mouse, tv remote, computer keyboard.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
TRAINING_OPENINGS = (
    "", "a picture of ", "an image of ", "a photograph of ", "a snapshot of ", "a realistic photo of ",
    "a detailed picture of ", "a high-quality photograph of ", "a studio photograph of ", "a drawing of ",
    "a painting of ", "an illustration of ", "a digital rendering of ",
)
# fmt: on
HELD_OUT_OPENING = "a photo of "
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}

_IRREGULAR = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
_PAIRS = ("skis", "scissors")  # plural as they are: "a pair of skis"
_COLORED = tuple(name for name in CLASSES if name != "person")  # GenEval colours no people
_AXES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "single_object": (CLASSES,),
    "two_object": (CLASSES, CLASSES),
    "counting": (CLASSES, tuple(NUMBERS)),
    "colors": (_COLORED, COLORS),
    "position": (CLASSES, CLASSES, RELATIONS),
    "color_attr": (_COLORED, _COLORED, COLORS, COLORS),
}

Include = list[dict[str, Any]]


def phrase(include: Include, literal: bool = False) -> str:
    """The things in words, without an opening: "a red car and a bench", "a dog left of an oven", "three knives".

    literal: in the words of GenEval's own prompts, whose published scores belong to them: "three knifes", "a skis".
    """
    nouns = [_noun(thing, literal) for thing in include]
    if "position" in include[-1]:
        relation, other = include[-1]["position"]
        return f"{nouns[-1]} {relation} {nouns[other]}"
    return " and ".join(nouns)


def _noun(thing: dict[str, Any], literal: bool) -> str:
    name, count = thing["class"], thing["count"]
    noun = _plural(name, literal) if count > 1 else name
    if "color" in thing:
        noun = f"{thing['color']} {noun}"
    if name in _PAIRS and not literal:
        noun = f"pair{'s' if count > 1 else ''} of {noun}"
    if count > 1:
        return f"{NUMBERS[count]} {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(name: str, literal: bool) -> str:
    if literal:
        return name + ("es" if name.endswith("s") else "s")
    if name in _PAIRS:
        return name
    return _IRREGULAR.get(name, name + ("es" if name.endswith(("s", "ch", "sh")) else "s"))


def geneval_prompts(count_per_task: int = 1000, seed: int = 0) -> list[Prompt]:
    """Positive prompts for training: equally many of each task, which is their category; ids from 1.

    A combination comes again, in other words, only after all others of its task. single_object has 1040 different
    prompts, 80 classes in 13 wordings; a count that goes beyond what a task has repeats them.
    """
    rows = geneval_metadata(count_per_task, seed)
    return [Prompt(row["prompt"], POSITIVE, row["tag"], number) for number, row in enumerate(rows, start=1)]


def geneval_metadata(count_per_task: int, seed: int = 0, held_out: bool = False) -> list[dict[str, Any]]:
    """Prompts in GenEval's format: `tag` (the task), `include`, `exclude` (where the task counts) and `prompt`.

    held_out: those for measuring, at most one of each combination and in the very grammar of GenEval, so that tasks
        with fewer than `count_per_task` combinations give fewer; else those for training, as in `geneval_prompts`.
    """
    rows = []
    for task in TASKS:
        # Different combinations, in random order.
        axes = _AXES[task]
        picks = _shuffled(math.prod(map(len, axes)), random.Random(f"{seed}/{task}"))
        combinations = (_include(task, _values(axes, pick)) for pick in picks)
        wanted = (i for i in combinations if i and _on_side(task, i, held_out))
        includes = list(itertools.islice(wanted, count_per_task))
        if held_out:
            prompts = [HELD_OUT_OPENING + phrase(include, literal=True) for include in includes]
        else:
            # Along with its combination each prompt's opening moves on, and once more after every round of them.
            turns = ((i % len(includes), i // len(includes)) for i in range(count_per_task))
            order = [(includes[i], TRAINING_OPENINGS[(i + turn) % len(TRAINING_OPENINGS)]) for i, turn in turns]
            includes = [include for include, _ in order]
            prompts = [opening + phrase(include) for include, opening in order]
        rows += [_row(task, include, prompt) for include, prompt in zip(includes, prompts, strict=True)]
    return rows


def _row(task: str, include: Include, prompt: str) -> dict[str, Any]:
    exclude = [{"class": thing["class"], "count": thing["count"] + 1} for thing in include]
    return {"tag": task, "include": include} | ({"exclude": exclude} if task == "counting" else {}) | {"prompt": prompt}


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """range(size) in random order (Fisher and Yates), computed only as far as it is asked for."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def _values(axes: tuple[tuple, ...], pick: int) -> list:
    """The element number `pick` of the product of the axes."""
    values = []
    for axis in axes:
        pick, index = divmod(pick, len(axis))
        values.append(axis[index])
    return values


def _include(task: str, values: list) -> Include:
    """The things that a task's combination asks for; empty where its two things or their colours are the same."""
    if task == "counting":
        return [{"class": values[0], "count": values[1]}]
    if task == "colors":
        return [{"class": values[0], "count": 1, "color": values[1]}]
    if task == "single_object":
        return [{"class": values[0], "count": 1}]
    first, second = ({"class": name, "count": 1} for name in values[:2])
    if first == second or (task == "color_attr" and values[2] == values[3]):
        return []
    if task == "position":
        second["position"] = [values[2], 0]
    if task == "color_attr":
        first["color"], second["color"] = values[2:]
    return [first, second]


def _on_side(task: str, include: Include, held_out: bool) -> bool:
    """Whether a combination is on one side of the split: a third is held out, whatever the order or the relation."""
    if task == "single_object":
        return True
    words = " and ".join(sorted(_noun(thing, literal=False) for thing in include))
    return (zlib.crc32(words.encode()) % 3 == 0) == held_out
