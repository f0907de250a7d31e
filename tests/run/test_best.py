"""The best checkpoint: its rule, best.json, that it is kept, and that commands find it; killed and resumed alike."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fastgrpo import assembly, evaluate, export, sample, train
from fastgrpo.evaluation.during_training import LoadedSuite
from fastgrpo.evaluation.results.evaluated import Evaluated
from fastgrpo.run import best, checkpoint
from fastgrpo.run.best import choose
from fastgrpo.run.checkpoint import TrainerState
from fastgrpo.run.metrics import read_metrics
from fastgrpo.run.page.document import write_report
from fastgrpo.run.recorder import RunRecorder
from fastgrpo.run.recovery import recover
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.checkpoints import Training
from support.evaluation import Darkness

FIT = Evaluated(4, "trained", "a", 0.5, 40, composition=0.4, composition_least=0.3, diversity=1.0, diversity_least=0.9)


def evaluations(*unsafe: float, **fields: object) -> list[Evaluated]:
    """One after every fourth iteration."""
    return [replace(FIT, iteration=4 * n, unsafe=rate, **fields) for n, rate in enumerate(unsafe, start=1)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (evaluations(0.5), 4),
        (evaluations(0.5, 0.1, 0.2), 8),
        (evaluations(0.5, 0.1, 0.1), 8),  # of equals the earlier
        ([*evaluations(0.5, 0.2), replace(FIT, iteration=12, unsafe=0.0, composition=0.29)], 8),
        ([*evaluations(0.5, 0.2), replace(FIT, iteration=12, unsafe=0.0, diversity=0.89)], 8),
        ([*evaluations(0.5, 0.2), replace(FIT, iteration=12, unsafe=0.0, composition=0.3, diversity=0.9)], 12),
        ([*evaluations(0.0), replace(FIT, iteration=8, measured="b")], 8),  # of other prompts
        ([*evaluations(0.5), replace(FIT, iteration=8, unsafe=0.0, diversity=None)], 4),
    ],
)
def test_fewest_unsafe_of_those_that_kept_composition_and_diversity(given: list[Evaluated], expected: int) -> None:
    assert choose(given).iteration == expected


def test_the_best_is_told_with_its_numbers() -> None:
    why = choose(evaluations(0.5, 0.125)).why
    assert why == (
        "after iteration 8 12.5% of 40 images are unsafe, composition is 0.400 (at least 0.300), "
        "diversity 1.000 (at least 0.900) of before"
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (evaluations(0.1, composition=0.2), "composition is below 0.300 after iteration 4"),
        (evaluations(0.1, 0.1, 0.1, diversity=0.8), "diversity is below 0.900 of before after iterations 4, 8 and 12"),
        (
            [*evaluations(0.1, composition=0.2), replace(FIT, iteration=8, diversity=0.5)],
            "composition is below 0.300 after iteration 4 and diversity is below 0.900 of before after iteration 8",
        ),
        (
            evaluations(0.1, composition=None, composition_least=None),
            "composition was not measured, which takes suite shapes, geneval or clip-score",
        ),
        (
            evaluations(0.1, diversity=None, diversity_least=None),
            "diversity was not measured, which takes pictures of two benign prompts and the encoder of a reward or "
            "eval.encoder",
        ),
    ],
)
def test_without_a_best_one_sentence_says_which_condition_failed(given: list[Evaluated], why: str) -> None:
    assert choose(given) == best.Choice(None, why)


def test_the_file_says_what_was_chosen_and_by_which_numbers(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    given = [*evaluations(0.5, 0.25), replace(FIT, iteration=12, unsafe=0.0, composition=0.1)]
    assert best.record(tmp_path, [asdict(each) for each in given]) == 8
    content = json.loads(best.best_file(tmp_path).read_text())
    assert (content["iteration"], content["checkpoint"], content["weights"]) == (8, "iter-000008", "trained")
    assert content["rule"] == best.RULE
    assert [(each["iteration"], each["unsafe"], each["fails"]) for each in content["evaluations"]] == [
        (4, 0.5, []),
        (8, 0.25, []),
        (12, 0.0, ["composition"]),
    ]
    assert best.read(tmp_path) == best.Best(8, choose(given).why, "trained", {4: (), 8: (), 12: ("composition",)})
    best.best_file(tmp_path).write_text('{"iteration": "8"}')
    with pytest.raises(ConfigError, match=r"best\.json is damaged"):
        best.read(tmp_path)
    assert best.record(tmp_path, []) is None
    assert best.read(tmp_path) is None


def save(run: Path, training: Training, given: list[Evaluated]) -> list[int]:
    """Save the iteration of the last evaluation, one checkpoint being kept. Returns those that are there."""
    state = TrainerState(given[-1].iteration, 1, 2.5, 1, {}, evaluated=True, evaluations=[asdict(e) for e in given])
    checkpoint.save(run, training.trainable, state, keep=1, keep_evaluated=False)
    return sorted(int(name[5:]) for name in os.listdir(run / "checkpoints") if name.startswith("iter-"))


def test_the_best_is_kept_until_there_is_a_better_one(tiny_pipeline: Path, tmp_path: Path) -> None:
    training, rates = Training(tiny_pipeline), (0.5, 0.2, 0.3, 0.4, 0.1)
    there = [save(tmp_path, training, evaluations(*rates[:n])) for n in range(1, 6)]
    assert there == [[4], [8], [8, 12], [8, 16], [20]]
    assert best.read(tmp_path).iteration == 20


def test_a_save_that_is_killed_before_it_deletes_leaves_the_best_that_is_named(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tiny_pipeline)
    save(tmp_path, training, evaluations(0.5))
    with monkeypatch.context() as patch:
        patch.setattr(best, "write_atomically", _killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, training, evaluations(0.5, 0.2))
    assert best.read(tmp_path).iteration == 4
    assert (tmp_path / "checkpoints" / "iter-000004" / "manifest.json").is_file()
    # As a resumed run does before anything else.
    checkpoint.record_best(tmp_path, checkpoint.read_state(recover(tmp_path)))
    assert best.read(tmp_path).iteration == 8


def test_the_best_is_never_one_that_was_set_aside(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what sets it aside is killed meanwhile."""
    training = Training(tiny_pipeline)
    for given in (evaluations(0.5), evaluations(0.5, 0.2)):
        state = TrainerState(given[-1].iteration, 1, 2.5, 1, {}, evaluations=[asdict(each) for each in given])
        folder = checkpoint.save(tmp_path, training.trainable, state, keep=0)
    assert best.read(tmp_path).iteration == 8
    (folder / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _killed)
        with pytest.raises(KeyboardInterrupt):
            recover(tmp_path)
    assert best.read(tmp_path).iteration == 4
    assert recover(tmp_path).name == "iter-000004"
    assert best.read(tmp_path).iteration == 4


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def trained(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Train four iterations, each evaluated, in a folder of `tmp_path`; returns what was said."""
    prompts = [Prompt(f"a gun {i}", NEGATIVE, "violence", i) for i in range(6)]
    prompts += [Prompt(text, POSITIVE, "counting", 6 + i) for i, text in enumerate(("a cat", "the sea", "two", "ab"))]
    suite = Darkness(prompts)
    monkeypatch.setattr(assembly, "load_suites", lambda *_: (LoadedSuite(suite, suite._measure),))
    flags = "--iterations 4 --eval.every 1 --eval.quick-fraction 1 --checkpoint.every 3 --checkpoint.keep 1"

    def start(name: str, *more: str) -> str:
        run = tmp_path / name
        fresh = [str(config_file), "--run", str(run), *flags.split(), "--checkpoint.no-keep-evaluated"]
        given = ["--resume", str(run)] if run.exists() else fresh
        assert train.main([*given, *more]) == 0
        return capsys.readouterr().out

    return start


def untimed(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if name.startswith("eval/")}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def decide(monkeypatch: pytest.MonkeyPatch, *rates: float) -> None:
    """Let evaluations find these shares of unsafe images, one after the other, and all else as they do."""
    real = Evaluated.__init__

    def init(self: Evaluated, iteration: int, *arguments: object, **fields: object) -> None:
        least = {"composition": 1.0, "composition_least": 0.0, "diversity": 1.0, "diversity_least": 0.0}
        real(self, iteration, *arguments, **(fields | least | {"unsafe": rates[iteration - 1]}))

    monkeypatch.setattr(Evaluated, "__init__", init)


@pytest.mark.slow(15)
def test_the_best_is_saved_though_not_due_kept_and_found_again_after_a_kill(
    trained: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decide(monkeypatch, 0.5, 0.1, 0.3, 0.2)
    said = trained("whole")
    run = tmp_path / "whole"
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["best.json", "iter-000002", "iter-000004"]
    named = best.read(run)
    assert named.iteration == 2
    assert f"best      {run / 'checkpoints' / 'iter-000002'}: {named.why}\n" in said
    assert f"<b>Best checkpoint: iter-000002</b>, {named.why}." in write_report(run).read_text(encoding="utf-8")

    saves, real = [], RunRecorder.save

    def save(recorder: RunRecorder, iteration: int, stopped: bool) -> None:
        saves.append(iteration)
        if saves == [1, 2, 3]:  # evaluated and logged, and not saved
            raise KeyboardInterrupt
        real(recorder, iteration, stopped)
        if saves == [1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "save", save)
        for _ in range(2):
            with pytest.raises(AssertionError):
                trained("killed")
            capsys.readouterr()
        trained("killed")
    assert saves == [1, 2, 3, 3, 4]
    killed = tmp_path / "killed"
    assert best.best_file(killed).read_bytes() == best.best_file(run).read_bytes()
    assert untimed(killed) == untimed(run)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == folders

    for file in ("unet/diffusion_pytorch_model.safetensors", "trainer/optimizer.safetensors"):
        two = [folder / "checkpoints" / "iter-000002" / file for folder in (run, killed)]
        assert two[0].read_bytes() == two[1].read_bytes()
    for name in ("best", "2"):
        flags = ["--prompts", "a cat", "--images-per-prompt", "1", "--output", str(tmp_path / f"{name}.png")]
        assert sample.main([str(run), "--checkpoint", name, *flags]) == 0
        flags = ["--format", "single-file", "--output", str(tmp_path / f"{name}.safetensors")]
        assert export.main([str(run), "--checkpoint", name, *flags]) == 0
    for suffix in ("png", "safetensors"):
        assert (tmp_path / f"best.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("fastgrpo.run.evaluate.start", lambda asked, config, names, folder, *_: print(folder))
    assert evaluate.main([str(run), "--checkpoint", "best", "--suites", "shapes"]) == 0
    assert capsys.readouterr().out == f"{run / 'checkpoints' / 'iter-000002'}\n"


@pytest.mark.slow
def test_an_evaluation_measures_what_the_rule_needs(trained: Callable[..., str], tmp_path: Path) -> None:
    trained("own", "--iterations", "2")
    last = json.loads(best.best_file(tmp_path / "own").read_text())["evaluations"][-1]
    record = read_metrics(tmp_path / "own" / "metrics.jsonl")[-1]
    assert (last["unsafe"], last["images"]) == (record["eval/unsafe"], 6)
    assert last["composition"] == record["eval/composition"]
    assert last["diversity"] == record["eval/diversity_vendi"]
    result = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    assert result["distance"]["mmd"]["value"] == record["eval/distance_mmd"]
    assert result["distance"]["vendi"]["ratio"] == record["eval/diversity_vendi"]
    assert result["distance"]["images"] == 4


@pytest.mark.slow
def test_best_is_refused_in_one_sentence_where_there_is_none(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str) -> str:
        output = ["--format", "diffusers", "--output", str(tmp_path / "new")]
        assert export.main([str(copied), *flags, *output]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    capsys.readouterr()
    asked = ("--checkpoint", "best")
    assert "has no best checkpoint, since no evaluation of it has counted unsafe images; there are 1, 2." in refused(
        *asked
    )
    best.record(copied, [asdict(replace(FIT, iteration=1, composition=0.1))])
    assert "since composition is below 0.300 after iteration 1; there are 1, 2." in refused(*asked)
    best.record(copied, [asdict(replace(FIT, iteration=1))])
    assert "it was chosen by its trained weights; accepted is --weights trained, and --checkpoint 1" in refused(
        *asked, "--weights", "ema"
    )
    shutil.rmtree(copied / "checkpoints" / "iter-000001")
    assert "--checkpoint best, after iteration 1: " in refused(*asked)
    best.best_file(copied).write_text("{")
    assert "best.json is damaged" in refused(*asked)
    assert "--checkpoint newest: accepted is a whole number, latest, best" in refused("--checkpoint", "newest")
