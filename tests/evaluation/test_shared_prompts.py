"""The prompts that all evaluations of a training draw: the numbers at the end are of as many as those in between."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo.evaluation.images.folder import Drawing, ImageFolder
from fastgrpo.evaluation.results.file import StageResult
from fastgrpo.evaluation.shared_prompts import Found, SharedPrompts, quick_share
from fastgrpo.evaluation.statistics.intervals import plain_mean
from fastgrpo.evaluation.suites.base import Metric, SuiteResult
from fastgrpo.evaluation.suites.captions import ClipScoreSuite
from fastgrpo.settings.schema import EvalConfig
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.evaluation import OwnPrompts

CONFIG = EvalConfig(every=5, quick_fraction=0.5)
PROMPTS = [Prompt("a gun", NEGATIVE, "violence", i) for i in range(4)]
PROMPTS += [Prompt("a cat", POSITIVE, task, 4 + i) for i, task in enumerate(["counting"] * 4 + ["colors"] * 4)]


def found(stage: str, unsafe: str, correct: str, quick: bool = False) -> tuple[OwnPrompts, Found]:
    """The verdicts of four unsafe and eight benign prompts, each "1" or "0"; quick: only the first half's count."""
    suite = OwnPrompts(PROMPTS)
    rows = quick_share(suite, 0.5) if quick else suite.wanted
    said = {}
    for row, verdict in zip(suite.wanted, unsafe + correct, strict=True):
        benign = suite.prompts[row.id].label == POSITIVE
        said[row.id] = {"unsafe": not benign and verdict == "1", "correct": verdict == "1", "kept": None}
        said[row.id] |= {"colors": [], "shapes": []}
    result = suite.result({row.id: said[row.id] for row in rows})
    folder = ImageFolder(Path(stage), Drawing("model", {}, 3, 1.0, "fp32", 4), suite.wanted)
    return suite, [(suite, {stage: StageResult(folder, tuple(rows), result)})]


def test_the_end_is_compared_on_what_evaluations_in_between_draw() -> None:
    suite, before = found("before", "1111", "11001100")
    shared = SharedPrompts([suite], CONFIG, "")
    _, between = found("iter", "1000", "10001000", quick=True)
    _, after = found("after", "1011", "10111011")
    one, two = (shared.evaluated(n, before, now, None) for n, now in ((5, ("iter", between)), (10, ("after", after))))
    assert (one.unsafe, one.images, one.composition) == (0.5, 2, 0.5)
    assert replace(two, iteration=5) == one
    # Of the first two of each task before training both were right.
    low = plain_mean([1, 1, 1, 1], [1] * 4, [[1, 0], [1, 0], [0, 1], [0, 1]]).low
    assert one.composition_least == low
    alone = SharedPrompts([suite], replace(CONFIG, every=0), "").evaluated(10, before, ("after", after), None)
    assert (alone.unsafe, alone.images, alone.composition) == (0.75, 4, 0.75)


def test_an_image_that_two_suites_look_at_counts_once_and_is_unsafe_if_either_says_so() -> None:
    suite, now = found("after", "1000", "11111111")
    (_, results) = now[0]
    second = OwnPrompts(PROMPTS)
    second.name = "second"
    ids = list(suite.prompts)[:4]
    metrics = (
        Metric("b", True, dict(zip(ids, [1.0, 1.0, 0.0, 0.0], strict=True)), "lower"),
        Metric("count", False, dict.fromkeys(ids, 7.0), "lower"),
    )
    result = StageResult(results["after"].folder, results["after"].rows, SuiteResult((), metrics, {}))
    both = [*now, (second, {"after": result})]
    shared = SharedPrompts([suite, second], replace(CONFIG, every=0), "")
    assert shared.evaluated(1, [], ("after", both), None).unsafe == 0.5


def test_without_a_safety_suite_nothing_is_chosen_by() -> None:
    shared = SharedPrompts([], CONFIG, "")
    assert shared.evaluated(1, [], ("after", []), None) is None


def test_the_digest_does_not_depend_on_the_folder_that_a_path_is_seen_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)

    def digest(spec: str) -> str:
        suite = ClipScoreSuite((), 1, spec, 3, 0.0)
        captions = replace(CONFIG.captions, encoder=spec)
        return SharedPrompts([suite], replace(CONFIG, every=0, captions=captions), "").digest

    assert digest("local-dir:clip") == digest(f"local-dir:{tmp_path / 'clip'}") != digest("local-dir:other")


@pytest.mark.parametrize(
    "other", [{"quick_fraction": 0.75}, {"every": 0}, {"weights": "ema"}], ids=["fraction", "every", "weights"]
)
def test_the_digest_tells_what_cannot_be_compared(other: dict[str, object]) -> None:
    suite = OwnPrompts(PROMPTS)
    ours = SharedPrompts([suite], CONFIG, "a").digest
    assert SharedPrompts([OwnPrompts(PROMPTS)], replace(CONFIG, every=3), "a").digest == ours
    assert SharedPrompts([suite], replace(CONFIG, **other), "a").digest != ours
    assert SharedPrompts([suite], CONFIG, "b").digest != ours
    assert SharedPrompts([OwnPrompts(PROMPTS, seed=4)], CONFIG, "a").digest != ours
