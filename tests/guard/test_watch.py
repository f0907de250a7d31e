"""The guard in a training: what it logs, says, changes and leaves alone, and that a resume remembers all of it."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastgrpo import train
from fastgrpo.assembly import Training, load_training
from fastgrpo.base_pictures import base_pictures
from fastgrpo.guard import control
from fastgrpo.guard.control import KL_FLOOR
from fastgrpo.run.checkpoint import read_state
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import HALTED, iterate
from support.processes import together
from support.training import TIMED, altered

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LOGGED = {"guard/diversity_within", "guard/diversity_between", "guard/alignment", "guard/alarm", "guard/reward_spread"}
# Three positive prompts an iteration, learning far too fast: within three iterations the pictures are others.
FAST = [
    "--prompts-per-iteration",
    "4",
    "--prompts.negative-fraction",
    "0.25",
    "--optim.lr",
    "1e-2",
    "--eval.every",
    "0",
]
FAST += ["--reward.terms", "clip=-1"]  # of pictures that do not match
FAST += ["--engine.threads", "1", "--grpo.std-floor", "1e-9", "--grpo.clip-high", "1", "--grpo.clip-low", "0.9"]
TIGHT = ["--guard.alignment", "1e-6", "--guard.diversity-between", "1", "--guard.diversity-within", "1"]
TIGHT += ["--guard.patience", "1"]


@pytest.fixture(scope="module")
def base(config_file: Path) -> TrainConfig:
    """Three positive prompts an iteration."""
    changes = {"prompts_per_iteration": 4, "prompts.negative_fraction": 0.25, "engine.threads": 1, "iterations": 3}
    return altered(load_toml(config_file), changes | {"grpo.std_floor": 1e-9})


def begun(config: TrainConfig, said: list[str] | None = None) -> Training:
    """A training whose guard has seen the base model's pictures, where it wants to."""
    said = [] if said is None else said
    training = load_training(config, 1, say=said.append)
    pictures, encoder = None, training.reward.encoder
    if training.guard.watches and encoder:
        parts = config, training.policy, training.schedule, encoder, training.prompts
        pictures = base_pictures(*parts, None, training.ranks, lambda line: None)
    training.guard.watch(pictures, training.reward.encoder)
    return training


def learned(training: Training, iterations: int = 2) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The metrics but for the clock's, and the weights."""
    rows = [iterate(training, iteration, Console(quiet=True)) for iteration in range(1, iterations + 1)]
    rows = [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]
    return rows, training.trainable.optimizer.weights.values.clone()


def test_warning_changes_no_bit_and_acts_on_nothing(base: TrainConfig) -> None:
    """Neither does `adapt` before an alarm, although it has the base model at hand and grpo.kl is 0."""
    config = altered(base, {"grpo.kl": 0.0})
    found = {action: learned(begun(altered(config, {"guard.action": action}))) for action in ("off", "warn", "adapt")}
    (off, weights), (warned, same), (adapted, too) = found.values()
    assert torch.equal(weights, same)
    assert torch.equal(weights, too)
    for before, watched, braked in zip(off, warned, adapted, strict=True):
        assert watched.keys() - before.keys() == LOGGED
        assert {name: watched[name] for name in before} == before
        assert {name: braked[name] for name in watched} == watched
        assert (braked["guard/brake"], braked["kl/weight"]) == (1, 0)


def test_an_untrained_policy_is_about_as_diverse_as_the_base_model(base: TrainConfig) -> None:
    rows, _ = learned(begun(altered(base, {"optim.lr": 0.0})), 3)
    for row in rows:
        assert row["guard/alarm"] == 0
        for name in ("guard/diversity_within", "guard/diversity_between"):
            # Nine prompts in all beside 32 that say 1; distances of single pairs hardly differ by more than twofold.
            assert 0.75 < row[name] < 1.25, name
        # Nine that weigh a quarter beside 0, with a mean uncertain by sqrt((1/2 + 1/3) / 9) = 0.3: five times that.
        assert abs(row["guard/alignment"]) < 0.4
    assert rows[0]["guard/reward_spread"] == 1


def test_pictures_that_begin_as_one_are_not_held_against_pictures_that_do_not(base: TrainConfig) -> None:
    strict = {
        "guard.diversity_within": 1.0,
        "guard.diversity_between": 0.0,
        "guard.alignment": 9.0,
        "guard.patience": 1,
    }
    branches = {"rollout.initial_noise": "per_prompt", "rollout.branches": (base.group_size,), "optim.lr": 0.0}
    (row,), _ = learned(begun(altered(base, strict | branches)), 1)
    assert row["guard/diversity_within"] < 1
    assert row["guard/alarm"] == 0
    (row,), _ = learned(begun(altered(base, strict | branches | {"rollout.branches": ()})), 1)
    assert row["guard/alarm"] == 0


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_the_kl_weight_of_the_iteration_is_what_is_learned_with(
    base: TrainConfig, graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever weight a run began with, in calls on fixed memory too."""
    outcomes = []
    for first in (0.01, 0.5):
        training = begun(altered(base, {"guard.action": "off", "grpo.kl": first, "engine.graphs": graphs}))
        weights = []
        for iteration, weight in ((1, 0.1), (2, 20.0)):
            with monkeypatch.context() as braked:
                braked.setattr(control, "braked_kl_weight", lambda *_, weight=weight: weight)
                assert iterate(training, iteration, Console(quiet=True))["kl/weight"] == weight
            weights.append(training.trainable.optimizer.weights.values.clone())
        outcomes.append(weights)
    assert all(map(torch.equal, *outcomes))
    training = begun(altered(base, {"guard.action": "off", "grpo.kl": 0.1, "engine.graphs": graphs}))
    _, fixed = learned(training)
    assert not torch.equal(fixed, outcomes[0][1]), "20 is not 0.1"


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_adapting_brakes(base: TrainConfig, kl: float) -> None:
    tight = {"guard.action": "adapt", "guard.alignment": 1e-6, "guard.patience": 1}
    tight |= {"guard.diversity_within": 1.0, "guard.diversity_between": 1.0}
    worse = {"reward.terms": ("clip=-1",), "grpo.kl": kl, "optim.lr": 1e-2}
    rows, _ = learned(begun(altered(base, tight | worse)), 5)
    assert rows[-2]["guard/alarm"] == 1
    for before, row in pairwise(rows):
        brake = before["guard/brake"]
        assert row["optim/lr"] == pytest.approx(1e-2 / brake)
        assert row["kl/weight"] == pytest.approx(brake * max(kl, KL_FLOOR) if brake > 1 else kl)
        over = max(1 / row["guard/diversity_within"], 1 / row["guard/diversity_between"], -1e6 * row["guard/alignment"])
        over -= 1
        assert row["guard/brake"] == pytest.approx(max(1.0, brake * (1 + min(max(over, -0.2), 0.2))))
    assert rows[-1]["kl/weight"] > kl


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"prompts_per_iteration": 2, "prompts.negative_fraction": 0.5},
            "an iteration has fewer than two positive prompts",
        ),
        ({"reward.terms": ("compressibility",)}, "no term of the reward sees images through an encoder"),
    ],
)
def test_what_cannot_be_watched_is_said_once(base: TrainConfig, changes: dict[str, object], why: str) -> None:
    said: list[str] = []
    training = begun(altered(base, changes), said)
    rows, _ = learned(training, 1)
    assert [line for line in said if line.startswith("guard")] == [f"guard: no collapse can be noticed, since {why}"]
    assert {name for name in rows[0] if name.startswith("guard/")} <= {"guard/reward_spread"}


def untimed(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMED)}
        for record in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_resumed_run_remembers(config_file: Path, tmp_path: Path) -> None:
    """Alarms, brake and running means: metrics and weights are those of a run that nothing stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*FAST, *TIGHT, "--guard.action", "adapt", "--iterations", "4"]
    flags += ["--checkpoint.every", "2", "--checkpoint.keep", "0"]
    assert train.main([str(config_file), "--run", str(whole), *flags]) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "iter-000004")
    assert train.main(["--resume", str(cut)]) == 0
    rows = untimed(whole)
    assert untimed(cut) == rows
    assert rows[3]["guard/brake"] > 1
    last = Path("checkpoints") / "iter-000004"
    assert (cut / last / WEIGHTS).read_bytes() == (whole / last / WEIGHTS).read_bytes()
    assert read_state(cut / last).guard == read_state(whole / last).guard


@pytest.mark.slow
def test_a_stop_saves_says_what_was_good_and_can_be_overruled(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rule = tmp_path / "run", ["--guard.diversity-within", "0", "--guard.alignment", "0.2", "--guard.patience", "2"]
    # One checkpoint is kept, and the good one beside it.
    flags = [*FAST, *rule, "--guard.action", "stop", "--iterations", "30", "--checkpoint.every", "1"]
    # With this seed it falls steadily, by 0.05 to 0.1 an iteration, and is beyond the limit from the fourth on.
    flags += ["--checkpoint.keep", "2", "--checkpoint.no-keep-evaluated", "--seed", "8"]
    assert train.main([str(config_file), "--run", str(run), *flags]) == HALTED == 3
    rows, said = untimed(run), capsys.readouterr().out
    beyond = [row["guard/alignment"] < -0.2 for row in rows]
    assert beyond[-2:] == [True, True]
    assert [row["guard/alarm"] for row in rows] == [0] * (len(rows) - 1) + [1]
    assert len(rows) < 30
    good = f"iter-{len(rows) - 3:06d}"  # drew the last iteration that was within the limits
    assert (run / "checkpoints" / good).is_dir()
    assert (run / "checkpoints" / f"iter-{len(rows):06d}").is_dir()
    assert f"the last checkpoint from before is {run / 'checkpoints' / good}." in said
    assert said.count("guard: how well positive prompts' images match them") == 1
    assert f"Alarm in iteration {len(rows)}: how well" in (run / "report.html").read_text()

    more = ["--iterations", "30", "--guard.action", "adapt"]
    assert train.main(["--resume", str(run), *more]) == 2, "adapting would not be the same training"
    assert "--guard.action" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "again")
    (tmp_path / "again" / "config.toml").write_text(
        (run / "config.toml").read_text().replace("iterations = 30", f"iterations = {len(rows) + 1}")
    )
    assert train.main(["--resume", str(tmp_path / "again"), "--guard.action", "warn"]) == 0


@pytest.mark.slow
def test_two_processes_decide_as_one(config_file: Path, tmp_path: Path) -> None:
    """Features differ by the rounding of other batches, 1e-6 or so, and weights drift apart from there."""
    flags = [str(config_file), *FAST, *TIGHT, "--guard.action", "adapt", "--iterations", "2", "--optim.lr", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*flags, "--run", str(one)]) == 0
    both = together(2, *flags, "--run-folder", str(two))
    assert [each.returncode for each in both] == [0, 0], both
    ours, theirs = (read_state(run / "checkpoints" / "iter-000002").guard for run in (one, two))
    assert ours["conditions"] == theirs["conditions"]
    for row, other in zip(untimed(one), untimed(two), strict=True):
        for name in (*LOGGED, "guard/brake", "kl/weight", "optim/lr"):
            assert row[name] == pytest.approx(other[name], rel=1e-2), name
    assert (
        json.loads((one / "base.json").read_text())["made_by"] == json.loads((two / "base.json").read_text())["made_by"]
    )
