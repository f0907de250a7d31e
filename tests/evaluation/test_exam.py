"""What a run's examinations keep: the policy before training is examined once, unless in another way than it is now."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo.assembly import Training, load_training
from fastgrpo.evaluation import exam
from fastgrpo.evaluation.exam import Exam, Examinee
from fastgrpo.evaluation.results.before_after import read_evaluation
from fastgrpo.evaluation.stages import read_stage
from fastgrpo.evaluation.suite import Suite
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.training import Darkness

PROMPTS = [Prompt("a gun", NEGATIVE, "violence", i) for i in range(5)] + [Prompt("a cat", POSITIVE, "counting", 9)]


@pytest.fixture(scope="module")
def training(config_file: Path) -> Training:
    return load_training(load_toml(config_file), 1, say=lambda line: None)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of prompts with every evaluation, by a suite whose seed is eval.seed."""
    calls: list[int] = []

    class Counting(Suite):
        def evaluate(self, *arguments, **options):
            calls.append(len(self.prompts))
            return super().evaluate(*arguments, **options)

    def suite(config: TrainConfig) -> Suite:
        prompts = PROMPTS[:5][: config.eval.unsafe_per_category] + PROMPTS[5:]
        return Counting("darkness-v1", prompts, config.eval.seed, Darkness())

    monkeypatch.setattr(exam, "make_suite", suite)
    return calls


def examined(run: Path, training: Training, config: TrainConfig) -> Exam:
    """A new process's exam of the policy before training."""
    run.mkdir(exist_ok=True)
    examinee = Examinee(training.policy, None, training.prompts, training.eval_schedule, held_out=training.held_out)
    made = Exam(run, config, examinee, Console(quiet=True))
    made.before()
    return made


def test_before_is_examined_once_unless_in_another_way(
    config_file: Path,
    training: Training,
    evaluated: list[int],
    tmp_path: Path,
) -> None:
    config = load_toml(config_file)
    examined(tmp_path, training, config)
    stage = read_stage(tmp_path / "evaluation_before.json")
    assert sorted(stage.verdicts) == [f"{id:06d}" for id in (0, 1, 2, 3, 4, 9)]
    assert stage.metrics == stage.rates.metrics()
    picture = (tmp_path / "samples" / "before.png").read_bytes()
    examined(tmp_path, training, config)
    assert evaluated == [6]
    assert read_stage(tmp_path / "evaluation_before.json") == stage
    fewer = replace(config, eval=replace(config.eval, unsafe_per_category=3))
    examined(tmp_path, training, fewer)
    assert evaluated == [6, 4]
    other = replace(config, eval=replace(config.eval, seed=5))
    examined(tmp_path, training, other)
    assert evaluated == [6, 4, 6]
    assert (tmp_path / "samples" / "before.png").read_bytes() != picture


def test_a_policy_that_did_not_change_is_undecided(
    config_file: Path,
    training: Training,
    evaluated: list[int],
    tmp_path: Path,
) -> None:
    made = examined(tmp_path, training, load_toml(config_file))
    made.after()
    assert [sentence.verdict for sentence in made.verdicts()] == ["undecided", "undecided"]
    assert all("no change (paired test, p = 1)" in sentence.text for sentence in made.verdicts())
    before, after = (read_stage(tmp_path / f"evaluation_{stage}.json") for stage in ("before", "after"))
    assert before == after
    rows = json.loads((tmp_path / "samples" / "prompts.json").read_text())
    assert [row["text"] for row in rows] == ["a gun", "a cat"]


def test_a_run_from_before_verdicts_were_kept_goes_on_without_a_sentence(
    config_file: Path,
    training: Training,
    evaluated: list[int],
    tmp_path: Path,
) -> None:
    config = load_toml(config_file)
    rates = (
        examined(tmp_path / "new", training, config) and read_stage(tmp_path / "new" / "evaluation_before.json").rates
    )
    run = tmp_path / "old"
    run.mkdir()
    (run / "evaluation_before.json").write_text(json.dumps(rates.to_json(), indent=2))
    evaluated.clear()
    made = examined(run, training, config)
    assert evaluated == []
    assert made.before() == rates.metrics()
    made.after()
    assert made.verdicts() == []
    assert len(made.tables()) == 1
    assert read_evaluation(run / "evaluation.json").before == rates


def test_without_a_suite_what_is_known_before_training_is_kept_too(
    config_file: Path,
    training: Training,
    tmp_path: Path,
) -> None:
    config = load_toml(config_file)
    seen = []

    def held_out(images, prompts, group) -> dict[str, float]:
        seen.append(len(images))
        return {"eval/held_out_mean": 0.25}

    watched = replace(training, held_out=held_out)
    assert examined(tmp_path, watched, config).before() == {"eval/held_out_mean": 0.25}
    assert examined(tmp_path, watched, config).before() == {"eval/held_out_mean": 0.25}
    assert len(seen) == 1
    stage = read_stage(tmp_path / "evaluation_before.json")
    assert (stage.rates, stage.verdicts) == (None, {})
