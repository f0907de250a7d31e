import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from fastgrpo.kernels.step_math import gaussian_log_prob
from fastgrpo.schedule import make_schedule
from fastgrpo.system.errors import ConfigError
from support.plain_policy import step_mean

CPU = torch.device("cpu")
SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# Half a unit in the last place, relative: what one rounding to float32 may lose.
EPS32 = 2.0**-24


def diffusers_scheduler(config: dict, steps: int, dtype: torch.dtype) -> DDIMScheduler:
    """diffusers' own scheduler; with float64, its formulas on a table that is not rounded."""
    scheduler = DDIMScheduler.from_config({k: v for k, v in config.items() if k != "_class_name"})
    if dtype == torch.float64:
        betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
        scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
        if not config["set_alpha_to_one"]:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1, "leading"), (7, "leading"), (10, "trailing"), (50, "trailing"), (50, "leading")]
)
def test_every_step_is_diffusers_step(prediction_type, alpha_one, steps, spacing):
    config = SD | {"prediction_type": prediction_type, "set_alpha_to_one": alpha_one, "timestep_spacing": spacing}
    schedule = make_schedule(config, steps, 1.0, CPU)
    exact = diffusers_scheduler(config, steps, torch.float64)
    rounded = diffusers_scheduler(config, steps, torch.float32)
    assert schedule.timesteps.tolist() == exact.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    latents, output, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64, generator=generator)
    for step, timestep in enumerate(schedule.timesteps.tolist()):
        terms = [schedule.coef_sample[step], schedule.coef_output[step], schedule.sigma[step]]
        # Our three coefficients are each rounded once to float32; the products and sums are float64.
        bound = EPS32 * sum(c.abs() * x.abs() for c, x in zip(terms, (latents, output, noise), strict=True)) + 1e-12
        ours = step_mean(schedule, step, latents, output) + terms[2].double() * noise
        theirs = exact.step(output, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        assert ((ours - theirs).abs() <= bound).all()
        # diffusers' float32 table: a and a / a' are known to a few EPS32 absolutely (cumprod of up to 1000 factors
        # wanders to some ten), and sigma and the direction are roots of differences as small as 1 - a_p.
        a_p_gap = max(1 - float(exact.final_alpha_cumprod), 1 - float(exact.alphas_cumprod[0]))
        loose = (
            64 * EPS32 / a_p_gap**0.5 * (1 + latents.abs() + output.abs() + noise.abs()) * schedule.coef_sample[step]
        )
        theirs = rounded.step(output.float(), timestep, latents.float(), eta=1.0, variance_noise=noise.float())
        assert ((ours - theirs.prev_sample.double()).abs() <= loose).all()


LEADING = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
LINSPACE = [999, 749, 500, 250, 0]
TRAILING = [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82]
EVEN = [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("prediction_type", "spacing", "timesteps", "zero_snr"),
    [
        ("epsilon", "leading", LEADING, False),
        ("v_prediction", "leading", LEADING, False),
        # Steps lead to the next of these, which diffusers' do not: they are not 200 and 83 apart.
        ("epsilon", "linspace", LINSPACE, False),
        ("v_prediction", "trailing", TRAILING, False),
        ("v_prediction", "trailing", EVEN, True),
    ],
)
def test_mean_and_sigma_are_the_closed_form(prediction_type, spacing, timesteps, zero_snr):
    """The module's formulas written out in Python floats, one scalar latent, eta below 1; without SNR also eta 1."""
    changes = {"prediction_type": prediction_type, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr}
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    if zero_snr:
        betas = rescale_zero_terminal_snr(torch.from_numpy(betas)).numpy()
    a, x, o = np.cumprod(1 - betas), 0.8, -1.3
    for eta in (0.7, 1.0):
        schedule = make_schedule(SD | changes, len(timesteps), eta, CPU)
        assert schedule.timesteps.tolist() == timesteps
        for step, (t, previous) in enumerate(itertools.pairwise([*timesteps, 0])):
            at, ap = a[t], a[previous]
            sigma = eta * math.sqrt((1 - ap) / (1 - at) * (1 - at / ap))
            eps = o if prediction_type == "epsilon" else math.sqrt(at) * o + math.sqrt(1 - at) * x
            if prediction_type == "epsilon":
                x0 = (x - math.sqrt(1 - at) * eps) / math.sqrt(at)
            else:
                x0 = math.sqrt(at) * x - math.sqrt(1 - at) * o
            direction = math.sqrt(max(1 - ap - sigma**2, 0.0))
            mu = math.sqrt(ap) * x0 + direction * eps
            ours = step_mean(schedule, step, torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1, 1), o)).item()
            # x and o are rounded to float32 as well as the coefficients: two roundings a term. The direction is the
            # root of a difference, exactly 0 where there is no signal, of numbers below 1 in float64.
            terms = (schedule.coef_sample[step].abs() * abs(x) + schedule.coef_output[step].abs() * abs(o)).item()
            root = min(2.0**-52 / direction, 2.0**-26) if direction else 2.0**-26
            assert abs(ours - mu) <= 2 * EPS32 * terms + 4 * root * abs(eps) + 1e-12
            assert schedule.sigma[step].item() == pytest.approx(sigma, rel=EPS32, abs=1e-9)


def test_sd1_at_50_steps_has_the_known_timesteps():
    assert make_schedule(SD, 50, 1.0, CPU).timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 9, 27, 64, 333])
def test_timesteps_are_diffusers(spacing, steps):
    config = SD | {"timestep_spacing": spacing}
    assert torch.equal(
        make_schedule(config, steps, 1.0, CPU).timesteps, diffusers_scheduler(config, steps, torch.float32).timesteps
    )


def test_set_alpha_to_one_makes_the_last_step_deterministic():
    assert make_schedule(SD, 10, 1.0, CPU).trainable.all()
    schedule = make_schedule(SD | {"set_alpha_to_one": True}, 10, 1.0, CPU)
    assert schedule.sigma[-1] == 0
    assert schedule.trainable.tolist() == [True] * 9 + [False]


def test_a_pndm_config_as_sd1_ships_it_means_the_same():
    pndm = dict(PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).config)
    schedule = make_schedule(pndm | {"_class_name": "PNDMScheduler"}, 10, 1.0, CPU)
    assert torch.equal(schedule.sigma, make_schedule(SD, 10, 1.0, CPU).sigma)


@pytest.mark.parametrize("sampler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_other_samplers_configs_say_how_the_model_was_trained(sampler):
    config = dict(sampler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).config)
    schedule = make_schedule(config | {"_class_name": sampler.__name__, "timestep_spacing": "leading"}, 10, 1.0, CPU)
    expected = make_schedule(SD, 10, 1.0, CPU)
    assert torch.equal(schedule.sigma, expected.sigma)
    assert torch.equal(schedule.timesteps, expected.timesteps)


@pytest.mark.parametrize(
    ("change", "steps", "eta", "named"),
    [
        ({}, 10, 0.0, "rollout.eta"),
        ({}, 10, 1.5, "rollout.eta"),
        ({}, 0, 1.0, "rollout.steps"),
        ({}, 1001, 1.0, "rollout.steps"),
        ({}, 1000, 1.0, "steps_offset"),
        ({"clip_sample": True}, 10, 1.0, "clip_sample"),
        ({"thresholding": True}, 10, 1.0, "thresholding"),
        ({"prediction_type": "sample"}, 10, 1.0, "prediction_type"),
        ({"beta_schedule": "squaredcos_cap_v2"}, 10, 1.0, "beta_schedule"),
        ({"timestep_spacing": "karras"}, 10, 1.0, "timestep_spacing"),
        ({"rescale_betas_zero_snr": True}, 10, 1.0, "rescale_betas_zero_snr"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 10, 1.0, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_what_is_not_a_gaussian_step_is_refused(change, steps, eta, named):
    with pytest.raises(ConfigError, match=named):
        make_schedule(SD | change, steps, eta, CPU)


def test_a_ddim_config_that_does_not_say_clip_sample_means_true():
    with pytest.raises(ConfigError, match="clip_sample"):
        make_schedule({key: value for key, value in SD.items() if key != "clip_sample"}, 10, 1.0, CPU)


def test_log_prob_is_the_mean_of_torch_normal_in_float64():
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([1.0, 0.3, 0.02, 1e-3])
    mean = torch.randn(4, 4, 8, 8, generator=generator)
    sample = mean + sigma.view(-1, 1, 1, 1) * torch.randn(mean.shape, generator=generator)
    normal = torch.distributions.Normal(mean.double(), sigma.double().view(-1, 1, 1, 1))
    expected = normal.log_prob(sample.double()).mean(dim=(1, 2, 3))
    # Some hundred float64 operations on numbers below 8.
    torch.testing.assert_close(gaussian_log_prob(sample, mean, sigma), expected, atol=1e-13, rtol=1e-13)


def test_log_prob_of_a_deterministic_step_is_zero_and_its_gradient_finite():
    mean = torch.zeros(2, 1, 2, 2, requires_grad=True)
    log_prob = gaussian_log_prob(torch.ones(2, 1, 2, 2), mean, torch.tensor([0.0, 1.0]))
    log_prob.sum().backward()
    assert log_prob[0] == 0
    assert torch.equal(mean.grad[0], torch.zeros(1, 2, 2))
    # d/dmu of the mean over 4 elements of -(1 - mu)^2 / 2 is 1/4 each.
    assert torch.equal(mean.grad[1], torch.full((1, 2, 2), 0.25))
