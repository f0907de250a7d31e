"""Several processes: what they compute is what one process computes, and a resume is exact."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgrpo import train
from fastgrpo.run.checkpoint import read_state
from fastgrpo.run.metrics import read_metrics
from fastgrpo.system.distributed import Ranks
from support.processes import together

pytestmark = pytest.mark.slow

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.slow(10)
def test_two_processes_compute_what_one_computes_and_resume_exactly(config_file: Path, tmp_path: Path) -> None:
    """One negative and one positive prompt, one for each process, with a KL term, a global std and averaged weights.

    Two own half of the optimizer's state each, gathered for evaluations and checkpoints; one goes on from theirs, and
    two from the newest good one.
    """
    options = [str(config_file), "--iterations", "2", "--grpo.advantage", "global", "--optim.ema", "0.5"]
    options += ["--reward.terms", "steering", "clip"]
    options += ["--engine.threads", "1", "--checkpoint.every", "1", "--checkpoint.keep", "0", "--eval.every", "0"]
    options += ["--engine.shard", "optimizer", "--eval.weights", "ema"]
    one, two, again, alone = (tmp_path / name for name in ("one", "two", "again", "alone"))
    assert train.main([*options, "--run", str(one)]) == 0
    first_one, other = together(2, *options, "--run-folder", str(two))
    assert (first_one.returncode, other.returncode) == (0, 0), (first_one, other)
    assert len(re.findall(r"^1/2 .*ratio-1", first_one.stdout, flags=re.MULTILINE)) == 1
    assert other.stdout == "", "the first process alone speaks"

    first, second = (read_metrics(run / "metrics.jsonl") for run in (one, two))
    own = ("reward/mean", "reward/std", "reward/negative_mean", "reward/positive_mean", "reward/safety")
    for name in (*own, "reward/clip_positive", "reward/clip_negative", "advantage/abs_mean"):
        # The rollouts before the first update: UNet and encoder in batches of 3 instead of 6, some 1e-6 apart.
        assert abs(first[0][name] - second[0][name]) < 1e-4, name
    for name in ("grad/norm", "kl/mean", "loss/policy", "ratio/mean", "clip/fraction"):
        assert abs(first[0][name] - second[0][name]) <= 1e-3 * abs(first[0][name]) + 1e-6, name
    assert second[0]["ratio/max_abs_dev_first"] <= 1e-6
    assert_close(two, one, iteration=1)

    for copy in (again, alone):
        shutil.copytree(two, copy)
    shutil.rmtree(alone / "checkpoints" / "iter-000002")  # as if it had been killed in its second iteration
    assert train.main(["--resume", str(alone), "--iterations", "2"]) == 0
    assert_close(alone, two, iteration=2)
    damaged = again / "checkpoints" / "iter-000002" / WEIGHTS  # and torchrun starts the same command again
    damaged.write_bytes(damaged.read_bytes()[:-1])
    both = together(2, *options, "--run-folder", str(again), restart=1)
    assert [each.returncode for each in both] == [0, 0], both
    warning = f"{damaged} is damaged (its sha256 is not the manifest's): the run goes on from {again / 'checkpoints'}"
    assert [warning in each.stderr for each in both] == [True, False], "the first process alone speaks"
    for name in (WEIGHTS, "trainer/optimizer.safetensors", "trainer/ema.safetensors"):
        last = Path("checkpoints") / "iter-000002" / name
        assert (again / last).read_bytes() == (two / last).read_bytes(), name
    assert read_state(again / "checkpoints" / "iter-000002").processes == 2


def assert_close(run: Path, other: Path, iteration: int) -> None:
    """AdamW's first steps have the size lr = 1e-3 where the gradient's sign is clear, whatever its rounding."""
    ours, theirs = (load_file(each / "checkpoints" / f"iter-{iteration:06d}" / WEIGHTS) for each in (run, other))
    close = [((ours[name] - theirs[name]).abs() < 1e-4).float().mean().item() for name in ours]
    assert sum(close) / len(close) > 0.99


def test_prompts_that_processes_cannot_share_are_refused(config_file: Path, tmp_path: Path) -> None:
    options = ["--prompts-per-iteration", "3", "--run-folder", str(tmp_path / "run")]
    both = together(2, str(config_file), *options)
    assert [each.returncode for each in both] == [2, 2], both
    assert "prompts_per_iteration = 3: accepted is a multiple of the 2 processes, which share them." in both[0].stderr
    assert not (tmp_path / "run").exists()


def test_alone_everything_is_the_identity() -> None:
    ranks, tensor = Ranks(), torch.arange(6.0).view(3, 2)
    assert ranks.first
    assert ranks.share(8) == slice(0, 8)
    assert ranks.gather(tensor) is tensor
    assert ranks.exchange(tensor, [3], [3]) is tensor
    assert ranks.trade([b"x"]) == [b"x"]
    ranks.sum_([tensor])
    assert torch.equal(tensor, torch.arange(6.0).view(3, 2))
    assert (ranks.any(True), ranks.any(False), ranks.agree("x")) == (True, False, "x")


def test_shares_are_all_there_is() -> None:
    shares = [range(12)[Ranks(index, 3).share(12)] for index in range(3)]
    assert [list(share) for share in shares] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for total in (0, 1, 2, 11):
        shares = [range(total)[Ranks(index, 3).share(total)] for index in range(3)]
        assert [each for share in shares for each in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
