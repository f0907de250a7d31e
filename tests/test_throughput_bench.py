"""The throughput benchmarks: the plain trainer learns what ours learns, and what is computed from measurements is right."""

import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fastgrpo  # noqa: F401  (prepares the imports below)
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import measure  # noqa: E402
import roofline  # noqa: E402
import throughput  # noqa: E402
import throughput_table  # noqa: E402
import workload  # noqa: E402
from baseline import PLAIN, Baseline, Samples, Techniques  # noqa: E402

from fastgrpo.config import TrainConfig  # noqa: E402
from fastgrpo.distributed import Ranks  # noqa: E402
from fastgrpo.engine.accounting import Accounting  # noqa: E402
from fastgrpo.engine.memory import halves  # noqa: E402
from fastgrpo.engine.rates import Rates  # noqa: E402
from fastgrpo.grpo.update import update  # noqa: E402
from fastgrpo.prompts import embed  # noqa: E402
from fastgrpo.randomness import generator_for  # noqa: E402
from fastgrpo.rollout import rollout  # noqa: E402
from fastgrpo.types import Rewards, Trajectory  # noqa: E402

REWARDS = torch.tensor([[0.1, 0.4, 0.2, 0.25]])
RATES = Rates("Some GPU", "torch.bfloat16", 1, matmul=800e12, copy=4e12)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Four images of one prompt, which the plain trainer draws in one batch: then both draw the same noise.

    AdamW with an eps of 1 moves the weights in proportion to the gradient; no ratio is near a bound.
    """
    return workload.altered(
        workload.shapes(prompts=1),
        group_size=4,
        updates_per_iteration=1,
        micro_batch=8,
        rollout__steps=5,
        grpo__drop_last_steps=1,
        grpo__clip_low=0.9,
        grpo__clip_high=10.0,
        optim__eps=1.0,
        optim__lr=1e-3,
        optim__max_grad_norm=1e9,
        optim__schedule="constant",
        optim__weight_decay=0.0,
        engine__threads=1,
    )


@pytest.fixture(scope="module")
def drawn(config: TrainConfig) -> Samples:
    """What our training draws, as the plain trainer keeps it."""
    parts = workload.ours(config, workers=1).parts
    prompts = embed(parts.policy, parts.source.batch(0), {})
    generator = generator_for(config.seed, 1, "rollout", "cpu")
    trajectory = rollout(parts.engine, prompts, config.rollout, config.group_size, generator)
    each = tuple(prompt for prompt in prompts.prompts for _ in range(config.group_size))
    embeds = prompts.embeds.repeat_interleave(config.group_size, dim=0)
    return Samples(trajectory.latents.transpose(0, 1), trajectory.log_probs.T, trajectory.images, each, embeds)


def disturbed(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the weights by a thousandth, always by the same: ratios are then not 1 and a KL term not 0. Returns them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(1e-3 * parameter.norm() / parameter.numel() ** 0.5 * noise)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def moved(parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(parameters[name].detach() - old).flatten() for name, old in before.items()])


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "KL"])
def learned(request: pytest.FixtureRequest, config: TrainConfig, drawn: Samples) -> tuple[TrainConfig, Tensor]:
    """How far an update of ours moves the disturbed weights, without and with a KL term."""
    config = workload.altered(config, grpo__kl=request.param)
    parts = workload.ours(config, workers=1).parts
    before = disturbed(parts.trainable.parameters)
    prompts = embed(parts.policy, parts.source.batch(0), {})
    trajectory = Trajectory(drawn.latents.transpose(0, 1), drawn.log_probs.T, drawn.images)
    generator = torch.Generator()
    update(parts.engine, prompts, trajectory, Rewards(REWARDS, {}), parts.trainable, config, 1, generator)
    return config, moved(parts.trainable.parameters, before)


def test_the_plain_trainer_draws_what_ours_draws(config: TrainConfig, drawn: Samples) -> None:
    for techniques in (PLAIN, Techniques(batch=4), Techniques(batch=4, operators=True)):
        trainer = workload.plain(config, techniques).baseline
        samples = trainer.rollout(trainer.source.batch(0), generator_for(config.seed, 1, "rollout", "cpu"))
        assert torch.equal(samples.latents[:, 0], drawn.latents[:, 0])
        # diffusers' alphas are products of up to 1,000 float32 factors, off by 1e-5; so are the mean's coefficients, and what
        # five steps through the UNet make of them.
        assert torch.linalg.vector_norm(samples.latents - drawn.latents) <= 1e-4 * torch.linalg.vector_norm(drawn.latents)
        # A log-prob is -(noise^2 / 2 + log sigma) and some: of the order of 1, so off by about as much.
        assert (samples.log_probs - drawn.log_probs).abs().max() <= 1e-4
        assert (samples.images - drawn.images).abs().max() <= 1e-2


@pytest.mark.parametrize("techniques", [PLAIN, Techniques(batch=6), Techniques(batch=6, operators=True)])
def test_the_plain_trainer_learns_what_ours_learns(
    techniques: Techniques, learned: tuple[TrainConfig, Tensor], drawn: Samples
) -> None:
    """From the same trajectory and rewards: 16 pairs, one optimizer step."""
    config, expected = learned
    trainer = workload.plain(config, techniques).baseline
    before = disturbed(dict(trainer.unet.named_parameters()))
    assert trainer.update(drawn, REWARDS, torch.Generator()) == 16
    found = moved(dict(trainer.unet.named_parameters()), before)
    print((found-expected).norm()/expected.norm(), expected.norm())
    # The mean is off by 1e-5 of a latent, sigma at least 0.03: noise / sigma, which the gradient is proportional to, by 1e-3.
    assert torch.linalg.vector_norm(found - expected) <= 1e-3 * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(expected) > 0


def test_the_plain_trainer_scores_what_ours_scores(config: TrainConfig, drawn: Samples) -> None:
    trainer = workload.plain(config).baseline
    reward = workload.ours(config, workers=1).parts.reward
    prompts = drawn.prompts[:: config.group_size]
    expected = reward(drawn.images, prompts, config.group_size).total
    together = workload.plain(config, Techniques(rewards=True)).baseline.score(drawn)
    assert torch.allclose(together, expected, atol=1e-6)
    print(expected, trainer.score(drawn))
    one=trainer.score(replace(drawn, images=torch.rand(4,3,64,64)))
