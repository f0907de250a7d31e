"""Several processes evaluate, draw and learn in equal shares, and leave what one process leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgrpo import evaluate
from support import counted
from support.files import content
from support.processes import together

pytestmark = pytest.mark.slow

FLAGS = "--shapes.unsafe-per-category 1 --shapes.composition-per-task 1 --steps 2 --batch 4 --device cpu"


def test_two_processes_leave_the_files_of_one(tmp_path: Path) -> None:
    assert evaluate.main([*FLAGS.split(), "--output", str(tmp_path / "one")]) == 0
    first, other = together(2, *FLAGS.split(), "--output", str(tmp_path / "two"), main=evaluate.main)
    assert (first.returncode, other.returncode) == (0, 0), (first, other)
    assert first.stdout.count("evaluation.json") == 1
    assert other.stdout == "", "the first process alone speaks"
    assert content(tmp_path / "two") == content(tmp_path / "one")


BATCH = 4
POSITIVE = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle"]


@pytest.mark.slow(15)
def test_three_processes_evaluate_and_learn_in_equal_shares(tmp_path: Path) -> None:
    """Steps are too small to move a weight, so that all of the run can be compared: 1e-30 is lost in any weight."""
    (tmp_path / "positive.txt").write_text("\n".join(POSITIVE))
    flags = f"""shapes --iterations 1 --prompts-per-iteration 6 --group-size 3 --updates-per-iteration 2 --micro-batch 5
        --prompts.positive {tmp_path / "positive.txt"} --rollout.steps 2 --grpo.drop-last-steps 0
        --rollout.decode-batch {BATCH}
        --model.lora-rank 0 --optim.lr 1e-30 --optim.warmup 0 --optim.weight-decay 0 --optim.ema 0.5
        --eval.weights ema --eval.unsafe-per-category 1 --eval.composition-per-task 1 --engine.threads 1
        --engine.device cpu""".split()
    one, three, counts = tmp_path / "one", tmp_path / "three", tmp_path / "counts"
    for folder in (counts / "1", counts / "3"):
        folder.mkdir(parents=True)
    for processes, run in ((1, one), (3, three)):
        each = together(processes, str(counts / str(processes)), *flags, "--run-folder", str(run), main=counted.main)
        assert [ended.returncode for ended in each] == [0] * processes, each

    # Of the suite: every picture and what was found in it, byte for byte, since its batches are the same.
    folder = Path("evaluation") / "in-training"
    ours, theirs = content(three / folder), content(one / folder)
    assert ours.keys() == theirs.keys()
    # The weights' hashes: a weight of 0 becomes 1e-30 with the gradient's sign, which may be rounding.
    assert {name for name in ours if ours[name] != theirs[name]} <= {"evaluation.json", "after/shapes/manifest.json"}
    first, second = (json.loads((run / "evaluation.json").read_text()) for run in (one, three))
    assert first["before"] == second["before"]
    assert first["after"] == second["after"]
    # Other batches: 8 bits round by one more where float32's last digits differ.
    for name in ("before", "after"):
        grids = [np.asarray(Image.open(run / "samples" / f"{name}.png"), np.int16) for run in (one, three)]
        assert np.abs(grids[0] - grids[1]).max() <= 1
    first, second = (load_file(run / "base.safetensors") for run in (one, three))
    assert torch.equal(first["ids"], second["ids"])
    assert (first["features"] - second["features"]).abs().max() < 1e-3  # as in test_base_pictures.py

    said = [json.loads((counts / "3" / f"{rank}.json").read_text()) for rank in range(3)]
    (alone,) = (json.loads((counts / "1" / "0.json").read_text()) for _ in "1")
    for name, most in (("painted", BATCH), ("looked_at", 64), ("pictures", 2), ("base", 4)):
        numbers = [sum(each[name]) for each in said]
        assert sum(numbers) == sum(alone[name]) > 0, name
        assert max(numbers) - min(numbers) <= most, name
    for step, pairs in enumerate(alone["pairs"]):
        numbers = [each["pairs"][step] for each in said]
        assert sum(numbers) == pairs
        assert max(numbers) - min(numbers) <= 1
    # One gradient: rewards of pictures drawn in other batches are some 1e-6 apart, and are divided by their spread.
    first, *others = (
        load_file(counts / of) for of in ("1/0.safetensors", *(f"3/{rank}.safetensors" for rank in range(3)))
    )
    size = sum(gradient.double().square().sum() for gradient in first.values()).sqrt()
    for other in others:
        apart = sum(
            (other[name].double() - gradient.double()).square().sum() for name, gradient in first.items()
        ).sqrt()
        assert apart <= 1e-3 * size
