"""The update against the textbook: gradients, ratios, clipping, KL, and every option of what is learned from."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgrpo.grpo.steps import steps_of_samples
from fastgrpo.kernels.grpo_step import clipped_loss
from fastgrpo.settings.schema import OptimConfig, RolloutConfig
from fastgrpo.system.errors import ConfigError
from support.update import CONFIG, GRADIENT_TOLERANCE, GROUP, NUDGE, PROMPTS, REWARDS, STEPS, Scene


@pytest.fixture
def scene(tiny_pipeline):
    return Scene(tiny_pipeline)


@pytest.fixture(params=["epsilon", "v_prediction"])
def either_scene(request, make_tiny_pipeline):
    return Scene(make_tiny_pipeline(request.param))


def close(ours, reference):
    return (ours - reference).norm() <= GRADIENT_TOLERANCE * reference.norm()


def textbook(scene, rewards, config, base=None, pairs=None):
    """The policy's loss, the whole gradient, ratios and KLs, pair by pair in float64, from formulas and a UNet call.

    pairs: the (sample, step) pairs the mean is over; default all but those of the last step.
    """
    unet = deepcopy(scene.policy.unet).double()
    reference = None if base is None else deepcopy(base).double()
    prediction_type = scene.policy.scheduler_config["prediction_type"]
    a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    grpo, rewards = config.grpo, rewards.double().numpy()
    advantage = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, ddof=1, keepdims=True)
    advantage = advantage.clip(-grpo.advantage_clamp, grpo.advantage_clamp)
    empty = scene.policy.unconditional.double()

    def step_mean(network, x, t, embed):
        uncond, cond = (network(x, torch.tensor([t]), context).sample for context in (empty, embed))
        o = uncond + config.rollout.guidance * (cond - uncond)
        at, ap = a[t], a[t - 1000 // STEPS] if t >= 1000 // STEPS else a[0]
        sigma = np.sqrt((1 - ap) / (1 - at) * (1 - at / ap))
        eps = o if prediction_type == "epsilon" else np.sqrt(at) * o + np.sqrt(1 - at) * x
        x0 = (x - np.sqrt(1 - at) * eps) / np.sqrt(at)
        return np.sqrt(ap) * x0 + np.sqrt(1 - ap - sigma**2) * eps, sigma

    pairs = pairs or [(b, i) for b in range(PROMPTS * GROUP) for i in range(STEPS - 1)]
    losses, ratios, kls = [], [], []
    for b, i in pairs:
        x, taken = (scene.trajectory.latents[k, b : b + 1].double() for k in (i, i + 1))
        embed = scene.prompts.embeds[b // GROUP][None].double()
        t = 1 + (STEPS - 1 - i) * (1000 // STEPS)
        mean, sigma = step_mean(unet, x, t, embed)
        log_prob = torch.distributions.Normal(mean, sigma).log_prob(taken).mean()
        ratio = torch.exp(log_prob - scene.trajectory.log_probs[i, b].double())
        score = float(advantage[b // GROUP, b % GROUP])
        loss = policy_loss = -min(score * ratio, score * ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high))
        if reference is not None:
            with torch.no_grad():
                base_mean, _ = step_mean(reference, x, t, embed)
            normal = torch.distributions.Normal
            kl = torch.distributions.kl_divergence(normal(mean, sigma), normal(base_mean, sigma)).mean()
            if grpo.kl_prompts == "all" or scene.prompts.prompts[b // GROUP].label == "positive":
                loss = loss + grpo.kl * kl
                kls.append(kl.item())
        (loss / len(pairs)).backward()
        losses.append(policy_loss.item())
        ratios.append(ratio.item())
    gradient = torch.cat([p.grad.flatten() for p in unet.parameters()])
    return np.array(losses), gradient, np.array(ratios), np.array(kls)


def test_gradient_is_the_textbook_one(either_scene):
    """Before the policy has moved: sample by sample and step by step in float64."""
    stats, (gradient,) = either_scene.update()
    losses, reference, _, _ = textbook(either_scene, REWARDS, CONFIG)
    assert close(gradient, reference)
    assert stats["grad/norm"] == pytest.approx(reference.norm().item(), rel=GRADIENT_TOLERANCE)
    # Ratios of 1: |A| up to 1.2, each to 1e-6.
    assert stats["loss/policy"] == pytest.approx(losses.mean(), abs=2e-6)
    # The reference can tell: without one of the pairs, it is another gradient.
    pairs = [(b, i) for b in range(6) for i in range(STEPS - 1)]
    assert not close(gradient, textbook(either_scene, REWARDS, CONFIG, pairs=pairs[1:])[1])


@pytest.mark.parametrize("prompts", ["all", "positive"])
def test_gradient_is_the_textbook_one_after_the_policy_has_moved(scene, prompts):
    """Ratios off 1, some of them clipped, and a KL term to where the policy was."""
    base = deepcopy(scene.policy.unet)
    scene.nudge(NUDGE)
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, kl=0.3, kl_prompts=prompts))
    stats, (gradient,) = scene.update(config, base=base)
    losses, reference, ratios, kls = textbook(scene, REWARDS, config, base)
    assert close(gradient, reference)
    assert 0 < stats["clip/fraction"] < 1, "the scene must hold clipped and free pairs"
    assert stats["kl/mean"] == pytest.approx(kls.mean(), rel=1e-4)
    assert stats["loss/policy"] == pytest.approx(losses.mean(), abs=1e-5)
    # Log-probs carry the UNet's 1e-6 times (x - mu) / sigma, of order 1.
    assert [stats["ratio/min"], stats["ratio/max"]] == pytest.approx([ratios.min(), ratios.max()], rel=1e-5)
    assert stats["ratio/mean"] == pytest.approx(ratios.mean(), rel=1e-5)
    assert stats["ratio/max_abs_dev_first"] == pytest.approx(np.abs(ratios - 1).max(), rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_gradient_does_not_depend_on_micro_batch(scene, micro_batch):
    config = replace(CONFIG, updates_per_iteration=2)
    _, reference = scene.update(config)
    _, gradients = scene.update(replace(config, micro_batch=micro_batch))
    assert len(gradients) == len(reference) == 2
    assert all(close(ours, theirs) for ours, theirs in zip(gradients, reference, strict=True))


def test_parts_are_dealt_without_loss(scene):
    """The mean over all pairs is the mean of the parts' means, weighed by their sizes.

    5 parts of 12 pairs are of 3, 3, 2, 2 and 2.
    """
    _, (whole,) = scene.update()
    stats, gradients = scene.update(replace(CONFIG, updates_per_iteration=5))
    assert stats["optim/steps"] == 5
    assert close(sum(n * g for n, g in zip([3, 3, 2, 2, 2], gradients, strict=True)) / 12, whole)
    assert scene.reports == [(3, 12), (6, 12), (8, 12), (10, 12), (12, 12)]


def test_dealing_mixes_samples_and_follows_the_seed(scene):
    """With one of two groups flat, half the pairs are computed: a part of one group alone would be all or nothing."""
    config = replace(CONFIG, updates_per_iteration=2)
    rewards = torch.stack([REWARDS[0], torch.full((GROUP,), 0.7)])
    _, first = scene.update(config, rewards)
    (first_part, total), (done, _) = scene.reports
    assert 0 < first_part < done == total == 6
    _, again = scene.update(config, rewards)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    _, other = scene.update(config, rewards, seed=2)
    assert not close(other[0], first[0])


@pytest.mark.parametrize(("steps", "eta"), [(8, 1.0), (12, 1.0), (8, 0.5)])
@pytest.mark.parametrize("old_log_prob", ["rollout", "replay", "detach"])
def test_ratio_is_one_before_the_policy_moves(scene, steps, eta, old_log_prob):
    """Rollout in batches of 6, update in micro-batches of 16, every step trained."""
    config = replace(
        CONFIG,
        updates_per_iteration=2,
        micro_batch=16,
        rollout=RolloutConfig(steps=steps, guidance=5.0, eta=eta),
        grpo=replace(CONFIG.grpo, drop_last_steps=0, old_log_prob=old_log_prob),
    )
    scene.roll(config)
    optimizer = torch.optim.AdamW(scene.policy.unet.parameters(), lr=1e-3)
    stats, _ = scene.update(config, optimizer=optimizer, allowed=1e-6)
    assert stats["ratio/max_abs_dev_first"] <= (1e-6 if old_log_prob == "rollout" else 0.0)
    moved = max(stats["ratio/max"] - 1, 1 - stats["ratio/min"])
    # Only the first part counts: by the second the policy has moved, which "detach" does not see.
    assert moved == 0 if old_log_prob == "detach" else moved > 1e-4


def test_old_log_prob_modes_differ_once_the_policy_has_moved(scene):
    """`rollout` remembers the policy that sampled; `replay` and `detach` start from the present one."""
    scene.nudge(NUDGE)
    deviation = {
        mode: scene.update(old_log_prob=mode)[0]["ratio/max_abs_dev_first"] for mode in ("rollout", "replay", "detach")
    }
    assert deviation["rollout"] > 1e-3
    assert deviation["replay"] == deviation["detach"] == 0


def test_flat_groups_are_skipped_and_change_no_others_gradient(scene):
    """The mean still counts their pairs: half the gradient that the other group alone would give."""
    rewards = torch.stack([REWARDS[0], torch.full((GROUP,), 0.7)])
    stats, (gradient,) = scene.update(rewards=rewards)
    pairs = [(b, i) for b in range(GROUP) for i in range(STEPS - 1)]
    assert close(gradient, textbook(scene, REWARDS, CONFIG, pairs=pairs)[1] / 2)
    assert stats["advantage/zero_std_groups"] == 1
    assert scene.reports == [(6, 6)], "the flat group's pairs are not computed"


def test_without_a_pair_to_compute_no_step_is_taken(scene):
    stats, gradients = scene.update(replace(CONFIG, updates_per_iteration=3), rewards=torch.ones(PROMPTS, GROUP))
    assert gradients == []
    assert (stats["optim/steps"], stats["optim/skipped_steps"]) == (0, 3)
    assert (stats["ratio/max_abs_dev_first"], stats["grad/norm"], stats["loss/policy"]) == (0, 0, 0)


def test_kl_is_zero_at_the_base_model_and_pulls_flat_groups_back(scene):
    base, flat = deepcopy(scene.policy.unet), torch.ones(PROMPTS, GROUP)
    stats, (gradient,) = scene.update(rewards=flat, kl=0.1, base=base)
    assert (stats["kl/mean"], gradient.norm().item()) == (0, 0)
    scene.nudge(NUDGE)
    stats, (gradient,) = scene.update(rewards=flat, kl=0.1, base=base)
    assert stats["kl/mean"] > 0
    assert gradient.norm() > 0
    with pytest.raises(ValueError, match=r"grpo\.kl"):
        scene.update(kl=0.1)


def test_gradient_is_clipped_to_the_norm(scene):
    config = replace(CONFIG, optim=OptimConfig(max_grad_norm=1e-3))
    stats, (gradient,) = scene.update(config)
    assert stats["grad/norm"] > 1e-3
    assert stats["grad/clipped_fraction"] == 1
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_deterministic_and_dropped_steps_are_not_trained(scene):
    scene.update()
    assert scene.reports[-1] == (12, 12)
    scene.roll(CONFIG, set_alpha_to_one=True)
    kept = replace(CONFIG, grpo=replace(CONFIG.grpo, drop_last_steps=0))
    stats, _ = scene.update(kept, allowed=1e-6)
    assert scene.reports[-1] == (12, 12)
    assert stats["ratio/max_abs_dev_first"] <= 1e-6
    with pytest.raises(ConfigError, match="drop_last_steps"):
        scene.update(drop_last_steps=STEPS)


def test_following_the_gradient_makes_better_samples_likelier(scene):
    """One SGD step, then the loss of the same pairs: -A * ratio must have fallen."""
    optimizer = torch.optim.SGD(scene.policy.unet.parameters(), lr=1e-2)
    wide = {"clip_low": 0.9, "clip_high": 10.0}
    before, _ = scene.update(optimizer=optimizer, **wide)
    after, _ = scene.update(optimizer=optimizer, **wide)
    assert after["loss/policy"] < before["loss/policy"]


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped", "loss"),
    [
        (2.0, 1.00, 0, -2.0),
        (2.0, 1.15, 0, -2.3),  # inside the wider upper bound
        (2.0, 1.30, 1, -2.4),  # good and already likelier: enough
        (2.0, 0.50, 0, -1.0),  # good but less likely: pulled back, however far
        (-2.0, 0.85, -1, 1.8),  # bad and already less likely: enough
        (-2.0, 0.95, 0, 1.9),
        (-2.0, 1.30, 0, 2.6),  # bad but likelier: pushed down, however far
        (0.0, 1.30, 0, 0.0),
    ],
)
def test_clip_acts_in_the_right_direction(advantage, ratio, clipped, loss):
    """Bounds 0.9 and 1.2."""
    log_ratio = torch.tensor([np.log(ratio)], dtype=torch.float32)
    value, r, c, _ = clipped_loss(log_ratio, torch.tensor([advantage]), clip_low=0.1, clip_high=0.2)
    assert c.item() == clipped
    # A handful of float32 operations on numbers below 3.
    assert [r.item(), value.item()] == pytest.approx([ratio, loss], abs=1e-6)


def test_clip_fractions_tell_the_sides_apart(scene):
    scene.nudge(NUDGE)
    low, _ = scene.update(clip_low=1e-6, clip_high=10.0)
    high, _ = scene.update(clip_low=0.99, clip_high=1e-6)
    assert (low["clip/fraction_high"], high["clip/fraction_low"]) == (0, 0)
    assert low["clip/fraction_low"] == low["clip/fraction"] > 0
    assert high["clip/fraction_high"] == high["clip/fraction"] > 0


def test_best_of_learns_from_its_samples_alone(scene):
    """Advantages are those of the whole group; the mean is over the pairs of the samples that are kept."""
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, best_of=2))
    _, (gradient,) = scene.update(config)
    kept = [0, 1, 3, 4]  # without 0.2 and 0.5, the ones in the middle
    pairs = [(b, i) for b in kept for i in range(STEPS - 1)]
    assert close(gradient, textbook(scene, REWARDS, CONFIG, pairs=pairs)[1])
    assert scene.reports[-1] == (8, 8)


def test_trim_learns_from_its_samples_alone(scene):
    rewards = torch.tensor([[0.1, 0.4, 0.2, 0.6], [0.9, 0.3, 0.5, 0.4]])
    config = replace(CONFIG, group_size=4, grpo=replace(CONFIG.grpo, trim=1))
    scene.roll(config)
    _, (trimmed,) = scene.update(config, rewards)
    assert scene.reports[-1] == (8, 8)
    extreme = rewards.clone()
    extreme[0, 3], extreme[1, 1] = 99.0, -99.0  # trimmed before as after
    _, (same,) = scene.update(config, extreme)
    assert torch.equal(trimmed, same)
    _, (untrimmed,) = scene.update(replace(config, grpo=CONFIG.grpo), extreme)
    assert not close(untrimmed, trimmed)


def test_window_is_what_is_learned_from(scene):
    window = {"window": 1, "window_every": 1}
    _, (first,) = scene.update(**window)
    _, (second,) = scene.update(iteration=2, **window)
    for gradient, step in ((first, 0), (second, 1)):
        pairs = [(b, step) for b in range(PROMPTS * GROUP)]
        assert close(gradient, textbook(scene, REWARDS, CONFIG, pairs=pairs)[1])


def test_a_fraction_of_steps_is_what_is_learned_from(scene):
    _, (half,) = scene.update(step_fraction=0.5)
    assert scene.reports[-1] == (6, 6)
    pairs = steps_of_samples(torch.arange(STEPS - 1), 6, 0.5, torch.Generator().manual_seed(1))
    assert close(half, textbook(scene, REWARDS, CONFIG, pairs=[(b, int(i)) for b, (i,) in enumerate(pairs)])[1])


def test_epochs_pass_over_all_pairs_again(scene):
    _, gradients = scene.update(replace(CONFIG, updates_per_iteration=2), epochs=2)
    _, (once,) = scene.update()
    assert scene.reports[-1] == (12, 12)
    assert len(gradients) == 2
    assert all(close(gradient, once) for gradient in gradients), "each pass is all pairs, the policy does not move"


def ratio_norm_config(**grpo):
    return replace(CONFIG, grpo=replace(CONFIG.grpo, ratio_norm=True, **grpo))


def test_ratio_norm_takes_the_bias_out_of_the_ratio(scene):
    """The plain ratios of a policy that moved lie below 1 on average, the more the smaller sigma; these do not."""
    config = ratio_norm_config(drop_last_steps=0)
    scene.roll(config)
    scene.nudge(3 * NUDGE)
    plain, _ = scene.update(replace(config, grpo=replace(config.grpo, ratio_norm=False)))
    normed, (gradient,) = scene.update(config)
    assert plain["ratio/min"] < 1 - 10 * abs(normed["ratio/min"] - 1)
    assert abs(normed["ratio/mean"] - 1) < 0.1 * abs(plain["ratio/mean"] - 1)
    assert gradient.norm() > 0


@pytest.mark.parametrize("old_log_prob", ["rollout", "replay", "detach"])
def test_ratio_norm_is_one_before_the_policy_moves(scene, old_log_prob):
    config = ratio_norm_config(old_log_prob=old_log_prob)
    scene.roll(config)
    stats, (gradient,) = scene.update(config, allowed=1e-6)
    assert stats["ratio/max_abs_dev_first"] <= (1e-6 if old_log_prob == "rollout" else 0.0)
    # At ratio 1 the normalised log-ratio's gradient is sigma times the plain one's: not the same direction.
    _, (plain,) = scene.update(replace(config, grpo=CONFIG.grpo))
    assert not close(gradient / gradient.norm(), plain / plain.norm())
