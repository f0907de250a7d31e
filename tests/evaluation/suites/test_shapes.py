"""Suite `shapes`, and GenEval's rules on what the oracle reads beside the embedded world's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.evaluation.during_training import load_suites
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder
from fastgrpo.evaluation.metrics import geneval_rules
from fastgrpo.evaluation.metrics.geneval_rules import Detected, Metadata
from fastgrpo.evaluation.results.before_after import changes
from fastgrpo.evaluation.results.file import StageResult, assemble
from fastgrpo.evaluation.results.summary import read_summary, write_summary
from fastgrpo.evaluation.suites.registry import Overrides, make_suites
from fastgrpo.evaluation.suites.shapes import ShapesSuite, _judgement
from fastgrpo.settings.schema import ModelConfig, PromptsConfig, TrainConfig
from fastgrpo.settings.suites import AllSettings, ShapesSettings
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes import oracle
from fastgrpo.shapes.captions import OPEN, heldout_prompts, parse, scene_for
from fastgrpo.shapes.verdicts import verdict_on
from fastgrpo.shapes.world import HAZARDS, TASKS, Object, Scene, paint
from fastgrpo.shapes_lab.drawings import CaptionNoise, perturb, random_request
from fastgrpo.types import POSITIVE, Prompt

DRAWING = Drawing("none", {"unet": "0"}, 1, 1.0, "fp32", 16)


def geneval_verdict(scene: Scene, prompt: Prompt) -> geneval_rules.GenEvalVerdict:
    """GenEval's verdict on a scene. prompt: one of the world's six tasks. Hazards are none of its concern."""
    objects, colours = detections(scene)
    return geneval_rules.evaluate(metadata(prompt), objects, lambda group: [colours[seen] for seen in group])


def metadata(prompt: Prompt) -> Metadata:
    """What a prompt of the world's six tasks asks for, as GenEval's metadata say it; shapes are the classes."""
    request = parse(prompt.text)
    include = [
        {"class": t.shape, "count": request.count} | ({"color": t.color} if t.color else {}) for t in request.things
    ]
    if request.relation:
        include = [include[1], include[0] | {"position": [request.relation, 0]}]
    row = {"tag": prompt.category, "include": include, "prompt": prompt.text}
    if prompt.category == "counting":
        row["exclude"] = [{"class": request.things[0].shape, "count": request.count + 1}]
    return row


def detections(scene: Scene) -> tuple[dict[str, list[Detected]], dict[Detected, str]]:
    """A scene's objects as GenEval takes them, all of full confidence, and the colour of each."""
    objects: dict[str, list[Detected]] = {}
    colours: dict[Detected, str] = {}
    for seen in scene.objects:
        box = (seen.x - seen.radius, seen.y - seen.radius, seen.x + seen.radius, seen.y + seen.radius)
        detected = Detected(seen.shape, box, 1.0)
        objects.setdefault(seen.shape, []).append(detected)
        colours[detected] = seen.color
    return objects, colours


@pytest.mark.slow
def test_genevals_rules_agree_with_the_worlds_own_judge_but_where_they_differ_by_design() -> None:
    """1,000 drawn pictures, a third of which do not show what they are to: objects missing, recoloured, moved."""
    rng, noise = np.random.default_rng(0), CaptionNoise(0.0, 0.2, 0.2, 0.2, 0.3, 0.0)
    prompts = [prompt for prompt in heldout_prompts(0, 60, "test") if prompt.category != OPEN]
    agreed = {True: 0, False: 0}
    for i in range(1000):
        prompt = prompts[i % len(prompts)]
        request = parse(prompt.text) if rng.random() < 0.8 else random_request(rng, 0.0)
        picture = torch.from_numpy(paint(perturb(scene_for(request, rng), noise, rng), rng))
        (scene,) = oracle.read(picture.permute(2, 0, 1)[None].float() / 255)
        ours, theirs = geneval_verdict(scene, prompt).correct, bool(verdict_on(scene, prompt).correct)
        if ours == theirs:
            agreed[ours] += 1
            continue
        # Hazards are none of GenEval's concern; diagonal objects stand in two relations, or, being large, in none; of
        # several objects of one shape it looks at one.
        shapes = [seen.shape for seen in scene.objects]
        several = any(shapes.count(thing.shape) > 1 for thing in parse(prompt.text).things)
        assert scene.hazards or prompt.category == "position" or several, (prompt.text, scene)
    assert min(agreed.values()) > 250
    assert sum(agreed.values()) >= 990


def test_where_they_differ_by_design() -> None:
    """Diagonal objects stand in two relations.

    Of two of a shape, with equal confidence, the first read is looked at.
    """
    red, blue = Object("circle", "red", 8.0, 8.0, 4.0), Object("circle", "blue", 24.0, 24.0, 4.0)
    ring = Object("ring", "green", 22.0, 20.0, 4.0)
    above = Prompt("a photo of a circle above a ring", POSITIVE, "position")
    scene = Scene((red, ring))  # 14 pixels to the left, 12 above
    assert (geneval_verdict(scene, above).correct, verdict_on(scene, above).correct) == (True, False)
    asked = Prompt("a photo of a blue circle", POSITIVE, "colors")
    assert (geneval_verdict(Scene((red, blue)), asked).correct, verdict_on(Scene((red, blue)), asked).correct) == (
        False,
        True,
    )


def test_the_suite_reads_images_of_any_order_and_finds_what_was_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    suite = ShapesSuite(3, 3, 2, 1.0, 5.0, 0, "test")
    pictures = {id: paint(scene_for(parse(prompt.text), rng), rng) for id, prompt in suite.prompts.items()}
    folder = ImageFolder(tmp_path / "right", DRAWING, suite.wanted)
    wrong = ImageFolder(tmp_path / "wrong", DRAWING, suite.wanted)
    for each in (folder, wrong):
        each.claim()
    for id, other in zip(pictures, reversed(pictures), strict=True):
        Image.fromarray(pictures[id]).save(folder.file(id))
        Image.fromarray(pictures[other]).save(wrong.file(id))

    def overall(folder: ImageFolder) -> dict[str, float]:
        return {
            table.name: table.numbers[-1].estimate.value for table in suite._measure(folder, folder.present()).tables
        }

    # Every picture shows exactly what its prompt asks for, hazards included; the oracle may miss the odd one.
    found = overall(folder)
    assert found["unsafe"] > 0.9
    assert found["composition"] > 0.9
    # The same pictures in another order answer the wrong prompts.
    assert overall(wrong)["composition"] < 0.5


def test_variety_is_the_entropy_of_what_prompts_leave_open(tmp_path: Path) -> None:
    """Of colours where none is named, of shapes where something is asked for; of all else nothing counts."""
    suite = ShapesSuite(1, 4, 2, 1.0, 5.0, 0, "test")
    own = {category: [id for id, p in suite.prompts.items() if p.category == category] for category in (*TASKS, OPEN)}
    drawn = {
        own["single_object"][i]: Object("circle", color, 8, 8, 5) for i, color in enumerate(["red"] * 2 + ["blue"])
    }
    drawn |= {own["colors"][i]: Object("circle", "green", 8, 8, 5) for i in range(4)}
    drawn |= {
        own[OPEN][i]: Object(shape, "red", 8, 8, 5) for i, shape in enumerate(("ring", "ring", "cross", "circle"))
    }
    scenes = {id: Scene((drawn[id],) if id in drawn else ()) for id in suite.prompts}
    result = suite.result({id: _judgement(scene, suite.prompts[id]) for id, scene in scenes.items()})
    (variety,) = (table for table in result.tables if table.name == "variety")
    found = {number.name: number.estimate for number in variety.numbers}
    assert found["shapes"].value == pytest.approx(1.5)  # 1/2, 1/4, 1/4
    assert found["colors"].value == pytest.approx(-6 / 7 * np.log2(6 / 7) - 1 / 7 * np.log2(1 / 7))  # red but for one
    assert (found["shapes"].n, found["colors"].n) == (4, 7)
    # Neither the prompts for something nor anything else of them is among compositions.
    (composition,) = (table for table in result.tables if table.name == "composition")
    assert {number.name for number in composition.numbers} == {*TASKS, "overall"}
    # It stands in the run's evaluation.json, in bits, and comes back.
    drawing = Drawing("none", {"unet": "0"}, 2, 1.0, "fp32", 16)
    stages = {
        stage: StageResult(ImageFolder(tmp_path / stage, drawing, suite.wanted), suite.wanted, result)
        for stage in ("before", "after")
    }
    write_summary(
        tmp_path / "evaluation.json",
        assemble(dict.fromkeys(stages, drawing), [(suite, stages)])["suites"]["shapes"],
    )
    rows = json.loads((tmp_path / "evaluation.json").read_text())["before"]["variety"]
    assert rows["shapes"] == {"bits": 1.5, "n": 4, "low": found["shapes"].low, "high": found["shapes"].high}
    read = {table["name"]: table for table in read_summary(tmp_path / "evaluation.json")["tables"]}["variety"]
    assert [change.before["value"] for change in changes(read)] == [found["colors"].value, found["shapes"].value]


def test_a_quick_evaluation_is_a_prefix_of_every_category() -> None:
    suite = ShapesSuite(10, 7, 2, 1.0, 5.0, 0, "test")
    quick = suite.quick(0.25)  # rounded up
    own = [suite.prompts[row.id] for row in quick]
    assert [p.category for p in own] == [name for c in HAZARDS for name in [c] * 3] + [
        name for t in (*TASKS, OPEN) for name in [t] * 2
    ]
    assert own == heldout_prompts(3, 2, "test")
    assert set(quick) <= set(suite.wanted)


def test_seeds_never_change() -> None:
    # From `printf 1234:0 | sha256sum`, written down so that no rewrite changes the noise behind past results.
    suite = ShapesSuite(5, 5, 2, 1.0, 5.0, 1234, "development")
    assert suite.wanted[0].seed == 0x7A7052027E0DF698 >> 1
    seeds = {row.seed for row in suite.wanted}
    assert len(seeds) == len(suite.wanted)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_suite_is_what_the_config_says_unless_it_is_overridden() -> None:
    config = load_toml(find_preset("shapes"))
    (suite,) = make_suites(("shapes",), AllSettings(), Overrides(seed=7), config)
    assert isinstance(suite, ShapesSuite)
    assert list(suite.prompts.values()) == heldout_prompts(40, 60, "test")
    assert (suite.steps, suite.eta, suite.wanted[0].guidance) == (12, 1.0, 3.0)
    assert suite.trained == ("violence", "shocking")
    assert suite.about.startswith(
        "shapes-oracle-v3-test: 280 unsafe and 360 composition prompts, and 60 for something, one image each, 12 "
    )
    pictured = suite.pictured()
    assert [p.category for p in pictured] == [*HAZARDS, *TASKS, OPEN]
    fewer = AllSettings(shapes=ShapesSettings(unsafe_per_category=8, composition_per_task=12, split="development"))
    (other,) = make_suites(("shapes",), fewer, Overrides(1, steps=50, eta=0.0, guidance=5.0), config)
    assert len(other.wanted) == 7 * 8 + 7 * 12
    assert list(other.prompts.values()) == heldout_prompts(8, 12, "development")
    assert other.protocol != suite.protocol
    assert (other.steps, other.eta, other.wanted[0].guidance) == (50, 0.0, 5.0)


def test_only_what_is_trained_in_the_world_is_measured_by_it() -> None:
    cpu = torch.device("cpu")
    (own,) = load_suites(load_toml(find_preset("shapes")), cpu)
    assert own.suite.name == "shapes"
    elsewhere = TrainConfig(
        model=ModelConfig(path="some/sd15"), prompts=PromptsConfig(positive="safe.txt", negative="unsafe.txt")
    )
    assert load_suites(elsewhere, cpu) == ()
