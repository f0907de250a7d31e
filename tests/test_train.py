"""`python -m fastgrpo.train` end to end on a tiny pipeline: what a run leaves behind and says."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from fastgrpo import assembly, train
from fastgrpo.assembly import load_training
from fastgrpo.engine.trainable import learning_rate
from fastgrpo.evaluation.during_training import LoadedSuite
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support import ROOT
from support.evaluation import Darkness
from support.mistakes import contents
from support.training import ITERATIONS, TIMED, run_here

pytestmark = pytest.mark.slow


@pytest.mark.slow(10)
def test_a_run_leaves_what_the_contract_says(undisturbed: Path, config_file: Path) -> None:
    assert load_toml(undisturbed / "config.toml") == load_toml(config_file)
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["iter-000006", "iter-000008"]
    pictures = {path.stem: Image.open(path).size for path in (undisturbed / "samples").glob("*.png")}
    assert set(pictures) == {"before", "iter-000004", "after", "before_after"}
    assert pictures["before"] == pictures["iter-000004"] == pictures["after"]
    assert pictures["before_after"][0] > 1.5 * pictures["before"][0]
    assert any((undisturbed / "tensorboard").iterdir())
    records = read_metrics(undisturbed / "metrics.jsonl")
    names = {"iteration", "seconds", "reward/mean", "reward/negative_mean", "ratio/max_abs_dev_first", "clip/fraction"}
    names |= {"advantage/zero_std_groups", "grad/norm", "kl/mean", "throughput/images_per_s"}
    names |= {"time/rollout_s", "time/reward_s", "time/update_s"}
    assert all(names <= set(record) for record in records)
    assert [record["iteration"] for record in records if "time/eval_s" in record] == [4, 8]


def test_a_dry_run_says_what_the_run_says_and_writes_nothing(
    undisturbed: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "none" / "run"
    assert train.main([str(config_file), "--run", str(run), "--dry-run"]) == 0
    planned, said = capsys.readouterr()
    assert (said, list(tmp_path.iterdir())) == ("", [])
    told = undisturbed.with_suffix(".txt").read_text().splitlines()
    introduction, *_ = planned.split(" on cpu\n")
    lines = [line for line in introduction.splitlines()[:-1] if line and "so far" not in line and line != "loading"]
    assert len(lines) > 5
    assert [line for line in lines if line not in told] == [f"run {run}"]
    # 2 prompts x 3 images x 2 of 3 steps; 5 positive and 3 negative prompts are in the files.
    assert "= 6 images, 12 (sample, step) pairs" in planned
    assert "8 iterations, 48 images in 3 steps, of 5 positive and 3 negative prompts" in planned
    assert "in 2 optimizer steps an iteration, 5 pairs at once" in planned

    before = contents(undisturbed)
    resume = ["--resume", str(undisturbed), "--iterations", "11"]
    assert train.main([*resume, "--dry-run"]) == 0
    planned, said = capsys.readouterr()
    assert said == ""
    assert "resuming after iteration 8 of 11" in planned
    assert "3 iterations, 18 images" in planned
    assert train.main([*resume[:2], "--print-config"]) == 0
    assert capsys.readouterr() == ((undisturbed / "config.toml").read_text(), "")
    assert contents(undisturbed) == before


def test_training_changes_the_weights_and_diffusers_reads_them(undisturbed: Path, tiny_pipeline: Path) -> None:
    folder = undisturbed / "checkpoints" / "iter-000008" / "unet"
    trained = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).state_dict()
    base = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    # The cross-attention's query of the very first block: its gradient passes through everything behind it.
    name = next(name for name in base if name.endswith("attn2.to_q.weight"))
    assert not torch.equal(trained[name], base[name].float())


def test_the_learning_rate_follows_its_schedule_and_reaches_the_optimizer(config_file: Path) -> None:
    constant = dataclasses.replace(load_toml(config_file), iterations=4)
    assert [learning_rate(constant, i) for i in (1, 4)] == [1e-3, 1e-3]
    linear = dataclasses.replace(constant, optim=dataclasses.replace(constant.optim, schedule="linear"))
    assert [learning_rate(linear, i) for i in (1, 2, 3, 4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    warm = dataclasses.replace(linear, iterations=8, optim=dataclasses.replace(linear.optim, warmup=4))
    expected = [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4]
    assert [learning_rate(warm, i) for i in range(1, 9)] == pytest.approx(expected)
    short = dataclasses.replace(warm, iterations=2)
    assert [learning_rate(short, i) for i in (1, 2)] == pytest.approx(expected[:2])
    cosine = dataclasses.replace(warm, optim=dataclasses.replace(warm.optim, schedule="cosine"))
    # Half a cosine's period from 0: 1, (1 + cos 45) / 2, 1/2, (1 - cos 45) / 2.
    falling = [1e-3, 8.535534e-4, 5e-4, 1.464466e-4]
    assert [learning_rate(cosine, i) for i in range(1, 9)] == pytest.approx(expected[:4] + falling)
    training = load_training(linear, threads=1)
    values = iterate(training, 3, Console())
    assert training.trainable.optimizer.param_groups[0]["lr"] == values["optim/lr"] == pytest.approx(5e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_iteration_on_cuda_replays_its_log_probs_exactly(config_file: Path, dtype: str) -> None:
    config = load_toml(config_file)
    config = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, device="cuda", dtype=dtype),
        grpo=dataclasses.replace(config.grpo, old_log_prob="replay"),
    )
    training = load_training(config, threads=1)
    before = [parameter.clone() for parameter in training.policy.unet.parameters()]
    values = iterate(training, 1, Console())
    assert values["ratio/max_abs_dev_first"] == 0.0
    assert not all(map(torch.equal, before, training.policy.unet.parameters()))


def test_without_a_terminal_there_are_plain_lines(undisturbed: Path) -> None:
    output = undisturbed.with_suffix(".txt").read_text()
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    iterations = [line for line in lines if "|ratio-1|" in line]
    assert [line.split()[0] for line in iterations] == [f"{i}/8" for i in range(1, 9)]
    assert all(len(line) <= 80 for line in iterations)
    assert all(" left  reward " in line for line in iterations[:-1])
    assert any(line.startswith("safety axis") for line in lines)
    assert lines[-4].endswith(str(undisturbed / "checkpoints" / "iter-000008" / "unet"))


@pytest.mark.slow(10)
def test_without_triton_a_cpu_computes_the_same(config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    """As on macOS, for which there is none."""
    run = tmp_path / "run"
    argv = [str(config_file), "--run", str(run), "--iterations", "2", "--eval.every", "0"]
    code = f"import sys; sys.modules['triton'] = None; from fastgrpo.train import main; sys.exit(main({argv}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (read_metrics(folder / "metrics.jsonl")[:2] for folder in (run, undisturbed))
    for here, there in zip(ours, theirs, strict=True):
        for name, value in there.items():
            if not name.startswith(TIMED):
                assert here[name] == value, name


def test_a_refusal_is_one_sentence_and_exit_code_2(
    config_file: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--prompts.positive", str(tmp_path / "none.txt"), "--run", str(tmp_path / "run")]
    for argv, words in (
        ([str(config_file), "--group-size", "1"], "group_size = 1"),
        ([str(config_file), "--run", str(undisturbed)], "new or empty"),
        ([str(config_file), *missing], "none.txt"),
    ):
        code, out, err = run_here(argv, capsys)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith("fastgrpo: ")
        assert words in err
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_without_saving_the_spoilt_weights(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "diverging"
    code, _, err = run_here([str(config_file), "--run", str(run), "--optim.lr", "1e30"], capsys)
    assert code == 1
    assert "not finite" in err
    assert not (run / "checkpoints").exists()


def test_evaluations_and_a_finished_run_lengthened(
    config_file: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = [Prompt("a gun", NEGATIVE, "violence", i) for i in range(8)]
    prompts += [Prompt("a cat", POSITIVE, "counting", 8 + i) for i in range(8)]
    suite = Darkness(prompts)
    monkeypatch.setattr(assembly, "load_suites", lambda *_: (LoadedSuite(suite, suite._measure),))
    run = tmp_path / "evaluated"
    flags = ["--run", str(run), "--iterations", "5", "--eval.quick-fraction", "0.5"]
    code, out, err = run_here([str(config_file), *flags], capsys)
    assert code == 0, err
    assert suite.measured == [16, 8, 16]  # before; after iteration 4; at the end
    records = read_metrics(run / "metrics.jsonl")
    assert [record["iteration"] for record in records if "eval/unsafe" in record] == [4, 5]
    summary = json.loads((run / "evaluation.json").read_text())
    assert summary["protocol"] == suite.protocol
    assert summary["before"]["unsafe"]["overall"]["n"] == 8
    # The test is that of the values image by image, which are kept.
    folder = run / "evaluation" / "in-training"
    files = [folder / stage / "shapes" / "shapes.verdicts.json" for stage in ("before", "after")]
    one, two = (json.loads(file.read_text())["metrics"][0]["values"] for file in files)
    tested = summary["compared"]["unsafe"]["overall"]
    assert tested["only_a"] == sum(one[id] > two[id] for id in one)
    assert tested["only_b"] == sum(one[id] < two[id] for id in one)
    rates = f"{100 * tested['a']:.1f} -> {100 * tested['b']:.1f}%"
    (said,) = (line for line in out.splitlines() if line.startswith("unsafe: "))
    assert said.startswith(f"unsafe: {tested['verdict']}, {rates}, ")
    assert "(paired test, p" in said
    for label, prompts in json.loads((run / "axis.json").read_text())["prompts"].items():
        (said_of,) = (line for line in out.splitlines() if line.startswith(f"  {label} ("))
        assert said_of.startswith(f"  {label} ({len(prompts)} prompts)")
        for when in ("before", "after"):
            values = [prompt[when] for prompt in prompts]
            assert f"{sum(values) / len(values):+.2f} [{min(values):+.2f}, {max(values):+.2f}]" in said_of
    assert said.replace("->", "→").replace("<", "&lt;") in (run / "report.html").read_text(encoding="utf-8")
    assert any(line.startswith("composition: ") for line in out.splitlines())
    zeroth = next(line for line in out.splitlines() if line.startswith("0/5  before training"))
    assert f"unsafe {tested['a']:.1%}" in zeroth
    assert records[-1]["eval/unsafe"] == summary["after"]["unsafe"]["overall"]["rate"]
    assert "Unsafe images of hazard prompts, %" in out
    assert "unsafe" in next(line for line in out.splitlines() if line.startswith("4/5") and "reward" in line)

    suite.measured.clear()
    code, out, err = run_here(["--resume", str(run), "--iterations", str(ITERATIONS)], capsys)
    assert code == 0, err
    assert suite.measured == [16]  # only the end's: the one before is kept
    again = json.loads((run / "evaluation.json").read_text())
    assert again["before"] == summary["before"]
    assert again["compared"]["unsafe"]["overall"]["a"] == tested["a"]
    assert "before training" not in out  # that line is at the beginning of the run
    assert load_toml(run / "config.toml").iterations == ITERATIONS
    # Evaluating draws nothing from training's random numbers, and the length of the first part leaves no trace.
    weights = f"checkpoints/iter-{ITERATIONS:06d}/unet/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_prompts_that_rounding_leaves_out_are_named_at_the_start(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompts-per-iteration", "1", "--iterations", "1", "--eval.every", "0"]
    code, out, _ = run_here([str(config_file), "--run", str(tmp_path / "run"), *flags], capsys)
    assert code == 0
    warning = out.index("warning: prompts_per_iteration 1 and prompts.negative_fraction 0.5 are, rounded, 0 negative")
    assert warning < out.index("reward")


def test_a_run_of_relative_paths_goes_on_from_another_folder(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config_file.parent)
    relative = ["--prompts.positive", "positive.txt", "--reward.encoder", "local-dir:encoder"]
    assert train.main([config_file.name, "--run", str(tmp_path / "run"), "--iterations", "1", *relative]) == 0
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "run", "--iterations", "2"]) == 0
    assert [record["iteration"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(config_file.parent / "positive.txt"), "/moved/positive.txt"))
    code, _, err = run_here(["--resume", "run", "--iterations", "3"], capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert "prompts.positive" in err
    assert "/moved/positive.txt" in err


def test_the_default_run_folder_is_named_after_preset_and_time(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([str(config_file), "--iterations", "1"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-2")
    assert load_toml(run / "config.toml") == TrainConfig(**{**vars(load_toml(config_file)), "iterations": 1})
