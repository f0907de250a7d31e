"""Training where only a window's steps have noise: the ratio, what is drawn, and going on after a stop."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from fastgrpo import train
from fastgrpo.assembly import load_training
from fastgrpo.costs.counting import count_model
from fastgrpo.costs.estimate import iteration_rows
from fastgrpo.costs.memory import memory_plan
from fastgrpo.costs.throughput import rollout_rows
from fastgrpo.grpo.steps import drawn_per_iteration, pairs_per_iteration, sampler_line
from fastgrpo.models.check import describe
from fastgrpo.prompts import embed
from fastgrpo.rollout import rollout
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.system.errors import ConfigError
from fastgrpo.training import iterate
from fastgrpo.validation import validate
from support.graph_stand_in import imitated
from support.plain_policy import predict
from support.training import altered

# 6 places, of which the last is not trained on: windows of 2 begin at 0, 2 and 3, one iteration each.
WINDOW = {
    "rollout.steps": 6,
    "rollout.stochastic": "window",
    "rollout.steps_outside": 3,
    "grpo.window": 2,
    "grpo.window_every": 1,
    "grpo.window_stride": 2,
    "grpo.kl": 0.0,
    "grpo.std_floor": 1e-9,
    "engine.threads": 1,
}


# As many rows in the update as in the rollout: BLAS sums very few in another order.
TREE = {"rollout.initial_noise": "per_prompt", "rollout.branches": (3,), "updates_per_iteration": 1, "micro_batch": 6}


@pytest.fixture(scope="module")
def config(config_file: Path) -> TrainConfig:
    return altered(load_toml(config_file), WINDOW)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout.solver_outside": "dpm++", "engine.graphs": "on"},
        {"rollout.solver_outside": "dpm++", "rollout.steps_outside": 0, "grpo.ratio_norm": True, "engine.graphs": "on"},
        TREE | {"rollout.solver_outside": "dpm++"},
    ],
    ids=["ddim", "dpm++", "dpm++ on the whole grid", "a tree"],
)
def test_the_ratio_is_exactly_one_on_every_learned_step(config: TrainConfig, changes: dict[str, object]) -> None:
    training = load_training(altered(config, changes), threads=1, say=lambda line: None)
    places = []
    for iteration in (1, 2, 3):
        values = iterate(training, iteration, Console(quiet=True))
        assert values["ratio/max_abs_dev_first"] == 0
        assert values["grad/norm"] > 0
        places.append(training.schedule.timesteps[training.schedule.trainable].tolist())
    assert training.engine.old_log_prob == "rollout"
    assert places == [[831, 665], [499, 333], [333, 167]]


def test_a_rollout_is_what_diffusers_draws_around_the_window(config: TrainConfig) -> None:
    """By the tiny UNet's own outputs, in chunks that end within groups."""
    changes = {"rollout.solver_outside": "dpm++", "rollout.steps_outside": 6, "rollout.steps": 10, "rollout.batch": 4}
    training = load_training(altered(config, changes), threads=1, say=lambda line: None)
    engine, policy, schedule = training.engine, training.policy, training.schedule
    prompts = embed(policy, training.source.batch(0), training.embeds)
    drawn = rollout(engine, replace(prompts, iteration=2), torch.Generator().manual_seed(3))
    inside = schedule.trainable.nonzero().flatten().tolist()
    assert schedule.trainable.tolist() == [False] * inside[0] + [True] * 2 + [False] * (6 - inside[0])
    assert inside[0] > 1
    assert (drawn.log_probs[~schedule.trainable] == 0).all()
    assert (drawn.log_probs[schedule.trainable] != 0).all()
    embeds, guidance = prompts.embeds.repeat_interleave(3, dim=0), engine.config.rollout.guidance
    noise, betas = [], {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for stretch in (range(inside[0]), range(inside[-1] + 1, len(schedule))):
        last = stretch.stop == len(schedule)
        timesteps = schedule.timesteps[stretch.start : stretch.stop + (not last)].tolist()
        scheduler = DPMSolverMultistepScheduler(**betas, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(timesteps=timesteps)
        for step, timestep in zip(stretch, timesteps, strict=False):
            here = drawn.latents[step]
            output = predict(policy, here, torch.full((len(here),), timestep), embeds, guidance).detach()
            theirs = scheduler.step(output, timestep, here).prev_sample
            # diffusers' float32 levels, and the UNet's products of other numbers of rows, 6e-8 through 40 layers.
            torch.testing.assert_close(drawn.latents[step + 1], theirs, rtol=2e-5, atol=2e-5)
    for step in inside:
        here = drawn.latents[step]
        output = predict(policy, here, schedule.timesteps[step].expand(len(here)), embeds, guidance).detach()
        mean = schedule.coef_sample[step] * here + schedule.coef_output[step] * output
        noise.append((drawn.latents[step + 1] - mean) / schedule.sigma[step])
    # 3072 standard normal numbers: 6 standard errors of mean and std.
    noise = torch.stack(noise)
    assert abs(noise.mean()) < 6 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 6 / (2 * noise.numel()) ** 0.5


def test_captured_graphs_follow_the_window(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed from the first iteration's capture they learn what plain calls do: the tables change where they lie."""
    changes = {"rollout.solver_outside": "dpm++", "engine.graphs": "on", "rollout.batch": 4}
    learned = []
    for captured in (False, True):
        training = load_training(altered(config, changes), threads=1, say=lambda line: None)
        if captured:
            training.engine._capture, training.engine._pool = True, (0, 1000)
        with imitated(monkeypatch) if captured else nullcontext():
            for iteration in (1, 2):
                values = iterate(training, iteration, Console(quiet=True))
        learned.append({name: p.detach().clone() for name, p in training.trainable.parameters.items()})
        assert values["ratio/max_abs_dev_first"] == 0
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])


def test_a_run_resumes_within_a_window_to_the_same_bits(config_file: Path, tmp_path: Path) -> None:
    """Windows of two iterations each; what is left of the run is a checkpoint after its first."""
    given = {name: value for name, value in WINDOW.items() if name != "engine.threads"} | {"grpo.window_every": 2}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--rollout.solver-outside", "dpm++", "--iterations", "3", "--eval.every", "0", "--guard.action", "warn"]
    whole, dead = tmp_path / "whole", tmp_path / "dead"
    flags += ["--checkpoint.every", "1", "--checkpoint.keep", "0", "--engine.threads", "1", "--log.to"]
    assert train.main([str(config_file), "--run", str(whole), *flags]) == 0
    shutil.copytree(whole, dead)
    for name in ("evaluation.json", "report.html"):
        (dead / name).unlink(missing_ok=True)
    for iteration in (2, 3):
        shutil.rmtree(dead / "checkpoints" / f"iter-00000{iteration}")
    assert train.main(["--resume", str(dead)]) == 0
    weights = "checkpoints/iter-000003/unet/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (dead / weights).read_bytes()
    for run in (whole, dead):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["ratio/max_abs_dev_first"] for line in lines if line["iteration"]] == [0] * 3


def test_costs_are_of_the_steps_that_are_taken(config: TrainConfig) -> None:
    few = altered(config, {"rollout.steps": 20, "rollout.steps_outside": 6, "grpo.window": 4})
    whole = altered(few, {"rollout.stochastic": "all", "rollout.steps_outside": 0})
    assert (few.rollout_steps, whole.rollout_steps) == (10, 20)
    assert altered(few, {"rollout.steps_outside": 0}).rollout_steps == 20
    training = load_training(few, threads=1, say=lambda line: None)
    assert pairs_per_iteration(few, training.schedule) == 2 * 3 * 4
    assert len(training.schedule) == 10
    assert len(training.eval_schedule) == 20
    assert training.eval_schedule.trainable.all()
    assert sampler_line(few) == (
        "drawn in 10 steps: 4 of DDIM with eta 1, which a window over 20 chooses, and 6 of DDIM without noise around it"
    )
    assert rollout_rows(few, 6).forward * 2 == rollout_rows(whole, 6).forward
    model = count_model(describe(few.model), few.model, torch.float32)
    rows, plans = [], []
    for each in (few, whole):
        drawn = drawn_per_iteration(describe(each.model).scheduler, each)
        rows.append(next(row for row in iteration_rows(each, model, {}, 24, drawn) if row.stage == "rollout").times)
        plans.append(sum(part.size for part in memory_plan(each, model, {}, torch.float32, 1, 4)))
    assert rows[0] * 2 == rows[1]
    # Ten latents of 4 x 8 x 8 and ten log-probs fewer, of 6 samples.
    assert plans[1] - plans[0] == 6 * 4 * 10 * (4 * 8 * 8 + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grpo.window": 0}, "rollout.stochastic = 'window': accepted is all where grpo.window is 0"),
        ({"rollout.stochastic": "all"}, "rollout.steps_outside = 3: accepted is 0 where rollout.stochastic is all"),
        (
            {"rollout.stochastic": "all", "rollout.steps_outside": 0, "rollout.solver_outside": "dpm++"},
            "rollout.solver_outside = 'dpm\\+\\+': accepted is ddim where rollout.stochastic is all",
        ),
        ({"rollout.steps_outside": 1}, "rollout.steps_outside = 1: accepted is 0 or 2 to 4, of which one is before"),
        ({"rollout.steps_outside": 5}, "rollout.steps_outside = 5: accepted is 0 or 2 to 4"),
        ({"rollout.steps_outside": -1}, "rollout.steps_outside = -1"),
        ({"grpo.window": 5, "rollout.steps_outside": 2}, "rollout.steps_outside = 2: accepted is 0 or 1"),
    ],
)
def test_what_no_rollout_could_follow_is_refused(config: TrainConfig, changes: dict[str, object], said: str) -> None:
    validate(config)
    with pytest.raises(ConfigError, match=said):
        validate(altered(config, changes))
