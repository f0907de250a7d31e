from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fastgrpo.policy
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.sampler import Sampler
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.policy import load_policy
from fastgrpo.rollout import draw_images, initial_noise, rollout
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig, RolloutConfig, TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.workers import Workers
from fastgrpo.types import Prompt, PromptBatch
from support.plain_policy import predict, step_mean

CPU = torch.device("cpu")
CONFIG = RolloutConfig(steps=4, guidance=3.0)
TEXTS = ["a red cube", "two dogs"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def policy(request, make_tiny_pipeline):
    return load_policy(ModelConfig(path=str(make_tiny_pipeline(request.param))), CPU, torch.float32)


@pytest.fixture(scope="module")
def prompts(policy):
    return PromptBatch(tuple(Prompt(text, "positive") for text in TEXTS), policy.encode(TEXTS))


def schedule_of(policy, **changes):
    return make_schedule({**policy.scheduler_config, **changes}, CONFIG.steps, CONFIG.eta, CPU)


def roll(policy, prompts, config=CONFIG, seed=0, progress=None, **changes):
    schedule = schedule_of(policy, **changes)
    engine = Passes(PolicyLoss(policy, schedule, TrainConfig(rollout=config, group_size=3), ()), None, 1)
    return rollout(engine, prompts, torch.Generator().manual_seed(seed), progress=progress)


def test_policy_is_the_pipeline_on_disk(policy):
    """Same text embeddings, UNet output and decoded images as diffusers' own pipeline, whose weights are read apart."""
    pipeline = StableDiffusionPipeline.from_pretrained(policy.unet.config._name_or_path, dtype=torch.float32)
    embeds, empty = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
    assert torch.equal(policy.encode(TEXTS), embeds)
    # One text, there two: some dozens of roundings of numbers up to 2, in another order where BLAS has one for fewer
    # rows.
    torch.testing.assert_close(policy.unconditional, empty[:1], atol=1e-5, rtol=0)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([901, 1])
    with torch.no_grad():
        uncond = pipeline.unet(latents, timesteps, empty).sample
        cond = pipeline.unet(latents, timesteps, embeds).sample
        # Another memory layout and batch: a few dozen float32 roundings deep, magnified by guidance.
        ours = predict(policy, latents, timesteps, embeds, 3.0)
        torch.testing.assert_close(ours, uncond + 3.0 * (cond - uncond), atol=5e-5, rtol=5e-5)
        torch.testing.assert_close(predict(policy, latents, timesteps, embeds, 1.0), cond, atol=1e-5, rtol=1e-5)
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(policy.decode(latents), expected, atol=1e-6, rtol=0)


def test_policy_trains_the_unet_alone_and_never_in_training_mode(policy):
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.unet.parameters())
    assert not any(p.requires_grad for part in (policy.vae, policy.text_encoder) for p in part.parameters())
    assert not any(
        module.training for part in (policy.unet, policy.vae, policy.text_encoder) for module in part.modules()
    )


def test_predict_takes_another_unet(policy):
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    constant = lambda latents, *_, **__: (torch.full_like(latents, 7.0),)  # noqa: E731
    output = predict(policy, latents, torch.tensor([1]), policy.unconditional, 5.0, unet=constant)
    assert torch.equal(output, torch.full_like(latents, 7.0))


def test_decode_does_not_depend_on_its_chunks(policy, monkeypatch):
    latents = torch.randn(5, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = policy.decode(latents)
    monkeypatch.setattr(fastgrpo.policy, "DECODE_BATCH", 2)
    assert whole.min() >= 0
    assert whole.max() <= 1
    torch.testing.assert_close(policy.decode(latents), whole, atol=1e-6, rtol=0)


def test_decoding_halves_its_batches_when_memory_runs_out(policy, monkeypatch):
    latents = torch.randn(5, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    pairs, decode = policy.decode(latents, 2), policy.vae.decode

    def small_memory(chunk, **options):
        if len(chunk) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(chunk, **options)

    monkeypatch.setattr(policy.vae, "decode", small_memory)
    most = 2
    with pytest.warns(UserWarning, match="out of memory: 2 latents are decoded at once instead of 5"):
        assert torch.equal(policy.decode(latents), pairs)
    most = 0
    with pytest.warns(UserWarning, match="1 latents"), pytest.raises(torch.OutOfMemoryError):
        policy.decode(latents, 2)


def test_load_refuses_what_is_no_text_to_image_sd(tmp_path, tiny_pipeline):
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        load_policy(ModelConfig(path=str(tmp_path)), CPU, torch.float32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ConfigError, match="StableDiffusionXLPipeline"):
        load_policy(ModelConfig(path=str(tmp_path)), CPU, torch.float32)
    (tmp_path / "model_index.json").write_text((tiny_pipeline / "model_index.json").read_text())
    with pytest.raises(ConfigError, match=r"no unet/config\.json"):
        load_policy(ModelConfig(path=str(tmp_path)), CPU, torch.float32)


def test_trajectory_shapes_and_progress(policy, prompts):
    reports = []
    trajectory = roll(policy, prompts, progress=lambda *report: reports.append(report))
    assert trajectory.latents.shape == (5, 6, 4, 8, 8)
    assert trajectory.log_probs.shape == (4, 6)
    assert trajectory.images.shape == (6, 3, 16, 16)
    assert {trajectory.latents.dtype, trajectory.log_probs.dtype, trajectory.images.dtype} == {torch.float32}
    assert reports == [(6, 24), (12, 24), (18, 24), (24, 24)]


def test_trajectory_is_the_chain_that_its_noise_makes(policy, prompts):
    """Redone sample by sample with torch.distributions, and noise drawn from the same generator."""
    trajectory, schedule = roll(policy, prompts), schedule_of(policy)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(trajectory.latents[0], torch.randn(6, 4, 8, 8, generator=generator))
    for step in range(CONFIG.steps):
        noise = torch.randn(6, 4, 8, 8, generator=generator)
        for b in range(6):
            x, taken = trajectory.latents[step, b : b + 1], trajectory.latents[step + 1, b : b + 1]
            with torch.no_grad():
                output = predict(
                    policy, x, schedule.timesteps[step : step + 1], prompts.embeds[b // 3 : b // 3 + 1], 3.0
                )
            mean = step_mean(schedule, step, x, output)
            # The UNet's rounding (batch 1 instead of 6) reaches the latents times a coefficient of order 1.
            torch.testing.assert_close(taken.double(), mean + schedule.sigma[step] * noise[b], atol=1e-4, rtol=1e-5)
            # The log-probability is that of the value stored, not of the value before rounding or storing.
            normal = torch.distributions.Normal(mean, schedule.sigma[step].double())
            expected = normal.log_prob(taken.double()).mean().item()
            assert trajectory.log_probs[step, b].item() == pytest.approx(expected, abs=2e-5)


def test_log_prob_is_of_exactly_what_is_stored(policy, prompts):
    """Same batch shape, so the mean is the same bit for bit and only the log-prob's own rounding is left."""
    trajectory, schedule = roll(policy, prompts), schedule_of(policy)
    embeds = prompts.embeds.repeat_interleave(3, dim=0)
    for step in range(CONFIG.steps):
        with torch.no_grad():
            output = predict(policy, trajectory.latents[step], schedule.timesteps[step].expand(6), embeds, 3.0)
        normal = torch.distributions.Normal(
            step_mean(schedule, step, trajectory.latents[step], output), schedule.sigma[step].double()
        )
        expected = normal.log_prob(trajectory.latents[step + 1].double()).mean(dim=(1, 2, 3))
        # One rounding to float32 of a number below 8.
        assert (trajectory.log_probs[step].double() - expected).abs().max() <= 8 * 2.0**-24


def test_rollout_batch_changes_nothing_but_rounding(policy, prompts):
    whole, parts = roll(policy, prompts), roll(policy, prompts, replace(CONFIG, batch=4))
    # Different noise would differ by order 1; rounding differences of 1e-6 in the UNet pass through 4 steps.
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(roll(policy, prompts, seed=1).latents, whole.latents, atol=0.1)


def test_a_batch_that_memory_runs_out_for_is_drawn_in_smaller_ones(policy, prompts, monkeypatch):
    """Batches of 3 samples; the second one fails at its third step, and its samples are drawn one by one."""
    threes, ones = (roll(policy, prompts, replace(CONFIG, batch=size)) for size in (3, 1))
    denoiser = Passes.denoiser

    def small_memory(self, embeds, part, *others):
        denoise = denoiser(self, embeds, part, *others)

        def step(position, latents, noise):
            if position == 2 and part == slice(3, 6):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return denoise(position, latents, noise)

        return step

    monkeypatch.setattr(Passes, "denoiser", small_memory)
    reports = []
    found = roll(policy, prompts, replace(CONFIG, batch=3), progress=lambda *report: reports.append(report))
    for name in ("latents", "log_probs"):
        drawn, by_three, by_one = (getattr(trajectory, name).split(3, dim=1) for trajectory in (found, threes, ones))
        assert torch.equal(drawn[0], by_three[0]), name
        assert torch.equal(drawn[1], by_one[1]), name
    assert reports[5] == (18, 24), "two steps of the second batch"
    assert reports[6] == (17, 24), "its first sample begins anew, alone"
    assert reports[-1] == (24, 24)


def test_what_another_worker_drew_meanwhile_is_drawn_again_from_its_noise(policy, prompts, monkeypatch):
    """Two workers with three samples each, of whom the second's run out of memory."""
    policy = replace(policy, workers=Workers(2))
    ones = roll(policy, prompts, replace(CONFIG, batch=1))
    denoiser = Passes.denoiser

    def small_memory(self, embeds, part, *others):
        if part == slice(3, 6):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoiser(self, embeds, part, *others)

    monkeypatch.setattr(Passes, "denoiser", small_memory)
    found = roll(policy, prompts, replace(CONFIG, batch=3))
    assert torch.equal(found.latents, ones.latents)
    assert torch.equal(found.log_probs, ones.log_probs)


def test_deterministic_last_step_has_log_prob_zero(policy, prompts):
    trajectory = roll(policy, prompts, set_alpha_to_one=True)
    assert (trajectory.log_probs[-1] == 0).all()
    assert (trajectory.log_probs[:-1] != 0).all()


@pytest.mark.parametrize(
    ("kind", "distinct"), [("shared", [0] * 6), ("per_prompt", [0, 0, 0, 1, 1, 1]), ("independent", list(range(6)))]
)
def test_initial_noise_is_shared_as_told(kind, distinct):
    noise = initial_noise(1, 2, 3, (4, 2, 2), kind, torch.Generator().manual_seed(0))
    assert noise.shape == (6, 4, 2, 2)
    for i in range(6):
        for j in range(6):
            assert torch.equal(noise[i], noise[j]) == (distinct[i] == distinct[j])


def test_a_sample_depends_on_its_prompt_and_seed_alone(policy, prompts):
    schedule = schedule_of(policy)
    embeds = prompts.embeds[[0, 1, 0, 1, 0]]
    seeds = [5, 5, 6, 7, 5]
    images = draw_images(policy, embeds, schedule, 3.0, seeds)
    assert images.shape == (5, 3, 16, 16)
    # Latents differ by rounding (see above); an image is of order 1.
    torch.testing.assert_close(draw_images(policy, embeds, schedule, 3.0, seeds, batch=2), images, atol=1e-3, rtol=0)
    torch.testing.assert_close(images[4], images[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(draw_images(policy, embeds[3:4], schedule, 3.0, [7]), images[3:4], atol=1e-3, rtol=0)
    assert (images[2] - images[0]).abs().max() > 0.01


def test_sample_takes_the_steps_a_rollout_takes(policy, prompts):
    """One sample by hand: its generator's first draw is x_T, then one draw a step."""
    schedule, generator = schedule_of(policy), torch.Generator().manual_seed(9)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for step in range(CONFIG.steps):
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        with torch.no_grad():
            latents, _ = Sampler(policy, schedule, 3.0).chunk(prompts.embeds[:1])(step, latents, noise)
    assert torch.equal(draw_images(policy, prompts.embeds[:1], schedule, 3.0, [9]), policy.decode(latents))


def test_guidance_is_rescaled_as_diffusers_rescales_it(policy, prompts):
    """One step with the UNet's guided output rescaled by diffusers' own function, the mean by the schedule's
    formula.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    schedule = replace(schedule_of(policy), guidance_rescale=0.7)
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(2, *policy.latent_shape, generator=generator) for _ in range(2))
    with torch.no_grad():
        sampler = Sampler(policy, schedule, 3.0, keep_mean=True)
        _, _, mean = sampler.chunk(prompts.embeds)(0, latents, noise)
        rows = policy.rows(latents, schedule.timesteps[:1].expand(2), prompts.embeds, 3.0)
        without, conditional = policy.forward(*rows, return_dict=False)[0].chunk(2)
    output = rescale_noise_cfg(without + 3.0 * (conditional - without), conditional, guidance_rescale=0.7)
    expected = schedule.coef_sample[0] * latents + schedule.coef_output[0] * output
    # float32 there, float64 here: a few roundings of 6e-8, magnified by guidance.
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    plain = Sampler(policy, schedule_of(policy), 3.0, keep_mean=True).chunk(prompts.embeds)(0, latents, noise)[2]
    assert (plain - mean).abs().max() > 1e-3
