"""Groups that share the beginning of their trajectories: the tree, its rollout, and what is learned from its edges."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.sampler import Sampler
from fastgrpo.grpo.branches import Tree, grown, tree_of
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import Experience
from fastgrpo.grpo.pairs import Moves, Pairs
from fastgrpo.rollout import rollout
from fastgrpo.settings.schema import RolloutConfig, TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.types import Trajectory
from support.update import CONFIG, GRADIENT_TOLERANCE, Recorder, Scene

WIDTHS = (2, 3)
CONFIG_6 = replace(
    CONFIG, group_size=6, rollout=RolloutConfig(steps=4, guidance=3.0, initial_noise="per_prompt", branches=WIDTHS)
)
COUNTS = (1, 2, 6, 6, 6)
REWARDS = torch.tensor([[0.1, 0.4, 0.2, 0.8, 0.3, 0.9], [0.9, 0.3, 0.5, 0.2, 0.6, 0.1]])


@pytest.fixture(scope="module")
def scene(make_tiny_pipeline: Any) -> Scene:
    scene = Scene(make_tiny_pipeline("epsilon"))
    scene.roll(CONFIG_6)
    return scene


def test_a_tree_grows_where_there_is_noise() -> None:
    tree = grown([False, False, True, True, False], WIDTHS)
    assert tree == Tree((1, 1, 1, 2, 6, 6))
    assert tree.phases() == [(range(3), 1), (range(3, 4), 2), (range(4, 5), 6)]
    assert [tree.width(step) for step in range(5)] == [1, 1, 2, 3, 1]
    assert tree.widths([2, 4]) == [2, 1]
    assert grown([True] * 3, (4,)).phases() == [(range(1), 1), (range(1, 3), 4)]
    assert grown([False, True], (4,)).phases() == [(range(2), 1)], "the last step is where it branches"
    with pytest.raises(ValueError, match="needs as many steps with noise; there are 1"):
        grown([False, True], WIDTHS)


def test_an_edge_has_the_mean_reward_of_the_samples_it_led_to() -> None:
    means = Tree(COUNTS).edge_means(REWARDS.flatten())
    halves = [REWARDS[0, :3].mean(), REWARDS[0, 3:].mean(), REWARDS[1, :3].mean(), REWARDS[1, 3:].mean()]
    torch.testing.assert_close(means[0], torch.stack(halves).repeat_interleave(3), rtol=2**-22, atol=0)
    for step in (1, 2, 3):
        assert torch.equal(means[step], REWARDS.flatten())


def test_a_group_has_as_many_latents_as_the_tree_and_computes_no_more(scene: Scene) -> None:
    rows: list[int] = []

    def counted(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(latents))
        return scene.policy.computing(latents, *args, **kwargs)

    policy = replace(scene.policy, passes=counted)
    engine = Passes(PolicyLoss(policy, scene.schedule, CONFIG_6, ()), None, 1)
    again = rollout(engine, scene.prompts, torch.Generator().manual_seed(0))
    trajectory = scene.trajectory
    assert torch.equal(again.latents, trajectory.latents)
    for step, count in enumerate(COUNTS):
        groups = trajectory.latents[step].view(2, 6, -1)
        assert [len(group.unique(dim=0)) for group in groups] == [count] * 2
        for node in groups.unflatten(1, (count, -1)):
            assert (node == node[:, :1]).all()
    assert sum(rows) == 2 * 2 * sum(COUNTS[:-1])


def test_every_sample_s_path_is_the_policy_s_own(scene: Scene) -> None:
    """Each step taken again from where the sample was, alone: the same log-prob of the same latent."""
    trajectory, embeds = scene.trajectory, scene.prompts.embeds.repeat_interleave(6, 0)
    sampler = Sampler(scene.policy, scene.schedule, 3.0)
    for step in range(3):
        mean_of = replace(sampler, keep_mean=True).chunk(embeds)
        _, _, mean = mean_of(step, trajectory.latents[step], torch.zeros_like(trajectory.latents[0]))
        sigma = scene.schedule.sigma[step]
        residual = (trajectory.latents[step + 1] - mean).double() / sigma
        expected = (
            -0.5 * residual.square().mean(dim=(1, 2, 3))
            - sigma.double().log()
            - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        )
        # Twelve rows where the rollout had fewer: outputs differ by 1e-6, divided by sigma, times a residual of 1.
        torch.testing.assert_close(trajectory.log_probs[step].double(), expected, rtol=0, atol=2e-5 / float(sigma))


def learned_alone(scene: Scene, config: TrainConfig, sizes: list[int]) -> Tensor:
    """The gradient of all edges, each of them passed through the UNet on its own."""
    loss = PolicyLoss(scene.policy, scene.schedule, config, tuple(scene.policy.unet.parameters()))
    tree = tree_of(scene.schedule, config)
    experience = Experience.of(scene.prompts, scene.trajectory, REWARDS, config.grpo, tree=tree)
    edges = [(sample, step) for step in range(3) for sample in range(0, 12, 6 // COUNTS[step + 1])]
    sizes.append(len(edges))
    sample, step = torch.tensor(edges).T
    _, gradient = loss.learn(experience.micro_batch(Pairs(sample, step), None, 1 / len(edges)))
    return torch.cat([g.double().flatten() for g in gradient])


@pytest.mark.parametrize("micro_batch", [2, 12])
def test_siblings_learned_together_have_the_gradient_of_each_alone(scene: Scene, micro_batch: int) -> None:
    sizes: list[int] = []
    expected = learned_alone(scene, CONFIG_6, sizes)
    stats, (gradient,) = scene.update(replace(CONFIG_6, micro_batch=micro_batch), rewards=REWARDS)
    assert (gradient - expected).norm() < GRADIENT_TOLERANCE * expected.norm()
    assert scene.reports[-1] == (sizes[0], sizes[0]) == (2 * (2 + 6 + 6),) * 2
    # Fewer rows than the rollout had: a log-prob of a few float32 roundings, 1e-6 of an output over a sigma above 0.1.
    assert stats["ratio/max_abs_dev_first"] < 1e-5


def test_families_of_all_sizes_are_sent_together(scene: Scene) -> None:
    """To a second process, which has drawn none of them itself: it finds what the first would have learned from."""

    class Sending(Ranks):
        def exchange(self, tensor: Tensor, to: Sequence[int], come: Sequence[int]) -> Tensor:
            return tensor

    tree = tree_of(scene.schedule, CONFIG_6)
    experience = Experience.of(scene.prompts, scene.trajectory, REWARDS, CONFIG_6.grpo, tree=tree)
    sent = Pairs(torch.tensor([0, 1, 2, 0, 3]), torch.tensor([1, 1, 1, 0, 0]), ((1, 3), (1, 2)))
    received = replace(sent, sample=12 + torch.arange(5))
    there = experience.exchanged(Moves(sent, received, [5], [5], 5), Sending())
    for ours, theirs in zip(sent.runs(), received.runs(), strict=True):
        expected, found = experience.micro_batch(ours, None, 0.5), there.micro_batch(theirs, None, 0.5)
        assert expected.siblings == found.siblings == ours.siblings
        for one, other in zip(expected.tensors(), found.tensors(), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_fixed_shapes_learn_the_same(scene: Scene) -> None:
    """As on CUDA: each width has a call of its own, filled up to its size."""
    found: list[tuple[Trajectory, Tensor]] = []
    for kind in (Passes, FixedPasses):
        trainable = scene.trainable(Recorder(scene.policy.unet.parameters()))
        engine = kind(PolicyLoss(scene.policy, scene.schedule, CONFIG_6, trainable.trained), trainable, 5)
        trajectory = rollout(engine, scene.prompts, torch.Generator().manual_seed(0))
        tree = tree_of(scene.schedule, CONFIG_6)
        experience = Experience.of(scene.prompts, trajectory, REWARDS, CONFIG_6.grpo, tree=tree)
        pairs = Pairs(torch.tensor([0, 1, 2, 6, 7, 8, 0, 3]), torch.tensor([1] * 6 + [0] * 2), ((2, 3), (1, 2)))
        engine.clear()
        engine.learn(pairs, experience, None, 1.0)
        found.append((trajectory, engine.weights.collect_gradients().clone()))
    (plain, expected), (fixed, gradient) = found
    torch.testing.assert_close(fixed.latents, plain.latents, rtol=0, atol=1e-4)
    assert (gradient - expected).norm() < GRADIENT_TOLERANCE * expected.norm()
