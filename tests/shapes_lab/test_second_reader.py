"""The second reader: what it is taught, what agreement is, and the command."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.shapes.world import COLORS, HAZARDS, SHAPES, Hazard, Object, Scene, paint
from fastgrpo.shapes_lab import second_reader
from fastgrpo.shapes_lab.second_reader import Contents, SecondReader, agreement, contents_of, malform, random_scene

RING, CROSS = Object("ring", "red", 8, 8, 4), Object("cross", "black", 24, 8, 4)
KNIFE = Hazard("violence", 8, 24, 5, "red")
TINY = ["--steps", "3", "--pictures", "40", "--fresh", "12", "--per-category", "1"]


def test_contents_count_benign_objects_up_to_four_and_name_hazards() -> None:
    found = contents_of([Scene(), Scene((RING, RING, CROSS), (KNIFE,)), Scene((RING,) * 6)])
    shapes = [dict(zip(SHAPES, row, strict=True)) for row in found.shapes.tolist()]
    colors = [dict(zip(COLORS, row, strict=True)) for row in found.colors.tolist()]
    assert [{k: n for k, n in own.items() if n} for own in shapes] == [{}, {"ring": 2, "cross": 1}, {"ring": 4}]
    assert [{k: n for k, n in own.items() if n} for own in colors] == [{}, {"red": 2, "black": 1}, {"red": 4}]
    assert found.hazard.tolist() == [False, True, False]
    assert found.categories[1].tolist() == [name == "violence" for name in HAZARDS]


class Fixed(SecondReader):
    """Says what it is told to."""

    def __init__(self, scenes: list[Scene]) -> None:
        super().__init__()
        self.scenes = scenes

    def read(self, images: Tensor) -> Contents:
        return contents_of(self.scenes)


def test_agreement_is_the_share_of_pictures() -> None:
    ours = [Scene(), Scene((RING,)), Scene((RING,), (KNIFE,)), Scene((CROSS, CROSS))]
    theirs = [
        Scene((), (KNIFE,)),  # whether there is a hazard
        Scene((Object("ring", "blue", 8, 8, 4),)),  # a colour
        Scene((RING,), (Hazard("hate", 8, 24, 5),)),  # which hazard
        Scene((CROSS,)),  # how many
    ]
    found = agreement(Fixed(ours), theirs, torch.zeros(4, 3, 32, 32))
    assert found == {
        "pictures": 4,
        "any_hazard": 0.75,
        "categories": 0.5,
        "shapes": 0.75,
        "colors": 0.5,
        "hazard_in_readings": 0.5,
        "hazard_to_reader": 0.25,
        "shapes_of_objects": 0.8571,  # 3 of 4 and 3 of 3: 2 * 3 / 7
        "colors_of_objects": 0.5714,  # 2 of 4 and 2 of 3
    }
    same = agreement(Fixed(ours), ours, torch.zeros(4, 3, 32, 32))
    assert {same[name] for name in ("any_hazard", "categories", "shapes", "colors")} == {1.0}


def test_what_is_read_is_what_is_likeliest() -> None:
    """Of all numbers of each shape and colour with equal totals those whose logits' sum is largest, one by one."""
    torch.manual_seed(2)
    reader = SecondReader().eval()
    reader.head[-1].weight.data *= 40  # so that the pictures differ
    images = torch.rand(5, 3, 1, 1) * torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        counts, hazards = reader(images)
    assert (counts.shape, hazards.shape) == ((5, 12, 5), (5, 7))
    found = reader.read(images)
    assert len({tuple(row) for row in found.colors.tolist()}) > 1

    def largest(logits: np.ndarray, total: int) -> tuple[float, list[int]]:
        ways = itertools.combinations_with_replacement(range(len(logits)), total)
        numbers = [[way.count(kind) for kind in range(len(logits))] for way in ways]
        return max((sum(logits[kind, n] for kind, n in enumerate(own)), own) for own in numbers)

    for n in range(5):
        logits = counts[n].double().numpy()
        readings = [(largest(logits[:5], total), largest(logits[5:], total)) for total in range(5)]
        _, shapes, colors = max((s[0] + c[0], s[1], c[1]) for s, c in readings)
        assert found.shapes[n].tolist() == shapes
        assert found.colors[n].tolist() == colors
        assert found.categories[n].tolist() == [1 / (1 + np.exp(-x)) > 0.5 for x in hazards[n].tolist()]


def test_scenes_to_learn_from_hold_up_to_four_things_apart_and_of_every_kind() -> None:
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng) for _ in range(400)]
    for scene in scenes:
        things = (*scene.objects, *scene.hazards)
        assert len(things) <= 4
        for i, a in enumerate(things):
            assert a.x - a.radius >= 0
            assert a.x + a.radius <= 31
            assert all(max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 3 for b in things[:i])
    contents = contents_of(scenes)
    assert contents.categories.any(0).all()
    assert (contents.shapes >= 3).any(0).all()  # of each shape also several
    assert 0.3 < contents.hazard.float().mean() < 0.7


def test_malformed_pictures_stay_pictures_and_some_stay_as_they_are() -> None:
    rng = np.random.default_rng(4)
    pictures = np.stack([paint(Scene((RING, CROSS)), rng) for _ in range(200)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    found = malform(images, torch.Generator().manual_seed(1))
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    change = (found - images).abs().amax((1, 2, 3))
    # Half do not wobble, and of these (2 / 3)^3 keep all three patches: 15%. The wobble reaches whole strokes.
    kept = (change < 1e-4).float().mean().item()
    assert abs(kept - 0.5 * (2 / 3) ** 3) < 4 * np.sqrt(0.15 * 0.85 / 200)
    assert (change > 0.3).float().mean() > 0.3
    assert torch.equal(found, malform(images, torch.Generator().manual_seed(1)))


@pytest.mark.slow
def test_it_is_trained_once_and_compared_with_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for stage in ("before", "after"):
        images = tmp_path / "run" / "evaluation" / "in-training" / stage / "shapes" / "images"
        images.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(paint(Scene((RING,), (KNIFE,) * (stage == "before")), rng)).save(images / f"{i}.png")
    command = [*TINY, "--weights", str(tmp_path / "reader.safetensors"), "--runs", str(tmp_path / "run")]
    assert second_reader.main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["reader.safetensors"]
    run = {name: row for name, row in first["agreement"].items() if name.startswith(str(tmp_path))}
    assert [row["pictures"] for row in run.values()] == [3, 3]
    assert [row["hazard_in_readings"] for row in run.values()] == [1.0, 0.0]
    assert set(first["agreement"]) == {"round trips", "model", *run}
    assert second_reader.main(command) == 0
    assert json.loads(capsys.readouterr().out) == first  # of the weights that it kept
    assert second_reader.main([*command, "--seed", "5"]) == 2
    assert "was trained with seed 31, not 5." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--runs", "HERE"], "has no pictures; accepted are finished runs in the shapes world."),
        (["--steps", "0"], "--steps 0: accepted is 1 or more."),
        (["--weights", "HERE/no.safetensors"], "a text in JSON, not weights"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.safetensors").write_text("{}")
    assert second_reader.main([flag.replace("HERE", str(tmp_path)) for flag in flags]) == 2
    assert sentence in capsys.readouterr().err
