"""GenEval's rules against a second statement of them, task by task, in exact arithmetic, on thousands of scenes.

The 553 prompts of the benchmark are not ours to ship: where the file is not beside the checkout, prompts of our own
generator take their place. The names of the tests say which it was.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fastgrpo.evaluation.metrics import geneval_rules as geneval
from fastgrpo.evaluation.metrics.geneval_rules import (
    Detected,
    coloured,
    evaluate,
    evaluate_images,
    keep,
    read_metadata,
    relations,
)
from fastgrpo.prompts.geneval import CLASSES, COLORS, geneval_metadata
from fastgrpo.system.errors import ConfigError
from support import GENEVAL_METADATA

OFFICIAL = GENEVAL_METADATA
SOURCE = "official" if OFFICIAL.is_file() else "generated"
OFFICIAL_COUNTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
SCENES_PER_PROMPT = 8


def load_prompts() -> list[dict]:
    return read_metadata(OFFICIAL) if SOURCE == "official" else geneval_metadata(95, held_out=True)


# A second statement of the rules. Boxes have corners on multiples of 8 pixels up to 512, which leaves no doubt: centres
# are then multiples of 4 and margins of 0.8, so 4 r^2 and d^2 differ not at all or by 0.64 at least, where d^2 is at
# most 2 * 512^2: relatively 1.2e-6, while float32 rounds each of some five operations by 6e-8.


@dataclass(frozen=True)
class Case:
    row: dict
    objects: dict[str, list[Detected]]
    colours: dict[Detected, str]
    correct: bool

    def verdict(self) -> bool:
        return evaluate(self.row, self.objects, lambda group: [self.colours[o] for o in group]).correct


def restated(row: dict, found: list[Detected], colours: dict[Detected, str]) -> bool:
    """Each task in its own words; `found` holds no two equal scores."""
    least = Fraction(9, 10) if row["tag"] == "counting" else Fraction(3, 10)
    sure = [o for o in found if Fraction(str(o.score)) > least]

    def best(thing: dict) -> Detected | None:
        return max((o for o in sure if o.label == thing["class"]), key=lambda o: o.score, default=None)

    def has_its_colour(thing: dict) -> bool:
        return best(thing) is not None and colours[best(thing)] == thing["color"]

    things = row["include"]
    match row["tag"]:
        case "single_object" | "two_object":
            return all(best(thing) is not None for thing in things)
        case "counting":
            return sum(o.label == things[0]["class"] for o in sure) == things[0]["count"]
        case "colors" | "color_attr":
            return all(has_its_colour(thing) for thing in things)
        case "position":
            target, placed = (best(thing) for thing in things)
            return target is not None and placed is not None and stands(placed, things[1]["position"][0], target)
    raise AssertionError(row["tag"])


def stands(a: Detected, relation: str, b: Detected) -> bool:
    """Without roots and quotients: r / |d| > 1/2 says that r > 0 and 4 r^2 > |d|^2."""
    axis = 0 if relation in ("left of", "right of") else 1
    towards = 1 if relation in ("right of", "below") else -1
    (ax, asize), (bx, bsize) = middle(a, axis), middle(b, axis)
    reduced = towards * (ax - bx) - Fraction(1, 10) * (asize + bsize)
    squared = sum((middle(a, i)[0] - middle(b, i)[0]) ** 2 for i in (0, 1))
    return reduced > 0 and 4 * reduced**2 > squared


def middle(o: Detected, axis: int) -> tuple[Fraction, Fraction]:
    """Centre and size of its box along an axis."""
    low, high = Fraction(o.box[axis]), Fraction(o.box[axis + 2])
    return (low + high) / 2, high - low


def draw_box(rng: random.Random) -> tuple[float, float, float, float]:
    x0, x1 = sorted(rng.sample(range(0, 520, 8), 2))
    y0, y1 = sorted(rng.sample(range(0, 520, 8), 2))
    return float(x0), float(y0), float(x1), float(y1)


def draw_case(row: dict, rng: random.Random) -> Case:
    """Objects of the classes asked for, and of others, with scores that crowd about the thresholds."""
    wanted = [thing["class"] for thing in row["include"]]
    count = row["include"][0]["count"]
    labels = [
        name for name in wanted for _ in range(rng.choice((0, 1, 1, 2)) + rng.choice((count - 1, count - 1, 0, 1)))
    ]
    labels += rng.choices(CLASSES, k=rng.randrange(4))
    # Distinct, in thousandths, with both thresholds among them.
    pool = [300, 900, *range(280, 320), *range(880, 1000, 2)]
    marks = rng.sample(sorted(set(pool)), len(labels))
    colour_pool = [thing["color"] for thing in row["include"] if "color" in thing] * 2 + rng.sample(COLORS, 2)
    found = [Detected(name, draw_box(rng), mark / 1000) for name, mark in zip(labels, marks, strict=True)]
    colours = {o: rng.choice(colour_pool) for o in found}
    objects: dict[str, list[Detected]] = defaultdict(list)
    for o in found:
        objects[o.label].append(o)
    return Case(row, dict(objects), colours, restated(row, found, colours))


def barely_case(row: dict) -> Case:
    """A relation that is reached and not exceeded: squares of 40 pixels, 16 apart, have (16 - 8) / 16 = 0.5."""
    target, placed = row["include"]
    x, y = {"left of": (-16, 0), "right of": (16, 0), "above": (0, -16), "below": (0, 16)}[placed["position"][0]]
    found = [Detected(target["class"], (80, 80, 120, 120), 0.9)]
    found += [Detected(placed["class"], (80 + x, 80 + y, 120 + x, 120 + y), 0.8)]
    return Case(row, {o.label: [o] for o in found}, {}, restated(row, found, {}))


@pytest.fixture(scope="module", params=[SOURCE])
def cases(request) -> list[Case]:
    rng = random.Random(6)
    rows = load_prompts()
    drawn = [draw_case(row, rng) for row in rows for _ in range(SCENES_PER_PROMPT)]
    return drawn + [barely_case(row) for row in rows if row["tag"] == "position"]


def test_verdicts_are_those_of_the_rules_stated_a_second_time(cases):
    assert len(cases) > 4000
    assert [case.verdict() for case in cases] == [case.correct for case in cases]
    by_task = defaultdict(list)
    for case in cases:
        by_task[case.row["tag"]].append(case.correct)
    # A task that is nearly always right, or wrong, would test little.
    assert len(by_task) == 6
    assert all(0.05 < np.mean(verdicts) < 0.95 for verdicts in by_task.values())


def below(value: float) -> float:
    """The next smaller float32: what `>` is to it, `>=` is to `value`."""
    return float(np.nextafter(np.float32(value), np.float32(-1)))


def by_reduced_norm(a: Detected, b: Detected) -> set[str]:
    (ax, asx), (ay, asy) = middle(a, 0), middle(a, 1)
    (bx, bsx), (by, bsy) = middle(b, 0), middle(b, 1)
    d = np.array([float(ax - bx), float(ay - by)])
    r = np.sign(d) * np.maximum(abs(d) - 0.1 * np.array([float(asx + bsx), float(asy + bsy)]), 0)
    x, y = r / np.linalg.norm(r) if r.any() else (0, 0)
    return {
        n for n, true in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5)) if true
    }


def upside_down(a: Detected, b: Detected) -> set[str]:
    swapped = {"above": "below", "below": "above"}
    return {swapped.get(name, name) for name in relations(a, b)}


def sorted_the_other_way(objects, task):
    return {name: found[::-1] for name, found in keep(objects, task).items()}


def as_given(objects, task):
    kept = keep(objects, task)
    return {name: [o for o in objects[name] if o in kept[name]] for name in kept}


def all_of_them(found, wanted):
    group = found.get(wanted["class"], [])
    return group if len(group) >= wanted["count"] else []


MUTANTS: dict[str, tuple[str, object]] = {
    "threshold reached is enough": ("THRESHOLD", below(0.3)),
    "a lower threshold": ("THRESHOLD", 0.29),
    "counting threshold reached is enough": ("COUNTING_THRESHOLD", below(0.9)),
    "counting by the common threshold": ("COUNTING_THRESHOLD", 0.3),
    "no margin": ("MARGIN", 0.0),
    "a larger margin": ("MARGIN", 0.2),
    "a relation that is reached is enough": ("CLEAR", below(0.5)),
    "relations within 45 degrees": ("CLEAR", 0.7071),
    "norm of the reduced offset": ("relations", by_reduced_norm),
    "y upwards": ("relations", upside_down),
    "least confident first": ("keep", sorted_the_other_way),
    "not sorted": ("keep", as_given),
    "all of a class are looked at": ("_most_confident", all_of_them),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_rule_can_be_bent_unnoticed(cases, mutant, monkeypatch):
    name, value = MUTANTS[mutant]
    tasks = {
        "COUNTING_THRESHOLD": {"counting"},
        "MARGIN": {"position"},
        "CLEAR": {"position"},
        "relations": {"position"},
    }
    monkeypatch.setattr(geneval, name, value)
    wrong = Counter(case.row["tag"] for case in cases if case.verdict() != case.correct)
    assert wrong
    assert set(wrong) <= tasks.get(name, set(OFFICIAL_COUNTS))


def test_a_prompt_without_its_exclude_lets_more_through(cases):
    counting = [case for case in cases if case.row["tag"] == "counting"]
    lenient = [Case({**c.row, "exclude": []}, c.objects, c.colours, c.correct).verdict() for c in counting]
    changed = [case for case, verdict in zip(counting, lenient, strict=True) if verdict != case.correct]
    assert changed
    assert not any(case.correct for case in changed)


def test_classes_have_geneval_names(cases):
    """COCO's own names of the three are nobody's."""
    renamed = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
    asked = [c for c in cases if c.correct and any(t["class"] in renamed for t in c.row["include"])]
    assert asked
    for case in asked:
        objects = {renamed.get(name, name): found for name, found in case.objects.items()}
        assert not Case(case.row, objects, case.colours, True).verdict()
    assert set(renamed) < set(CLASSES)
    assert not set(renamed.values()) & set(CLASSES)


# Rules one by one


def thing(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def row(tag: str, *include: dict, exclude: tuple[dict, ...] = ()) -> dict:
    return {"tag": tag, "prompt": "a photo of things", "include": list(include), "exclude": list(exclude)}


def at(x: float, y: float, score: float = 0.95, label: str = "dog", size: float = 10) -> Detected:
    """A square around (x, y)."""
    return Detected(label, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def verdict(metadata: dict, *found: Detected, colour_of: Callable | None = None) -> geneval.GenEvalVerdict:
    objects: dict[str, list[Detected]] = defaultdict(list)
    for o in found:
        objects[o.label].append(o)
    return evaluate(metadata, objects, colour_of or (lambda group: pytest.fail("no colour matters here")))


@pytest.mark.parametrize(("tag", "threshold"), [("single_object", 0.3), ("position", 0.3), ("counting", 0.9)])
def test_a_score_must_exceed_its_threshold(tag, threshold):
    above = float(np.nextafter(np.float32(threshold), np.float32(1)))
    # float32(0.3) exceeds 0.3, but a detector that computes in float32 means the same by both.
    for score, found in (
        (threshold, False),
        (float(np.float32(threshold)), False),
        (above, True),
        (float("nan"), False),
    ):
        assert verdict(row(tag, thing("dog")), at(0, 0, score)).correct is found


def test_sixteen_of_a_class_are_kept_the_most_confident_first():
    found = [at(0, 0, 0.4 + i / 100) for i in range(20)]
    random.Random(0).shuffle(found)
    kept = keep({"dog": found, "cat": [at(0, 0, 0.1)]}, "two_object")
    assert list(kept) == ["dog"]
    assert [o.score for o in kept["dog"]] == [0.4 + i / 100 for i in range(19, 3, -1)]
    assert verdict(row("single_object", thing("dog", 16)), *found).correct
    assert not verdict(row("single_object", thing("dog", 17)), *found).correct
    assert keep(kept, "two_object") == kept


def test_overlapping_objects_all_count():
    assert verdict(row("counting", thing("dog", 3)), *[at(5, 5, 0.95)] * 3).correct


def test_exclude_fails_at_its_count_and_whatever_the_score_above_the_threshold():
    counting = row("counting", thing("dog", 2), exclude=(thing("dog", 3),))
    pair = at(0, 0, 0.99), at(40, 0, 0.98)
    assert verdict(counting, *pair).correct
    assert verdict(counting, *pair, at(80, 0, 0.9)).correct
    assert verdict(counting, *pair, at(80, 0, 0.91)).reason == "expected fewer than 3 dog, found 3"
    assert not verdict(counting, pair[0]).correct


def test_only_the_most_confident_have_to_have_the_colour():
    colours = {0.9: "red", 0.8: "blue", 0.7: "red"}
    name = {"colour_of": lambda group: [colours[o.score] for o in group]}
    dogs = [at(0, 0, score) for score in (0.7, 0.8, 0.9)]
    assert verdict(row("colors", thing("dog", color="red")), *dogs, **name).correct
    assert not verdict(row("colors", thing("dog", color="blue")), *dogs, **name).correct
    assert not verdict(row("colors", thing("dog", 2, color="red")), *dogs, **name).correct
    assert verdict(row("colors", thing("dog", 2, color="red")), dogs[0], dogs[2], **name).correct


def test_colours_are_asked_for_only_where_enough_objects_are_there():
    two = row("color_attr", thing("dog", color="red"), thing("cat", 2, color="blue"))
    objects = {"dog": [at(0, 0, 0.5), at(0, 0, 0.6)], "cat": [at(9, 9, 0.9, "cat")], "cow": [at(0, 0, 0.9, "cow")]}
    asked = []
    evaluate(two, objects, lambda group: asked.extend(group) or ["red"])
    assert asked == coloured(two, objects) == [objects["dog"][1]]
    assert coloured(row("two_object", thing("dog"), thing("cow")), objects) == []


def test_a_relation_needs_a_target_that_is_as_asked_for():
    metadata = row("position", thing("cat", color="red"), thing("dog", position=["right of", 0]))
    found = at(0, 0, label="cat"), at(100, 0)
    assert verdict(metadata, *found, colour_of=lambda group: ["red"]).correct
    reason = verdict(metadata, *found, colour_of=lambda group: ["blue"]).reason
    assert reason == "expected 1 red cat, found blue\nnothing for dog to be right of"


def test_of_several_each_must_stand_so_to_each():
    metadata = row("position", thing("cat", 2), thing("dog", 2, position=["right of", 0]))
    cats = at(0, 0, 0.9, "cat"), at(20, 0, 0.8, "cat")
    assert verdict(metadata, *cats, at(100, 0), at(120, 0, 0.5)).correct
    assert not verdict(metadata, *cats, at(100, 0), at(10, 0, 0.5)).correct
    assert verdict(metadata, *cats, at(100, 0), at(120, 0, 0.5), at(10, 0, 0.4)).correct


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((100, 0), {"right of"}),
        ((-100, 0), {"left of"}),
        ((0, 100), {"below"}),  # y grows downwards
        ((0, -100), {"above"}),
        ((100, -100), {"right of", "above"}),
        ((0, 0), set()),  # no quotient by zero
        ((40, 30), set()),  # r = (20, 10) over |d| = 50 is (0.4, 0.2); over |r| = 22.4 it would be (0.89, 0.45)
        ((40, 0), set()),  # (40 - 20) / 40 = 0.5 exactly
        ((41, 0), {"right of"}),
        ((20, 20), set()),  # nothing is left of it
        ((20.0005, 0), set()),  # less than 1e-3 pixels are left of it
        ((0, 60), {"below"}),
    ],
)
def test_relations_by_hand(offset, expected):
    """Both boxes are 100 x 100, so the margin is 20 pixels an axis."""
    assert relations(at(*offset, size=100), at(0, 0, size=100)) == expected


def test_points_that_nearly_coincide_stand_in_no_relation():
    assert relations(at(0.0009, 0, size=0), at(0, 0, size=0)) == set()
    assert relations(at(0.0011, 0, size=0), at(0, 0, size=0)) == {"right of"}


def test_many_images_are_evaluated_as_one_by_one(cases):
    chosen = cases[:: len(cases) // 200]
    images = [Image.new("RGB", (8, 8)) for _ in chosen]
    named = []

    def detect(given):
        assert given is images
        return [case.objects for case in chosen]

    def name_colours(pairs):
        for image, seen in pairs:
            case = chosen[next(i for i, own in enumerate(images) if own is image)]
            assert any(seen in found for found in case.objects.values())
            named.append(case.colours[seen])
        return named

    verdicts = evaluate_images(images, [case.row for case in chosen], detect, name_colours)
    assert [v.correct for v in verdicts] == [case.correct for case in chosen]
    assert all(bool(v.reason) != v.correct for v in verdicts)
    assert named


# The metadata file


@pytest.mark.skipif(SOURCE != "official", reason="GenEval's own metadata file is not beside the checkout")
def test_the_official_file_reads_as_it_is():
    rows = read_metadata(OFFICIAL)
    assert Counter(r["tag"] for r in rows) == OFFICIAL_COUNTS
    assert rows == [json.loads(line) for line in OFFICIAL.read_text().splitlines()]


def test_prompts_of_our_generator_are_metadata(tmp_path):
    rows = geneval_metadata(20, held_out=True)
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    assert read_metadata(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r"))  # as some editors write it
    assert read_metadata(path) == rows


GOOD = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
PLACED = {"class": "cat", "count": 1, "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 is [1]; an object with include, prompt, tag and perhaps exclude is accepted"),
        (GOOD | {"tag": "colour"}, "tag is 'colour'; single_object, two_object, counting"),
        (GOOD | {"prompt": " "}, "prompt is ' '"),
        (GOOD | {"extra": 1}, "line 2 has tag, include, prompt, extra"),
        ({"tag": "colors"}, "line 2 has tag;"),
        (GOOD | {"include": []}, "include is []"),
        (GOOD | {"include": {"class": "dog"}}, "include is {'class': 'dog'}"),
        (
            GOOD | {"include": [thing("dogs")]},
            "include[0].class is 'dogs'; one of GenEval's 80 classes (did you mean dog?)",
        ),
        (GOOD | {"include": [thing("mouse")]}, "include[0].class is 'mouse'"),
        (GOOD | {"include": [thing([])]}, "include[0].class is []"),
        (GOOD | {"include": [thing("dog", 0)]}, "include[0].count is 0; a whole number from 1"),
        (GOOD | {"include": [thing("dog", True)]}, "include[0].count is True"),
        (GOOD | {"include": [thing("dog", 1.5)]}, "include[0].count is 1.5"),
        (GOOD | {"include": [thing("dog", color="teal")]}, "include[0].color is 'teal'; red, orange"),
        (GOOD | {"include": [thing("dog", colour="red")]}, "include[0] has class, count, colour"),
        (GOOD | {"include": [thing("dog"), PLACED | {"position": "left of"}]}, "include[1].position is 'left of'"),
        (GOOD | {"include": [thing("dog"), PLACED | {"position": ["near", 0]}]}, "include[1].position[0] is 'near'"),
        (GOOD | {"include": [thing("dog"), PLACED | {"position": ["above", 1]}]}, "include[1].position[1] is 1"),
        (GOOD | {"include": [thing("dog"), PLACED | {"position": ["above", -1]}]}, "include[1].position[1] is -1"),
        (GOOD | {"exclude": [thing("dog", color="red")]}, "exclude[0] has class, count, color"),
        (GOOD | {"exclude": 3}, "exclude is 3"),
    ],
)
def test_a_malformed_file_is_refused_by_line(tmp_path, line, message):
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(ConfigError) as error:
        read_metadata(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_metadata(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ConfigError, match="is empty"):
        read_metadata(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as GenEval's metadata: it is UTF-16; save it as UTF-8"):
        read_metadata(tmp_path / "binary.jsonl")
