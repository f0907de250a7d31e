"""Suites that a training evaluates with (eval.suites): what they find is what `python -m fastgrpo.evaluate` finds."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from fastgrpo import evaluate, train
from fastgrpo.evaluation.during_training import share
from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.toml import load_toml

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
    assert f"before training: {entry['a']:.6g}</title>" in page
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
