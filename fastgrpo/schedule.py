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

A mixed schedule (MixGRPO, arXiv 2507.21802) has noise in a window of steps only. Around it sigma is 0, and the steps
are DDIM's with eta 0 or DPM-Solver++(2M)'s (Lu et al., arXiv 2211.01095, algorithm 2), which also looks at x0' of the
step before. With r = sqrt(a), s = sqrt(1 - a), l = log(r / s) and l' that of the step before:

    c  = r_p - s_p * r_t / s_t                   first order, which is DDIM with eta 0:  x_p = s_p / s_t * x_t + c * x0
    k  = (l_p - l_t) / (l_t - l') / 2            second order:  x_p = s_p / s_t * x_t + c * ((1 + k) * x0 - k * x0')
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


Solver = Literal["ddim", "dpm++"]
"""What takes steps without noise."""

_SNR_FLOOR = 2.0**-24
"""What diffusers' DPM-Solver++ takes for `a` where there is no signal, whose logarithm it needs."""
_FEW = 15
"""Of fewer steps DPM-Solver++ takes the last at first order (lower_order_final)."""


@dataclass(frozen=True)
class Schedule:
    """The T denoising steps of a rollout, in the order they are taken.

    timesteps: [T] int64, what the UNet is told. prediction_type: "epsilon" or "v_prediction".
    tables: [3, T] float32, as the operators of `fastgrpo.kernels` take them: the mean's coefficients of x_t and of the
    UNet's output, and sigma, the step's standard deviation.
    trainable: [T] bool on the CPU, sigma > 0: a deterministic step has no probability to learn from. The other tensors
    are on one device.
    guidance_rescale: phi of arXiv 2305.08891, section 3.4: how far a guided output gets back the standard deviation
    that it has without guidance.
    windowed: whether noise is in the steps of one iteration's window only, which are learned from.
    solver: [3, T] float32, where steps may look back (DPM-Solver++): the mean's coefficient of the x0 that the step
    before has predicted, and the coefficients of x_t and of the output in the x0 of this step.
    """

    timesteps: Tensor
    tables: Tensor
    trainable: Tensor
    prediction_type: str
    guidance_rescale: float = 0.0
    windowed: bool = False
    solver: Tensor | None = None

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    @property
    def coef_sample(self) -> Tensor:
        return self.tables[0]

    @property
    def coef_output(self) -> Tensor:
        return self.tables[1]

    @property
    def sigma(self) -> Tensor:
        return self.tables[2]

    def rescale(self, guidance: float) -> float:
        """The operators' `rescale` of a step with this guidance: 0 where there is none."""
        return 0.0 if guidance == 1.0 else self.guidance_rescale

    def become(self, other: "Schedule") -> None:
        """Take over another schedule of as many steps and the same kind, in place: captured graphs read these tensors.

        other: on any device.
        """
        for name in ("timesteps", "tables", "trainable", "solver"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.copy_(theirs)


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
    timesteps = _timesteps(config, steps, field)
    tables = _ddim_tables(config, *_levels(config, timesteps), eta)
    return Schedule(
        timesteps=timesteps.to(device),
        tables=tables.float().to(device),
        trainable=tables[2] > 0,
        prediction_type=config["prediction_type"],
        guidance_rescale=guidance_rescale,
    )


def make_mixed_schedule(
    scheduler_config: Mapping[str, Any],
    steps: int,
    eta: float,
    device: torch.device,
    window: range,
    outside: int,
    solver: Solver,
    guidance_rescale: float = 0.0,
) -> Schedule:
    """The steps of `make_schedule` in a window, with its very coefficients, and deterministic ones before and after.

    The deterministic steps begin at timesteps of the same grid of `steps`, as evenly as its places allow, and lead to
    the next one taken. Each stretch of them is a sampling of its own: DPM-Solver++(2M) begins it at first order, and
    ends the last one as diffusers' DPMSolverMultistepScheduler does with `lower_order_final`, which is true, and
    `euler_at_final`, which is false, unless the config of such a scheduler says otherwise.

    window: places in the grid. outside: number of steps outside of it, shared out by `share_out`; 0 is all of the grid.
    The others: as of `make_schedule`, which says what is refused.
    """
    config = completed(scheduler_config)
    _check(config, steps, eta, "rollout.steps", deterministic=False)
    before, after = share_out(window.start, steps - window.stop, outside)
    places = [*spread(0, window.start, before), *window, *spread(window.stop, steps, after)]
    timesteps = _timesteps(config, steps, "rollout.steps")[places]
    inside = torch.zeros(len(places), dtype=torch.float64)
    inside[before : before + len(window)] = 1
    a_t, a_p = _levels(config, timesteps)
    tables, extra = _ddim_tables(config, a_t, a_p, eta * inside), None
    if solver == "dpm++":
        tables, extra = _solver_tables(config, a_t, a_p, tables, (before, after))
    return Schedule(
        timesteps=timesteps.to(device),
        tables=tables.float().to(device),
        trainable=tables[2] > 0,
        prediction_type=config["prediction_type"],
        guidance_rescale=guidance_rescale,
        windowed=True,
        solver=None if extra is None else extra.float().to(device),
    )


def share_out(before: int, after: int, outside: int) -> tuple[int, int]:
    """How many of `outside` steps are taken before and after a window, in proportion to the grid's places there.

    before, after: those places. At least one step covers any that there are; none covers none. outside: at most
    before + after, which 0 stands for.
    """
    if not outside or not before + after:
        return before, after
    first = (2 * outside * before + before + after) // (2 * (before + after))  # rounded half up
    if before and after:
        first = min(max(first, 1), outside - 1)
    return first, outside - first


def spread(start: int, stop: int, count: int) -> list[int]:
    """`count` of the places from `start` on, the first of them among these, as evenly as they lie before `stop`."""
    return [start + (2 * k * (stop - start) + count) // (2 * count) for k in range(count)]


def _levels(config: Mapping[str, Any], timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The alphas, [T] float64 each, that steps from these timesteps begin and end at: each leads to the next one."""
    alphas = _alphas_cumprod(config)
    final = alphas.new_tensor(1.0) if config["set_alpha_to_one"] else alphas[0]
    return alphas[timesteps], torch.cat([alphas[timesteps[1:]], final[None]])


def _ddim_tables(config: Mapping[str, Any], a_t: Tensor, a_p: Tensor, eta: float | Tensor) -> Tensor:
    """[3, T] float64: coef_sample, coef_output, sigma. eta: of all steps or, [T], of each."""
    # Clamped only against rounding: with eta <= 1 both arguments are at least 0.
    sigma = eta * torch.sqrt(((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).clamp(min=0))
    direction = torch.sqrt((1 - a_p - sigma**2).clamp(min=0))
    if config["prediction_type"] == "epsilon":
        coef_sample = torch.sqrt(a_p / a_t)
        coef_output = direction - torch.sqrt(a_p * (1 - a_t) / a_t)
    else:
        coef_sample = torch.sqrt(a_p * a_t) + direction * torch.sqrt(1 - a_t)
        coef_output = direction * torch.sqrt(a_t) - torch.sqrt(a_p * (1 - a_t))
    return torch.stack([coef_sample, coef_output, sigma])


def _solver_tables(
    config: Mapping[str, Any], a_t: Tensor, a_p: Tensor, ddim: Tensor, stretches: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """DDIM's tables with DPM-Solver++'s steps where sigma is 0, and `Schedule.solver`; [3, T] float64 both.

    stretches: how many steps are taken before the window and after it.
    """
    a_t, count, (before, after) = a_t.clamp(min=_SNR_FLOOR), len(a_t), stretches
    root_t, root_p, noise_t, noise_p = (each.sqrt() for each in (a_t, a_p, 1 - a_t, 1 - a_p))
    if config["prediction_type"] == "epsilon":
        data_sample, data_output = 1 / root_t, -noise_t / root_t
    else:
        data_sample, data_output = root_t, -noise_t
    # A step is of second order where one of the same stretch came before it, and not the last one of few.
    second = torch.arange(count) > 0
    second[before : count - after + 1] = False
    few = after < _FEW and config.get("lower_order_final", True)
    if after and (few or config.get("euler_at_final", False) or a_p[-1] == 1):
        second[-1] = False
    level_t, level_p = torch.log(root_t / noise_t), torch.log(root_p / noise_p)  # the last may be infinite
    back = torch.zeros(count, dtype=a_t.dtype)
    back[second] = ((level_p - level_t) / (level_t - level_t.roll(1)) / 2)[second]
    now = root_p - noise_p * root_t / noise_t
    mean = torch.stack([noise_p / noise_t + now * (1 + back) * data_sample, now * (1 + back) * data_output])
    tables = torch.cat([torch.where(ddim[2] > 0, ddim[:2], mean), ddim[2:]])
    return tables, torch.stack([-now * back, data_sample, data_output])


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
