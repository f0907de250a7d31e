"""Rewards, losses and gradients that are not finite: found, kept, and left out where that is asked for."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgrpo.engine.not_finite import NotFinite, spoil
from fastgrpo.grpo.loss import PairResults, PolicyLoss
from fastgrpo.rewards.reward import WeightedReward
from fastgrpo.rewards.terms import BrokenReward, Term
from fastgrpo.run.left_out import LeftOut
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import EngineConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.types import POSITIVE, Prompt, Rewards, UpdateStats
from support import spoilt
from support.processes import Ended, together
from support.update import CONFIG, GROUP, REWARDS, STEPS, Scene

SKIP = replace(CONFIG, engine=replace(CONFIG.engine, not_finite="skip"), updates_per_iteration=2)
ONE = Ranks()


@pytest.fixture
def scene(tiny_pipeline: Path) -> Scene:
    return Scene(tiny_pipeline)


@pytest.fixture
def learn_again() -> Iterator[None]:
    learn = PolicyLoss.learn
    yield
    PolicyLoss.learn = learn  # type: ignore[method-assign]


@pytest.mark.parametrize("micro_batch", [1, 5, 12])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.usefixtures("learn_again")
def test_the_pair_that_is_to_blame_is_named_and_kept(scene: Scene, kind: str, micro_batch: int) -> None:
    """Of 12 pairs two are spoilt, sample 3 of either prompt at step 2; the shuffled order says which comes first."""
    spoilt.spoil(kind, lambda: True)
    with pytest.raises(NotFinite) as raised:
        scene.update(replace(CONFIG, micro_batch=micro_batch), iteration=4)
    error, record = raised.value, raised.value.record
    prompt = [each.text for each in scene.prompts.prompts].index(record["prompt"])
    assert error.own
    assert error.message == (
        f"iteration 4, optimizer step 1: the {kind} of sample 3 of 3 of prompt {record['prompt']!r} at denoising step "
        "2 is not finite"
    )
    assert (record["kind"], record["sample"], record["denoising_step"]) == (kind, spoilt.SLOT + 1, spoilt.STEP + 1)
    assert record["timestep"] == scene.schedule.timesteps[spoilt.STEP]
    sample, trajectory = prompt * GROUP + spoilt.SLOT, scene.trajectory
    assert torch.equal(error.tensors["latents"], trajectory.latents[spoilt.STEP, sample])
    assert torch.equal(error.tensors["taken"], trajectory.latents[spoilt.STEP + 1, sample])
    assert torch.equal(error.tensors["embeds"], scene.prompts.embeds[prompt])
    assert torch.equal(error.tensors["image"], trajectory.images[sample])
    if kind == "gradient":
        last = list(dict(scene.policy.unet.named_parameters()))[-1]
        assert (record["parameters"], record["parameters_not_finite"]) == ([last], 1)


def test_a_ratio_that_is_not_finite_spoils_a_gradient_that_is() -> None:
    """As where it is clipped: then the loss and the gradient are finite."""
    fine = torch.tensor([0.5, -0.5])
    for ratio, loss in ((torch.inf, 1.0), (1.0, torch.nan), (1.0, -torch.inf)):
        results = PairResults(torch.tensor([1.0, ratio]), fine, torch.tensor([loss, 1.0]), None)
        gradient = torch.ones(3)
        spoil(gradient, [PairResults(fine, fine, fine, None), results])
        assert gradient[0].isnan()
        assert torch.equal(gradient[1:], torch.ones(2))
    gradient = torch.tensor([-1e-40, 2.0])
    spoil(gradient, [PairResults(torch.full((2,), 3e38), fine, torch.full((2,), -3e38), None)])
    assert torch.equal(gradient, torch.tensor([-1e-40, 2.0]))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.usefixtures("learn_again")
def test_a_step_is_left_out_and_the_other_is_as_it_was(scene: Scene, kind: str) -> None:
    """The pairs of one prompt's third sample at step 2 are in one of two optimizer steps; the policy does not move."""
    rewards = torch.stack([REWARDS[0], torch.full((GROUP,), 0.7)])  # the other prompt's group is flat: not computed
    before, steps = scene.update(SKIP, rewards)
    spoilt.spoil(kind, lambda: True)
    after, again = scene.update(SKIP, rewards)
    fine = [bool(step.isfinite().all()) for step in again]
    assert sorted(fine) == [False, True]
    assert torch.equal(again[fine.index(True)], steps[fine.index(True)])
    assert (before["optim/steps"], after["optim/steps"]) == (2, 1)
    assert all(torch.tensor(value).isfinite() for value in after.values())


def test_a_group_that_is_left_out_is_not_learned_from(scene: Scene) -> None:
    """The gradient is that of an iteration with the other prompt alone, up to the order of its pairs."""
    rewards = REWARDS.clone()
    rewards[1, 0] = torch.nan
    config = replace(SKIP, updates_per_iteration=1)
    stats, (gradient,) = scene.update(config, rewards)
    assert scene.reports[-1] == (GROUP * (STEPS - 1),) * 2
    flat = torch.stack([REWARDS[0], torch.full((GROUP,), 0.7)])
    _, (both,) = scene.update(CONFIG, flat)  # whose mean counts the flat group's pairs
    assert (gradient - 2 * both).norm() <= 1e-4 * gradient.norm()
    stats, gradients = scene.update(config, torch.full_like(REWARDS, torch.nan))
    assert (gradients, stats["optim/steps"]) == ([], 0)
    with pytest.raises(ValueError, match="a reward is not finite"):
        scene.update(CONFIG, rewards)


class _Nothing:
    """No encoder."""

    first = None

    def forget_images(self) -> None:
        pass


def weighted(values: list[list[float]], standardise: str) -> WeightedReward:
    """The sum of terms that return these values, whatever the images."""
    terms = [Term(f"mine:term{number}") for number in range(len(values))]
    functions = {
        term.label: (lambda images, prompts, given=given: torch.tensor(given))
        for term, given in zip(terms, values, strict=True)
    }
    return WeightedReward(terms, functions, standardise, _Nothing())  # type: ignore[arg-type]


@pytest.mark.parametrize("standardise", ["none", "group", "iteration"])
def test_other_groups_rewards_are_those_without_the_broken_one(standardise: str) -> None:
    prompts, images = [Prompt(text, POSITIVE) for text in "abc"], torch.zeros(6, 3, 2, 2)
    one, two = [1.0, 2.0, 3.0, torch.inf, 5.0, 7.0], [0.5, 0.1, 0.2, 0.9, 0.8, 0.3]
    reward, broken = weighted([one, two], standardise), list[BrokenReward]()
    with pytest.raises(BrokenReward, match="returned inf for an image of prompt 'b'"):
        reward.score(images, prompts, 2)
    rewards = reward.combine(reward.score(images, prompts, 2, broken))
    assert [error.prompt.text for error in broken] == ["b"]
    assert rewards.whole.tolist() == [True, False, True]
    others = weighted([one[:2] + one[4:], two[:2] + two[4:]], standardise)(images[:4], prompts[::2], 2)
    assert torch.equal(rewards.total[[0, 2]], others.total)
    only = rewards.only(rewards.whole)
    assert torch.equal(only.total, others.total)
    assert {name: part.tolist() for name, part in only.parts.items()} == {
        name: part.tolist() for name, part in others.parts.items()
    }
    # In every group one: nothing can be standardised.
    assert (
        weighted([[torch.nan] * 6], standardise).combine({"term0": torch.full((3, 2), torch.nan)}).total.isnan().all()
    )


def test_a_row_of_iterations_ends_it_and_a_good_one_begins_it_anew() -> None:
    config = replace(CONFIG, engine=EngineConfig(not_finite="skip", skip_at_most=3))
    left_out, good, bad = LeftOut(config, ONE), torch.tensor([True, True]), torch.tensor([True, False])
    none = UpdateStats({})
    for whole in (bad, bad, good, bad, bad):
        counted = left_out.counted(1, [], whole, none)
        assert counted == {"skip/groups": float(whole is bad), "skip/steps": 0.0}
    with pytest.raises(FloatingPointError, match=r"^3 iterations in a row had rewards, losses or gradients that"):
        left_out.counted(1, [], good, UpdateStats({}, left_out=(NotFinite("", {}, {}, own=False),)))
    assert LeftOut(CONFIG, ONE).counted(1, [], good, none) == {}


def test_rewards_are_whole_where_all_of_a_group_are_finite() -> None:
    assert Rewards(torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]), {}).whole.tolist() == [True, False]


def said(both: list[Ended]) -> list[str]:
    return re.findall(r"^fastgrpo: (.*)$", "".join(each.stderr for each in both), flags=re.MULTILINE)


@pytest.mark.slow
def test_two_processes_agree(config_file: Path, tmp_path: Path) -> None:
    """Each kind in an iteration of its own, on one of two processes, is left out until the row is too long.

    Then a gradient that is to stop them at once.
    """
    flags = [str(config_file), "--iterations", "5", "--engine.threads", "1", "--eval.every", "0", "--checkpoint.every"]
    flags += ["1", "--updates-per-iteration", "4", "--grpo.std-floor", "1e-9", "--grpo.drop-last-steps", "0"]
    run = tmp_path / "skips"
    kinds = "1:2:reward,0:3:loss,1:4:gradient"
    skips = ["--engine.not-finite", "skip", "--engine.skip-at-most", "3"]
    both = together(2, kinds, *flags, *skips, "--run", str(run), main=spoilt.main)
    assert [each.returncode for each in both] == [1, 1], both
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["skip/groups"] for row in rows] == [0, 1, 0]
    assert rows[0]["skip/steps"] == rows[1]["skip/steps"] == 0 < rows[2]["skip/steps"]
    assert all(value is not None for row in rows for value in row.values()), rows
    lines = said(both)
    assert re.fullmatch(
        r"warning: iteration 2: reward term 'steering' returned inf for an image of prompt .*, and no finite number "
        rf"for 1 of 3 images; what is known is in {run}/not_finite/iter-000002-reward-1\.json and the \.safetensors "
        r"file beside it; its group is left out\.",
        next(line for line in lines if "iteration 2" in line),
    ), lines
    last = f"3 iterations in a row had rewards, losses or gradients that are not finite; {run / 'not_finite'} has more"
    assert [line for line in lines if "in a row" in line] == [
        f"{last}; the newest checkpoint is {run / 'checkpoints' / 'iter-000003'}."
    ]
    for file in (run / "not_finite").glob("*.json"):
        record, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
        assert record["message"] in "".join(lines)
        assert tensors["image"].shape == (3, 16, 16)
    kinds_kept = {path.stem.split("-")[-1] for path in (run / "not_finite").glob("*.json")}
    assert {"loss", "gradient"} <= kinds_kept

    run = tmp_path / "stops"
    both = together(2, "1:2:gradient", *flags, "--run", str(run), main=spoilt.main)
    assert [each.returncode for each in both] == [1, 1], both
    (line,) = said(both)
    assert re.fullmatch(
        r"iteration 2, optimizer step \d: the gradient of sample 3 of 3 of prompt .* at denoising step 2 is not "
        rf"finite; what is known is in {run}/not_finite/iter-000002-step-0\d-gradient\.json and the \.safetensors "
        rf"file beside it; the newest checkpoint is {run / 'checkpoints' / 'iter-000001'}\.",
        line,
    ), line
