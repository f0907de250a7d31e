"""The denoising steps as a Gaussian policy: timesteps, the mean's coefficients and sigma.

One DDIM step (Song et al., arXiv 2010.02502, equations 12 and 16) goes from timestep t to the earlier timestep p.
With `a` the cumulative product of 1 - beta, a_t = a[t] and a_p = a[p]:

    sigma = eta * sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
    mu    = sqrt(a_p) * x0 + sqrt(1 - a_p - sigma^2) * eps
    x_p   ~ N(mu, sigma^2)

x0 and eps are both linear in x_t and in the network's output o, for either prediction type:

    epsilon        x0 = (x_t - sqrt(1 - a_t) * o) / sqrt(a_t)            eps = o
    v_prediction   x0 = sqrt(a_t) * x_t - sqrt(1 - a_t) * o              eps = sqrt(a_t) * o + sqrt(1 - a_t) * x_t

so mu = coef_sample * x_t + coef_output * o. With d = sqrt(1 - a_p - sigma^2):

    epsilon        coef_sample = sqrt(a_p / a_t)
                   coef_output = d - sqrt(a_p * (1 - a_t) / a_t)
    v_prediction   coef_sample = sqrt(a_p * a_t) + d * sqrt(1 - a_t)
                   coef_output = d * sqrt(a_t) - sqrt(a_p * (1 - a_t))

`fastgrpo.kernels` takes such steps, with mu in float64: late steps divide its error by a small sigma, and in float32
the error would depend on a vectorised loop's rounding, and so on the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.system.errors import ConfigError

# What the keys mean when a scheduler_config.json leaves them out: diffusers' own defaults for each class.
_COMMON_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
_DEFAULTS = {
    "DDIMScheduler": _COMMON_DEFAULTS | {"clip_sample": True, "set_alpha_to_one": True},
    "PNDMScheduler": _COMMON_DEFAULTS | {"clip_sample": False, "set_alpha_to_one": False},
}
# Configs of other samplers say in the same keys how the model was trained; how they step does not matter here. None of
# them clips, and as in SD's own configs the last step ends at the first timestep's noise.
for _sampler in ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "DPMSolverMultistep",
                 "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"):  # fmt: skip
    _DEFAULTS[f"{_sampler}Scheduler"] = _DEFAULTS["PNDMScheduler"]
_PREDICTION_TYPES = ("epsilon", "v_prediction")
_FILE = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Schedule:
    """The T denoising steps of a rollout, in the order they are taken. All tensors are on one device.

    timesteps: [T] int64, what the UNet is told. prediction_type: "epsilon" or "v_prediction".
    coef_sample, coef_output: [T] float32, the mean's coefficients of x_t and of the UNet's output.
    sigma: [T] float32, the step's standard deviation. trainable: [T] bool, sigma > 0: a deterministic step has no
    probability to learn from.
    guidance_rescale: phi of arXiv 2305.08891, section 3.4: how far a guided output gets back the standard deviation
    that it has without guidance.
    """

    timesteps: Tensor
    coef_sample: Tensor
    coef_output: Tensor
    sigma: Tensor
    trainable: Tensor
    prediction_type: str
    guidance_rescale: float = 0.0

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    @cached_property
    def tables(self) -> Tensor:
        """[3, T] float32: coef_sample, coef_output and sigma, as the operators of `fastgrpo.kernels` take them."""
        return torch.stack([self.coef_sample, self.coef_output, self.sigma])

    def rescale(self, guidance: float) -> float:
        """The operators' `rescale` of a step with this guidance: 0 where there is none."""
        return 0.0 if guidance == 1.0 else self.guidance_rescale


def make_schedule(
    scheduler_config: Mapping[str, Any],
    steps: int,
    eta: float,
    device: torch.device,
    field: str = "rollout.steps",
    deterministic: bool = False,
    guidance_rescale: float = 0.0,
) -> Schedule:
    """The schedule of diffusers' DDIMScheduler, computed in float64, except that a step leads to the next timestep.

    diffusers' goes down by num_train_timesteps // steps. That is the same with `leading` spacing, and with `trailing`
    where the division has no remainder. Else it removes the noise of another timestep than the UNet is told next (with
    `linspace` in 10 steps it goes to 899 and then says 888).

    scheduler_config: a pipeline's scheduler_config.json, of a class in `_DEFAULTS`.
    steps: number of denoising steps. eta: DDIM's eta, in (0, 1]. field: what messages call the setting of `steps`.
    deterministic: accept eta 0 as well, for drawing alone. guidance_rescale: as of `Schedule`.
    Raises ConfigError for a config or value under which a step would not be a Gaussian with this mean.
    """
    config = completed(scheduler_config)
    _check(config, steps, eta, field, deterministic)
    alphas, timesteps = _alphas_cumprod(config), _timesteps(config, steps, field)
    previous = torch.cat([timesteps[1:], timesteps.new_tensor([-1])])
    final = alphas.new_tensor(1.0) if config["set_alpha_to_one"] else alphas[0]
    a_t = alphas[timesteps]
    a_p = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    # Clamped only against rounding: with eta <= 1 both arguments are at least 0.
    sigma = eta * torch.sqrt(((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).clamp(min=0))
    direction = torch.sqrt((1 - a_p - sigma**2).clamp(min=0))
    if config["prediction_type"] == "epsilon":
        coef_sample = torch.sqrt(a_p / a_t)
        coef_output = direction - torch.sqrt(a_p * (1 - a_t) / a_t)
    else:
        coef_sample = torch.sqrt(a_p * a_t) + direction * torch.sqrt(1 - a_t)
        coef_output = direction * torch.sqrt(a_t) - torch.sqrt(a_p * (1 - a_t))
    return Schedule(
        timesteps=timesteps.to(device),
        coef_sample=coef_sample.float().to(device),
        coef_output=coef_output.float().to(device),
        sigma=sigma.float().to(device),
        trainable=(sigma > 0).to(device),
        prediction_type=config["prediction_type"],
        guidance_rescale=guidance_rescale,
    )


def completed(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with its class's defaults filled in. Raises ConfigError for an unknown class."""
    name = scheduler_config.get("_class_name")
    if name not in _DEFAULTS:
        raise ConfigError(f"{_FILE}: _class_name is {name!r}; accepted are the configs of {', '.join(_DEFAULTS)}")
    return _DEFAULTS[name] | dict(scheduler_config)


def _check(config: Mapping[str, Any], steps: int, eta: float, field: str, deterministic: bool) -> None:
    if not (0 < eta <= 1 or (deterministic and eta == 0)):
        raise ConfigError(
            f"rollout.eta is {eta}; above 0 (a deterministic step has no probability) and at most 1 is accepted"
        )
    if not 1 <= steps <= config["num_train_timesteps"]:
        raise ConfigError(f"{field} is {steps}; 1 to the model's {config['num_train_timesteps']} is accepted")
    if config["prediction_type"] not in _PREDICTION_TYPES:
        accepted = " or ".join(_PREDICTION_TYPES)
        raise ConfigError(f"{_FILE}: prediction_type is {config['prediction_type']!r}; {accepted} is accepted")
    if config["clip_sample"]:
        raise ConfigError(
            f"{_FILE}: clip_sample is true (a DDIMScheduler's value when its config does not say); "
            "only false is accepted, since a clipped step is not Gaussian"
        )
    if config["thresholding"]:
        raise ConfigError(f"{_FILE}: thresholding is true; only false is accepted, since such a step is not Gaussian")
    if config.get("use_flow_sigmas"):
        raise ConfigError(f"{_FILE}: use_flow_sigmas is true, as for a model of flow matching; only false is accepted")
    if config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon":
        raise ConfigError(f"{_FILE}: rescale_betas_zero_snr is true with epsilon prediction; it needs v_prediction")


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """[num_train_timesteps] float64."""
    count, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        name = config["beta_schedule"]
        raise ConfigError(f"{_FILE}: beta_schedule is {name!r}; scaled_linear, linear or trained_betas is accepted")
    alphas = torch.cumprod(1 - betas, dim=0)
    return _zero_terminal_snr(alphas) if config["rescale_betas_zero_snr"] else alphas


def _zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Shift and scale sqrt(a) so that the last is 0 and the first keeps its value (Lin et al., arXiv 2305.08891)."""
    root = alphas.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _timesteps(config: Mapping[str, Any], steps: int, field: str) -> Tensor:
    """[steps] int64, descending; the spacings of arXiv 2305.08891, table 2, as diffusers rounds them."""
    count, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (count // steps) + config["steps_offset"]
    elif spacing == "trailing":
        # Cut to `steps`: float division can let one more number, below timestep 0, slip in.
        timesteps = np.arange(count, 0, -count / steps)[:steps].round() - 1
    elif spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps).round()[::-1]
    else:
        raise ConfigError(f"{_FILE}: timestep_spacing is {spacing!r}; leading, trailing or linspace is accepted")
    if timesteps[0] >= count:
        raise ConfigError(
            f"{field} is {steps}; with the scheduler's steps_offset of {config['steps_offset']} "
            f"the first of them lies beyond the model's {count} timesteps: fewer are accepted"
        )
    return torch.from_numpy(timesteps.astype(np.int64))
