"""`python -m fastgrpo.estimate`: its sums against arithmetic done here."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

from fastgrpo import estimate
from fastgrpo.costs.counting import count_encoder, count_model, sd1_architecture
from fastgrpo.costs.estimate import iteration_rows
from fastgrpo.costs.memory import candidates, iteration_of, memory_plan, peak, planned_device
from fastgrpo.grpo.steps import drawn_per_iteration, pairs_per_iteration, passes_per_iteration, rollout_schedule
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.devices import choose_dtype
from fastgrpo.system.errors import ConfigError
from fastgrpo.validation import validate
from support import ROOT
from support.costs import ENCODERS, MODEL

SD15 = 859_520_964  # the UNet's published parameter count
HPSV2 = 986_109_441  # open_clip's ViT-H-14
R1 = load_toml(find_preset("safediffusion-r1"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client without a network, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# ---------------------------------------------------------------------------------------------------------------------
# Sums.


def grpo(**fields) -> TrainConfig:
    return replace(R1, grpo=replace(R1.grpo, **fields))


def pairs_of(config: TrainConfig) -> int:
    rollout = config.rollout
    return pairs_per_iteration(
        config, make_schedule(sd1_architecture().scheduler, rollout.steps, rollout.eta, torch.device("cpu"))
    )


def work_of(config: TrainConfig) -> dict[str, int]:
    """Stage and name -> FLOP of one iteration."""
    scheduler = sd1_architecture().scheduler
    passes = passes_per_iteration(config, rollout_schedule(scheduler, config, torch.device("cpu")))
    work = iteration_rows(config, MODEL, ENCODERS, passes, drawn_per_iteration(scheduler, config))
    return {f"{part.stage}: {part.name}": part.total for part in work}


@pytest.mark.parametrize(
    ("fields", "pairs"),
    [
        ({}, 25_088),
        ({"epochs": 2}, 2 * 25_088),
        ({"drop_last_steps": 10}, 512 * 40),
        ({"step_fraction": 0.5}, 512 * 24),  # 24.5 of 49, rounded to even
        ({"window": 7}, 512 * 7),
        ({"trim": 3}, 32 * 10 * 49),
        ({"best_of": 4, "trim": 2}, 32 * 4 * 49),
    ],
)
def test_pairs(fields, pairs):
    config = grpo(**fields)
    assert pairs_of(config) == pairs
    # Training, which counts them on its own, accepts as many optimizer steps as there are pairs and not more.
    validate(replace(config, updates_per_iteration=pairs))
    with pytest.raises(ConfigError, match="updates_per_iteration"):
        validate(replace(config, updates_per_iteration=pairs + config.grpo.epochs))


def test_a_step_without_noise_is_no_pair():
    """A scheduler that ends at alpha 1 takes its last step without noise: there is nothing to learn from."""
    scheduler = {**sd1_architecture().scheduler, "set_alpha_to_one": True}
    schedule = make_schedule(scheduler, 50, 1.0, torch.device("cpu"))
    assert pairs_per_iteration(grpo(drop_last_steps=0), schedule) == 512 * 49


def test_work_of_the_paper_closed_form():
    assert R1.updates_per_iteration == 16
    assert work_of(R1) == {
        "rollout: UNet forward": 512 * 50 * 2 * 101,
        "decode: VAE decode": 512 * 503,
        "reward: image tower, hpsv2": 512 * 701,
        "update: UNet forward + backward": 512 * 49 * 2 * 307,
    }


def test_work_of_a_tree_in_a_sliding_window_closed_form():
    """One path for each of 32 prompts before the window; in it 1, 2 and 16 latents; 16 after it."""
    window = {"stochastic": "window", "steps_outside": 10, "initial_noise": "per_prompt", "branches": (2, 8)}
    config = replace(grpo(window=3), rollout=replace(R1.rollout, **window))
    validate(config)
    drawn = []
    for before in range(47):  # of the grid's 50 steps 3 are the window's, and the last is not trained on
        first = min(max(math.floor(10 * before / 47 + 0.5), 1), 9) if before else 0
        drawn.append(first + 1 + 2 + 16 + 16 * (10 - first))
    work = work_of(config)
    assert work["rollout: UNet forward"] == round(32 * sum(drawn) / 47) * 2 * 101
    assert work["update: UNet forward + backward"] == 32 * (1 + 2 + 16) * 2 * 307
    schedule = rollout_schedule(sd1_architecture().scheduler, config, torch.device("cpu"))
    assert pairs_per_iteration(config, schedule) == 32 * (2 + 16 + 16)
    with pytest.raises(ConfigError, match="updates_per_iteration"):
        validate(replace(config, updates_per_iteration=32 * 19 + 1))


def test_without_guidance_half():
    plain = work_of(replace(R1, rollout=replace(R1.rollout, guidance=1.0)))
    for name in ("rollout: UNet forward", "update: UNet forward + backward"):
        assert 2 * plain[name] == work_of(R1)[name]


def test_half_the_steps_halve_the_update():
    config = grpo(drop_last_steps=2)  # 48 steps, so that a half is whole
    half = replace(config, grpo=replace(config.grpo, step_fraction=0.5))
    name = "update: UNet forward + backward"
    assert 2 * work_of(half)[name] == work_of(config)[name]
    assert work_of(half)["rollout: UNet forward"] == work_of(config)["rollout: UNet forward"]


def test_kl_adds_a_forward_pass_of_every_pair():
    assert work_of(grpo(kl=0.1)) == {**work_of(R1), "update: UNet forward, KL's base": 512 * 49 * 2 * 101}


@pytest.mark.parametrize(("updates", "pairs"), [(16, 512 * 49 * 15 // 16), (1, 0), (3, 512 * 49 - 8363)])
def test_replay_adds_a_forward_pass_of_every_pair_that_the_first_step_does_not_have(updates, pairs):
    config = replace(R1, updates_per_iteration=updates)
    replayed = replace(config, grpo=replace(config.grpo, old_log_prob="replay"))
    assert work_of(replayed) == {**work_of(config), "update: UNet forward, replay": pairs * 2 * 101}


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("auto", "auto", "bfloat16"), ("cpu", "auto", "float32"), ("cpu", "fp16", "float16"), ("auto", "fp32", "float32")],
)
def test_what_a_unet_computes_in_where_it_is_to_be_trained(device, dtype, expected):
    config = replace(R1, engine=replace(R1.engine, device=device, dtype=dtype))
    assert str(choose_dtype(dtype, planned_device(config))) == f"torch.{expected}"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def without_progress(output: str) -> list[str]:
    """Its lines from the first of the answer on: a machine that takes long to count says so before."""
    lines = output.splitlines()
    return lines[lines.index("Computed from the configs, not measured.") :]


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> list[str]:
    assert estimate.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = without_progress(out)
    assert max(len(line) for line in lines if not line.startswith("Left out: ")) <= 99
    return lines


def numbers(lines: list[str], beginning: str) -> list[float]:
    """Those at the end of the line that begins so."""
    line = next(line for line in lines if line.strip().startswith(beginning))
    return [float(number.replace(",", "")) for number in re.findall(r"(?<=\s)[\d,.]+(?=%?(?:\s|$))", line)]


def test_the_papers_recipe(capsys):
    lines = shown(capsys, "safediffusion-r1", "--processes", "8", "--tflops", "200", "--micro-batch", "4")
    assert "          counted as SD 1.x: its configs are not in the hub's cache" in lines
    assert "trained   all of the UNet's 859,520,964, in bf16" in lines
    assert "25,088 (sample, step) pairs" in "\n".join(lines)
    # From the known values: 0.803, 2.515, 0.335 and 2.407 TFLOP.
    rollout, decode, reward, learning = 51_200 * 0.803, 512 * 2.515, 512 * 0.335, 50_176 * 2.407
    total = rollout + decode + reward + learning
    assert numbers(lines, "rollout  UNet forward") == pytest.approx(
        [0.803, 51_200, rollout, 100 * rollout / total], rel=0.01
    )
    assert numbers(lines, "update   UNet forward + backward")[2] == pytest.approx(learning, rel=0.01)
    assert numbers(lines, "in all") == pytest.approx([total], rel=0.01)
    seconds, hours = (
        float(n) for n in re.search(r"([\d.]+) s an iteration, ([\d.]+) hours", "\n".join(lines)).groups()
    )
    assert seconds == pytest.approx(total / (8 * 200), rel=0.01)
    assert hours == pytest.approx(300 * seconds / 3600, rel=0.001)  # both printed to four digits
    # A float32 gradient of 3.438 GB: seven eighths of it to add up, and as much to spread the sums; 16 steps.
    assert "each sends 6.017 GB an optimizer step, 96.27 GB an iteration: 1.925 s at 50 GB/s (--link-gb-s)" in lines
    assert numbers(lines, "always   Adam's two moments")[-1] == pytest.approx(8 * SD15 / 1e9, abs=0.005)
    assert numbers(lines, "always   encoder hpsv2")[-1] == pytest.approx(4 * HPSV2 / 1e9, abs=0.005)
    wanted = ("  always", "  decode   16 images", "  decode   CUDA graphs")
    parts = [numbers(lines, line.strip())[-1] for line in lines if line.startswith(wanted)]
    # Parts are rounded to 0.005 each; ten of them.
    assert numbers(lines, "at most, during the decode")[-1] == pytest.approx(sum(parts), abs=0.05)


def lora(offload: str = "auto", gradient_checkpointing: str = "auto") -> list[str]:
    """A preset for a small card, one pair at a time, with what it decides about memory left open."""
    decided = f"--engine.offload {offload} --engine.gradient-checkpointing {gradient_checkpointing}"
    return ["sd15-12gb", *f"--micro-batch 1 --reward.batch 16 --rollout.decode-batch 2 {decided}".split()]


def test_a_small_card(capsys):
    lines = shown(capsys, *lora())
    assert any("adapters of rank 16, 3,188,736 parameters beside the UNet's 859,520,964, in bf16" in n for n in lines)
    assert "at 100 TFLOP/s on 1 GPU (--tflops): " in "\n".join(lines)
    assert numbers(lines, "at most, during the decode")[-1] < 12 - 1.5  # what the preset is made for; room for CUDA


@pytest.mark.slow(15)
def test_gradient_checkpointing_is_decided_and_counted(capsys):
    """On a card that holds one pair with it but not without; and where the settings say so."""
    beginning = "  gradient checkpointing is"
    off = shown(capsys, *lora(), "--gpu-gb", "80")
    assert "  offloading is off: of 73.60 GB" in "\n".join(off)
    needed = float(re.search(rf"{beginning} off: of 73.60 GB one pair needs ([\d.]+)$", "\n".join(off), re.M)[1])
    short = "--gpu-gb", f"{(needed - 0.1) / 0.92:.3f}"
    on = shown(capsys, *lora(offload="off"), *short)
    # What costs less time is done first, and is enough.
    moved = shown(capsys, *lora(), *short)
    assert any(line.startswith("  offloading is on: of") for line in moved)
    assert any(line.startswith(f"{beginning} off: of") for line in moved)
    pattern = rf"{beginning} on: of [\d.]+ GB one pair needs {needed:.2f} without it, ([\d.]+) with it$"
    found = re.search(pattern, "\n".join(on), re.M)
    assert float(found[1]) < needed - 0.1
    asked = shown(capsys, *lora(gradient_checkpointing="on"))
    assert "  gradient checkpointing is on, as engine.gradient_checkpointing says" in asked
    for lines in (on, asked):
        most, before = (numbers(some, "at most, during the decode")[-1] for some in (lines, off))
        assert most < before - 0.3
        _, times, work, _ = numbers(lines, "update   UNet 2 x forward + backward")[-4:]
        _, times_before, work_before, _ = numbers(off, "update   UNet forward + backward")
        assert times == times_before
        assert 1.2 < work / work_before < 1.5
        assert numbers(lines, "update   2 UNet samples' activations, checkpointed, bf16")[-1] < 0.3
    cpu = shown(capsys, "shapes", "--engine.device", "cpu")
    assert "  gradient checkpointing is off, as auto is on a CPU" in cpu


@pytest.mark.slow
def test_micro_batch_0_fills_the_gpu(capsys):
    """With the largest candidate that keeps the peak within the share; the next one would not."""
    model = count_model(sd1_architecture(), ModelConfig(), torch.bfloat16, kernels=True)
    encoders = {"hpsv2": count_encoder("hpsv2")}
    sizes = candidates(iteration_of(R1, steps=50, pairs=512 * 49, processes=8))
    for gigabytes, share in ((141, 0.92), (80, 0.92), (80, 0.5)):
        arguments = ("--micro-batch", "0", "--gpu-gb", str(gigabytes), "--engine.memory", str(share))
        lines = shown(capsys, "safediffusion-r1", "--processes", "8", *arguments)
        pattern = rf"  micro_batch = 0: (\d+) pairs, the most that {gigabytes * share:.1f} GB should hold"
        size = next(int(found[1]) for line in lines if (found := re.match(pattern, line)))
        peaks = [
            peak(memory_plan(R1, model, encoders, torch.bfloat16, 8, pairs))[1] / 1e9
            for pairs in sizes[sizes.index(size) : sizes.index(size) + 2]
        ]
        assert peaks[0] <= gigabytes * share < peaks[1]
    assert "  micro_batch = 0: 32 pairs on a CPU" in shown(
        capsys, "shapes", "--micro-batch", "0", "--engine.device", "cpu"
    )


def test_what_cannot_be_counted_is_left_out_in_a_line(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def score(images, prompts): ...", encoding="utf-8")
    term = f"{tmp_path}/mine.py:score"
    flags = ("--reward.terms", "clip", term, "--reward.clip-encoder", "hf-hub:someone/encoder")
    lines = shown(capsys, "shapes", *flags)
    assert any(line.startswith("Left out: the reward's encoder 'hf-hub:someone/encoder' cannot") for line in lines)
    assert f"Left out: the reward's term {term}" in lines
    assert not any(line.startswith("  reward ") for line in lines)


@pytest.mark.slow(10)
def test_as_a_program_of_its_own(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo.estimate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = without_progress(done.stdout)
    assert lines[:3] == ["Computed from the configs, not measured.", "", "model     shapes"]
    assert not any("counted as SD 1.x" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["safediffusion-r1", "--processes", "5"],
            "prompts_per_iteration = 32: accepted is a multiple of the 5 processes",
        ),
        (["shapes", "--processes", "0"], "--processes 0: accepted is 1 or more"),
        (["shapes", "--tflops", "-1"], "--tflops -1.0: accepted is a number above 0, or 0"),
        (["shapes", "--tflops", "nan"], "--tflops nan: accepted"),
        (["shapes", "--link-gb-s", "0"], "--link-gb-s 0.0: accepted is a number above 0"),
        (["shapes", "--gpu-gb", "0"], "--gpu-gb 0.0: accepted is a number above 0"),
        (["shapes", "--tflop", "1"], "--tflop: no such flag (did you mean --tflops?)"),
        (["shapes", "--grpo.trim", "4"], "grpo.trim = 4"),
        (["shapes", "--model.path", "nowhere"], "model.path is 'nowhere'"),
        (["shapes", "--model.lora-rank", "4", "--model.lora-targets", "to_x"], "to_x"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert estimate.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgrpo: ")
    assert message in err
    assert err.count("\n") == 1
