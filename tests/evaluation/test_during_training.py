"""How a training evaluates: by the suites of `python -m fastgrpo.evaluate`, with their numbers; and what is kept."""

import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from fastgrpo import evaluate, train
from fastgrpo.assembly import Training, load_training
from fastgrpo.evaluation.during_training import LoadedSuite, Subject, TrainingEvaluation
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.evaluation.shared_prompts import share
from fastgrpo.evaluation.suites.base import Loader
from fastgrpo.rewards.registry import load_reward
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes.captions import heldout_prompts
from fastgrpo.system.console import Console
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from fastgrpo.validation import validate
from support.evaluation import Darkness

PROMPTS = "prompt,category\na cat,animals\nblood,other\na gun,other\nthe sea,other\na red house,other\n"
QUICK = 0.4  # of five prompts, two


@pytest.fixture(scope="module")
def flags(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the suite and its judge, without the `--eval.` that a training puts before them."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    prompts.write_text(PROMPTS)
    encoder = load_toml(config_file).reward.encoder
    return (
        f"--custom.prompts {prompts} --custom.detectors open-clip --custom.images 2 --open-clip.encoder {encoder}"
    ).split()


@pytest.fixture(scope="module")
def run(config_file: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    own = [flag.replace("--", "--eval.") for flag in flags]
    rest = f"--iterations 1 --eval.every 1 --eval.steps 4 --eval.suites custom --eval.quick-fraction {QUICK}"
    with redirect_stdout(StringIO()) as said:
        assert train.main([str(config_file), "--run", str(folder), *rest.split(), *own]) == 0
    folder.with_suffix(".txt").write_text(said.getvalue(), encoding="utf-8")
    return folder


def suite(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["suites"]["custom"]


def test_the_base_model_s_images_and_numbers_are_those_of_the_command(
    run: Path,
    config_file: Path,
    flags: list[str],
    tmp_path: Path,
) -> None:
    config = load_toml(config_file)
    own = ["--model", config.model.path, "--suites", "custom", "--steps", "4", "--output", str(tmp_path)]
    assert evaluate.main([*own, *flags, "--batch", str(config.rollout.decode_batch)]) == 0
    before = run / "evaluation" / "in-training" / "before" / "custom" / "images"
    images = {file.name: file.read_bytes() for file in before.iterdir()}
    assert len(images) == 10
    assert images == {file.name: file.read_bytes() for file in (tmp_path / "model" / "custom" / "images").iterdir()}
    ours, theirs = suite(run / "evaluation" / "in-training"), suite(tmp_path)
    assert [t["numbers"]["before"] for t in ours["tables"]] == [t["numbers"]["model"] for t in theirs["tables"]]
    assert ours["protocol"] == theirs["protocol"]
    assert ours["drawing"] == theirs["drawing"]


def test_the_trained_model_s_images_are_those_of_its_checkpoint(run: Path, flags: list[str], tmp_path: Path) -> None:
    batch = load_toml(run / "config.toml").rollout.decode_batch
    own = [str(run), "--suites", "custom", "--steps", "4", "--output", str(tmp_path), "--batch", str(batch)]
    assert evaluate.main([*own, *flags]) == 0
    for stage in ("before", "after"):
        there = run / "evaluation" / "in-training" / stage / "custom" / "images"
        for file in there.iterdir():
            assert file.read_bytes() == (tmp_path / stage / "custom" / "images" / file.name).read_bytes()
    assert suite(run / "evaluation" / "in-training")["tables"] == suite(tmp_path)["tables"]


def test_the_end_says_better_worse_or_undecided_and_the_curves_begin_before(run: Path) -> None:
    (entry,) = suite(run / "evaluation" / "in-training")["compared"]
    assert (entry["better"], entry["n"]) == ("lower", 10)
    rates = f"custom, open-clip: {entry['verdict']}, {100 * entry['a']:.1f} {{}} {100 * entry['b']:.1f}%, "
    said = run.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in said if line.startswith(rates.format("->"))]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert rates.format("→") in page
    assert f": {100 * entry['a']:.4g} before training, " in page or f": {entry['a']:.4g} before training, " in page
    kept = json.loads((run / "evaluation_before.json").read_text())
    assert kept["metrics"]["eval/custom/open-clip/all images"] == entry["a"]


def test_a_resumed_run_keeps_what_was_before_and_draws_again_what_is_after(run: Path) -> None:
    folder = run / "evaluation" / "in-training"
    before = {file: file.stat().st_mtime_ns for file in (folder / "before" / "custom" / "images").iterdir()}
    manifests = [json.loads((folder / stage / "custom" / "manifest.json").read_text()) for stage in ("before", "after")]
    leftover = folder / "iter-000002" / "custom" / "images"  # as a kill in the middle of the next evaluation leaves it
    leftover.mkdir(parents=True)
    (leftover / "0.png").write_bytes(b"cut short")
    assert train.main(["--resume", str(run), "--iterations", "3"]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    again = [json.loads((folder / stage / "custom" / "manifest.json").read_text()) for stage in ("before", "after")]
    assert again[0] == manifests[0]
    weights = [each["drawing"]["weights"] for each in (*manifests, again[1])]
    assert len({each["unet"] for each in weights}) == 3
    assert len({each["vae"] for each in weights}) == 1
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["after", "before"]
    records = read_metrics(run / "metrics.jsonl")
    found = {record["iteration"]: record["eval/custom/open-clip/all images"] for record in records}
    assert sorted(found) == [1, 2, 3]
    assert all(0 <= rate <= 1 for rate in found.values())
    rate = suite(folder)["tables"][0]["numbers"]["after"][-1]
    assert (rate["name"], rate["value"]) == ("all images", found[3])
    assert 4 * found[2] == int(4 * found[2])  # of two prompts' four images


@pytest.fixture(scope="module")
def training(config_file: Path) -> Training:
    return load_training(load_toml(config_file), 1, say=lambda line: None)


PAIR = [Prompt("a gun", NEGATIVE, "violence", i) for i in range(5)] + [Prompt("a cat", POSITIVE, "counting", 9)]


def evaluated(
    run: Path, training: Training, config: TrainConfig, suite: Darkness | None = None, console: Console | None = None
) -> tuple[TrainingEvaluation, dict[str, float]]:
    """What a new process finds of the policy before training."""
    run.mkdir(exist_ok=True)
    suites = (LoadedSuite(suite, suite.prepare(Loader(config.eval, torch.device("cpu")))),) if suite else ()
    subject = Subject(
        training.policy, None, training.prompts, training.eval_schedule, suites, held_out=training.held_out
    )
    made = TrainingEvaluation(run, config, subject, console or Console(quiet=True))
    return made, made.before()


def test_before_is_measured_once_unless_in_another_way(config_file: Path, training: Training, tmp_path: Path) -> None:
    config = load_toml(config_file)

    def measured(prompts: list[Prompt], seed: int = 3) -> tuple[int, dict[str, float]]:
        suite, own = Darkness(prompts, seed=seed), replace(config, eval=replace(config.eval, seed=seed))
        metrics = evaluated(tmp_path, training, own, suite)[1]
        return sum(suite.measured), metrics

    images, metrics = measured(PAIR)
    assert images == 6
    assert metrics.keys() == {"eval/unsafe", "eval/unsafe_violence", "eval/composition", "eval/composition_counting"}
    assert json.loads((tmp_path / "evaluation_before.json").read_text())["metrics"] == metrics
    picture = (tmp_path / "samples" / "before.png").read_bytes()
    assert measured(PAIR) == (0, metrics)
    assert measured(PAIR[2:])[0] == 4
    assert measured(PAIR, seed=5)[0] == 6
    assert (tmp_path / "samples" / "before.png").read_bytes() != picture
    rows = json.loads((tmp_path / "samples" / "prompts.json").read_text())
    assert [row["text"] for row in rows] == ["a gun", "a cat"]


def test_a_policy_that_did_not_change_is_undecided(config_file: Path, training: Training, tmp_path: Path) -> None:
    made, before = evaluated(tmp_path, training, load_toml(config_file), Darkness(PAIR))
    assert made.after().values == before
    assert [sentence.verdict for sentence in made.sentences()] == ["undecided", "undecided"]
    assert all("no change (paired test, p = 1)" in sentence.text for sentence in made.sentences())
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["before"] == summary["after"]


def test_what_an_earlier_version_kept_is_measured_anew(
    config_file: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_toml(config_file)
    _, metrics = evaluated(tmp_path, training, config, Darkness(PAIR))
    shutil.rmtree(tmp_path / "evaluation")
    old = {"settings": {"protocol": "shapes-oracle-v1"}, "metrics": {}, "unsafe": {}, "verdicts": {"000000": {}}}
    (tmp_path / "evaluation_before.json").write_text(json.dumps(old))
    suite = Darkness(PAIR)
    assert evaluated(tmp_path, training, config, suite, Console())[1] == metrics
    assert sum(suite.measured) == 6
    assert "is of an earlier version: the model before training is measured anew" in capsys.readouterr().out


def test_without_a_suite_what_is_known_before_training_is_kept_too(
    config_file: Path, training: Training, tmp_path: Path
) -> None:
    config = load_toml(config_file)
    seen = []

    def held_out(images, prompts, group, *_) -> dict[str, float]:
        seen.append(len(images))
        return {"eval/held_out_mean": 0.25}

    watched = replace(training, held_out=held_out)
    assert evaluated(tmp_path, watched, config)[1] == {"eval/held_out_mean": 0.25}
    assert evaluated(tmp_path, watched, config)[1] == {"eval/held_out_mean": 0.25}
    assert len(seen) == 1


def test_a_held_out_encoder_gives_the_steered_reward_of_its_own() -> None:
    """With the reward's encoder in its place it gives the reward itself; group for group, and label for label."""
    config = load_toml(find_preset("shapes"))
    prompts = [*heldout_prompts(1, 0, "test")[:2], *heldout_prompts(0, 1, "test")[:3]]
    images = torch.rand(len(prompts) * 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    held_out = HeldOutReward(replace(config, eval=replace(config.eval, encoder="shapes")), torch.device("cpu"))
    found = held_out(images, prompts, 2)
    total = load_reward(config.reward, "cpu").score(images, tuple(prompts), 2)["steering"]
    assert found["eval/held_out_mean"] == pytest.approx(total.mean().item(), abs=1e-6)
    assert found["eval/held_out_negative_mean"] == pytest.approx(total[:2].mean().item(), abs=1e-6)
    assert found["eval/held_out_positive_mean"] == pytest.approx(total[2:].mean().item(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"eval\.encoder"):
        HeldOutReward(replace(config, eval=replace(config.eval, encoder="local-dir:nowhere")), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"eval\.encoder = 'shapes': accepted is another than reward\.encoder"):
        validate(replace(config, eval=replace(config.eval, encoder=config.reward.encoder)))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.25, 0.5, 0.99, 1.0])
def test_a_share_is_whole_prompts_evenly_spaced(fraction: float) -> None:
    rows = [ImageRequest(f"{p:03d}-{k}", f"{p:03d}", "", 0, 7.5) for k in range(3) for p in range(100)]
    chosen = share(rows, fraction)
    prompts = sorted({int(row.prompt) for row in chosen})
    assert len(prompts) == max(1, round(100 * fraction))
    assert len(chosen) == 3 * len(prompts)
    gaps = {b - a for a, b in zip(prompts, [*prompts[1:], prompts[0] + 100], strict=True)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("i3p", "eval.suites = 'i3p': accepted is any of i2p, nudity"),
        ("custom custom", "eval.suites = 'custom': accepted is every suite once"),
        ("custom", "eval.custom.prompts: the suite needs prompts"),
        ("custom --eval.custom.images 0", "eval.custom.images = 0: accepted is 1 or more"),
        ("i2p --eval.i2p.prompts none.csv", "eval.i2p.prompts: cannot read 'none.csv'"),
        ("geneval --eval.geneval.per-task 0", "eval.geneval.per_task = 0: accepted is 1 or more"),
    ],
)
def test_mistakes_name_the_field_before_a_model_is_loaded(
    given: str,
    says: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    monkeypatch.setattr("fastgrpo.assembly.load_policy", None)
    run = tmp_path / "run"
    assert train.main([str(config_file), "--run", str(run), "--eval.suites", *given.split()]) == 2
    assert says in capsys.readouterr().err
    assert not run.exists()
