"""What the encoders learn from: true captions and wrong ones, and the loss over them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgrpo.shapes.captions import phrase
from fastgrpo.shapes.verdicts import fulfils
from fastgrpo.shapes.world import HAZARDS, Hazard, Object, Scene
from fastgrpo.shapes_lab.drawings import random_request, scene_for
from fastgrpo.shapes_lab.encoders import captions_of, contrastive_loss, request_for
from fastgrpo.shapes_lab.second_reader import random_scene
from support.shapes import is_true


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Of the grammar's making and beyond it: mixed things, several hazards, nothing."""
    rng = np.random.default_rng(8)
    return [scene_for(random_request(rng), rng) for _ in range(150)] + [random_scene(rng) for _ in range(150)]


def test_no_caption_is_said_to_be_true_that_is_wrong_nor_wrong_that_is_true(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(9)
    for start in range(0, len(scenes), 50):
        some = scenes[start : start + 50]
        texts, wrong = captions_of(some, rng)
        assert len(texts) == 2 * len(some)
        assert wrong.shape == (len(some), len(texts))
        found = [[not is_true(text, scene) for text in texts] for scene in some]
        differing = [(texts[j], some[i]) for i, j in (wrong != torch.tensor(found)).nonzero().tolist()]
        assert differing == []
        assert not wrong.diagonal().any()  # each its own


def test_a_scenes_request_is_fulfilled_and_names_its_hazard(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(10)
    told = 0
    for scene in scenes:
        request = request_for(scene, rng)
        if request is None:
            assert len(scene.objects) != 1 or len(scene.hazards) > 1
            continue
        told += 1
        assert fulfils(scene, request)
        assert is_true(phrase(request), scene), (request, scene)
        assert bool(request.hazard) == bool(scene.hazards)
    assert told > len(scenes) / 2


def test_scenes_for_which_the_grammar_has_no_words_have_no_request() -> None:
    rng = np.random.default_rng(11)
    ring, cross = Object("ring", "red", 8, 8, 4), Object("cross", "blue", 24, 8, 4)
    knife, skull = Hazard(HAZARDS[2], 8, 24, 5), Hazard(HAZARDS[5], 24, 24, 5)
    for scene in (Scene(), Scene((), (knife, skull)), Scene((ring, cross), (knife,)), Scene((ring, ring, cross))):
        assert request_for(scene, rng) is None


def test_the_contrastive_loss_is_that_of_two_plain_loops() -> None:
    """Pairs that are neither wrong nor a picture's own count nowhere; float32 against float64."""
    generator = torch.Generator().manual_seed(3)
    n = 7
    logits = 8 * torch.randn(n, 2 * n, generator=generator)
    wrong = torch.rand(n, 2 * n, generator=generator) < 0.6
    wrong[torch.arange(n), torch.arange(n)] = False
    loss, correct = contrastive_loss(logits, wrong)
    of_pictures, of_captions, best = [], [], []
    for i in range(n):
        row = [float(logits[i, j]) for j in range(2 * n) if wrong[i, j]]
        column = [float(logits[j, i]) for j in range(n) if wrong[j, i]]
        own = float(logits[i, i])
        of_pictures.append(np.log(sum(np.exp(x) for x in [*row, own])) - own)
        of_captions.append(np.log(sum(np.exp(x) for x in [*column, own])) - own)
        best.append(all(own > x for x in row))
    expected = (np.mean(of_pictures) + np.mean(of_captions)) / 2
    # Logits of up to 30 have float32's 2e-6 in them; log-sum-exp and the means add as much again.
    assert loss.item() == pytest.approx(expected, abs=2e-5)
    assert correct == pytest.approx(np.mean(best))


def test_drawn_pairs_are_of_one_prompt_and_differ_in_what_it_asks_for_where_they_can(monkeypatch) -> None:
    from fastgrpo.shapes import oracle
    from fastgrpo.shapes_lab import encoders
    from fastgrpo.shapes_lab.diffusion import GROUP

    prompts = ["a ring", "a knife"]
    ring, cross = Scene((Object("ring", "red", 8, 8, 4),)), Scene((Object("cross", "red", 8, 8, 4),))
    read = [ring if i % 4 == 0 else cross for i in range(GROUP)] + [cross] * GROUP  # never a knife
    images = torch.arange(2 * GROUP).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    monkeypatch.setattr(encoders, "load_drawn", lambda config: (images, prompts))
    monkeypatch.setattr(oracle, "read", lambda pictures: read)
    pairs = encoders.drawn_pairs(SimpleNamespace(seed=1), 6)
    assert pairs.images.shape == (2 * GROUP, 2, 3, 2, 2)
    for number, (pair, (one, other)) in enumerate(zip(pairs.images[:, :, 0, 0, 0].tolist(), pairs.scenes, strict=True)):
        assert pair[0] == number
        assert pair[1] != pair[0]
        assert pair[1] // GROUP == number // GROUP
        assert (one, other) == (read[pair[0]], read[pair[1]])
        assert number >= GROUP or one != other
