"""Schedules with noise in a window only: against diffusers' schedulers, closed forms, and a model whose score is known.

The solver's reference is written as in the paper, in logarithms of signal over noise and Python floats.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from fastgrpo.grpo.steps import rollout_schedule, trained_steps
from fastgrpo.schedule import Schedule, make_mixed_schedule, make_schedule, share_out, spread
from fastgrpo.settings.schema import GrpoConfig, RolloutConfig, TrainConfig

CPU = torch.device("cpu")
SD = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
EPS32 = 2.0**-24  # what one rounding to float32 may lose, relative
KINDS = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "trailing": {"timestep_spacing": "trailing"},
    "alpha one": {"prediction_type": "v_prediction", "set_alpha_to_one": True},
    "zero snr": {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
}
kinds = pytest.mark.parametrize("kind", KINDS)


def alphas_of(config: dict) -> np.ndarray:
    """[1000] float64, by its own arithmetic."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def levels(config: dict, schedule: Schedule) -> list[float]:
    """The alphas from the first step's beginning to the last one's end."""
    alphas = alphas_of(config)
    final = 1.0 if config.get("set_alpha_to_one") else alphas[0]
    return [*alphas[schedule.timesteps.numpy()].tolist(), float(final)]


def stretches(schedule: Schedule) -> tuple[range, range, range]:
    """Positions before the window, in it and after it."""
    inside = schedule.trainable.nonzero().flatten().tolist()
    return range(inside[0]), range(inside[0], inside[-1] + 1), range(inside[-1] + 1, len(schedule))


class Leap:
    """In the place of a number of steps: diffusers' DDIM goes down by 1000 // this."""

    def __init__(self, down: int):
        self.down = down

    def __rfloordiv__(self, _: int) -> int:
        return self.down


@kinds
@pytest.mark.parametrize("outside", [0, 9])
def test_every_ddim_step_is_diffusers_ddim_step(kind: str, outside: int) -> None:
    config = SD | KINDS[kind]
    mixed = make_mixed_schedule(config, 25, 0.8, CPU, range(8, 13), outside, "ddim")
    assert len(mixed) == 5 + (outside or 20)
    assert mixed.solver is None
    known = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "set_alpha_to_one", "rescale_betas_zero_snr")
    given = {"set_alpha_to_one": False} | {key: value for key, value in config.items() if key in known}
    scheduler = DDIMScheduler(clip_sample=False, **given)
    scheduler.alphas_cumprod = torch.from_numpy(alphas_of(config))
    if not given["set_alpha_to_one"]:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    generator = torch.Generator().manual_seed(0)
    x, o, noise = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64, generator=generator)
    for step, (t, p) in enumerate(pairwise([*mixed.timesteps.tolist(), -1])):
        scheduler.num_inference_steps = Leap(t - p)
        eta = 0.8 * bool(mixed.trainable[step])
        theirs = scheduler.step(o, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        terms = [c.double() * each for c, each in zip(mixed.tables[:, step], (x, o, noise), strict=True)]
        bound = EPS32 * sum(term.abs() for term in terms) + 1e-12
        assert ((sum(terms) - theirs).abs() <= bound).all()


@kinds
def test_in_the_window_steps_are_todays_to_the_last_bit(kind: str) -> None:
    config = SD | KINDS[kind]
    whole = make_schedule(config, 25, 0.8, CPU)
    for solver in ("ddim", "dpm++"):
        mixed = make_mixed_schedule(config, 25, 0.8, CPU, range(8, 13), 9, solver)
        assert torch.equal(mixed.timesteps[mixed.trainable], whole.timesteps[8:13])
        assert torch.equal(mixed.tables[:, mixed.trainable], whole.tables[:, 8:13])
        assert set(mixed.timesteps.tolist()) < set(whole.timesteps.tolist())
        assert mixed.timesteps[0] == whole.timesteps[0]
        assert (mixed.tables[2, ~mixed.trainable] == 0).all()


@kinds
@pytest.mark.parametrize(("window", "outside"), [((0, 3), 12), ((0, 3), 20), ((21, 24), 0), ((9, 13), 11)])
@pytest.mark.parametrize("ends", [{}, {"lower_order_final": False}, {"euler_at_final": True}], ids=str)
def test_stretches_are_diffusers_dpm_solver(kind: str, window: tuple, outside: int, ends: dict) -> None:
    """Each from its first step on, with the outputs of a model that says anything."""
    config = SD | KINDS[kind] | ends
    mixed = make_mixed_schedule(config, 25, 1.0, CPU, range(*window), outside, "dpm++")
    alphas = torch.tensor(levels(config, mixed), dtype=torch.float64).clamp(min=2.0**-24)
    generator = torch.Generator().manual_seed(0)
    before, _, after = stretches(mixed)
    assert len(before) + len(after) == (outside or 25 - len(range(*window)))
    for stretch in filter(None, (before, after)):
        last = stretch is after
        timesteps = mixed.timesteps[stretch.start : stretch.stop + (not last)]
        scheduler = DPMSolverMultistepScheduler(
            prediction_type=config.get("prediction_type", "epsilon"),
            final_sigmas_type="zero" if config.get("set_alpha_to_one") else "sigma_min",
            **ends,
        )
        scheduler.set_timesteps(timesteps=timesteps.tolist())
        ends_at = alphas[stretch.start : stretch.stop + 1]
        # Its formulas on levels that are not rounded; without noise where the last step leads to none.
        scheduler.sigmas = torch.sqrt((1 - ends_at) / ends_at)
        x, history = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64, generator=generator)
        history_terms = history.abs()
        for step, t in zip(stretch, timesteps, strict=False):
            output = torch.randn(x.shape, dtype=torch.float64, generator=generator)
            by_sample, by_output, sigma = mixed.tables[:, step].double()
            back, data_sample, data_output = mixed.solver[:, step].double()
            terms = by_sample * x, by_output * output, back * history
            assert sigma == 0
            theirs = scheduler.step(output, t, x).prev_sample
            # Coefficients are rounded once, and diffusers rounds the sample.
            bound = EPS32 * (sum(term.abs() for term in terms) + (by_sample * x).abs()) + EPS32 * x.abs() + 1e-12
            bound += back.abs() * EPS32 * history_terms  # whose coefficients were rounded too
            assert ((sum(terms) - theirs).abs() <= bound).all()
            history = data_sample * x + data_output * output
            history_terms = (data_sample * x).abs() + (data_output * output).abs()
            x = theirs


@kinds
def test_every_step_is_the_papers_closed_form(kind: str) -> None:
    """Algorithm 2 of arXiv 2211.01095 for one number, at every one of 1000 timesteps that there can be."""
    config = SD | KINDS[kind]
    count = 999  # with leading spacing the thousandth would begin beyond the model's timesteps
    mixed = make_mixed_schedule(config, count, 1.0, CPU, range(500, 503), 0, "dpm++")
    before, inside, after = stretches(mixed)
    ends = levels(config, mixed)
    ends[0] = max(ends[0], 2.0**-24)
    x, o, history = 0.8, -1.3, 0.4
    for step, (a_t, a_p) in enumerate(pairwise(ends)):
        if step in inside:
            continue
        r, s, r_p, s_p = math.sqrt(a_t), math.sqrt(1 - a_t), math.sqrt(a_p), math.sqrt(1 - a_p)
        x0 = r * x - s * o if config.get("prediction_type") else (x - s * o) / r
        first = step in (before.start, after.start) or (step == len(mixed) - 1 and a_p == 1)
        shrunk = s_p / s * r / r_p  # exp(-h)
        looked = x0
        if not first:
            a_b = ends[step - 1]
            h = math.log(r_p / s_p) - math.log(r / s)
            h_before = math.log(r / s) - math.log(math.sqrt(a_b) / math.sqrt(1 - a_b))
            looked = x0 + (x0 - history) * h / h_before / 2
        expected = s_p / s * x - r_p * (shrunk - 1) * looked
        coefficients = [*mixed.tables[:2, step].tolist(), mixed.solver[0, step].item()]
        ours = sum(c * each for c, each in zip(coefficients, (x, o, history), strict=True))
        size = sum(abs(c * each) for c, each in zip(coefficients, (x, o, history), strict=True))
        # Steps between neighbours are differences of levels near each other: float64 leaves 1e-16 / 1e-3 of each, and
        # x0 of an almost noisy latent is a hundredfold.
        assert abs(ours - expected) <= EPS32 * size + 1e-10 * abs(x0)
        data = mixed.solver[1:, step].tolist()
        assert data[0] * x + data[1] * o == pytest.approx(x0, abs=EPS32 * (abs(data[0] * x) + abs(data[1] * o)) + 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# A Gaussian of mean 0.7 and variance 0.3, noised: its score is known, and so is what every sampler makes of it

MEAN, VARIANCE = 0.7, 0.3


def marginal(a: float) -> tuple[float, float]:
    """Mean and variance at this level."""
    return math.sqrt(a) * MEAN, a * VARIANCE + 1 - a


def moments(config: dict, schedule: Schedule) -> list[tuple[float, float]]:
    """Mean and variance before every step and after the last, from exact ones before the first, in float64.

    The true model's output is linear in x, and so every step is linear in x and the x0 before it.
    """
    v = config.get("prediction_type") == "v_prediction"
    mean, variance = marginal(levels(config, schedule)[0])
    m, c = np.array([mean, 0.0]), np.array([[variance, 0.0], [0.0, 0.0]])
    found = [(mean, variance)]
    tables = schedule.tables.double().numpy()
    solver = np.zeros((3, len(schedule))) if schedule.solver is None else schedule.solver.double().numpy()
    for step, a in enumerate(levels(config, schedule)[:-1]):
        r, s = math.sqrt(a), math.sqrt(1 - a)
        at, spread_there = marginal(a)
        noise = s / spread_there, -s / spread_there * at  # E[eps | x] = slope * x + offset
        data = r * VARIANCE / spread_there, MEAN - r * VARIANCE / spread_there * at  # E[x0 | x]
        slope, offset = (r * e - s * d if v else e for e, d in zip(noise, data, strict=True))
        by_sample, by_output, sigma = tables[:, step]
        back, data_sample, data_output = solver[:, step]
        matrix = np.array([[by_sample + by_output * slope, back], [data_sample + data_output * slope, 0.0]])
        m = matrix @ m + offset * np.array([by_output, data_output])
        c = matrix @ c @ matrix.T + np.diag([sigma**2, 0.0])
        found.append((m[0], c[0, 0]))
    return found


def worst(config: dict, schedule: Schedule) -> float:
    """The largest distance of a mean or a variance from the analytic one, at any time."""
    wanted = [marginal(a) for a in levels(config, schedule)]
    return float(np.abs(np.array(moments(config, schedule)) - np.array(wanted)).max())


@kinds
def test_marginals_are_the_analytic_ones(kind: str) -> None:
    """Of the SDE and of mixed samplers, as steps become many: where there is noise, errors fall as steps rise.

    With DPM-Solver++ around the window three fifths of the steps come closer than all of them with noise.
    """
    config = SD | KINDS[kind]

    def mixed(steps: int, solver: str) -> Schedule:
        window = range(2 * steps // 5, 3 * steps // 5)
        return make_mixed_schedule(config, steps, 1.0, CPU, window, 2 * steps // 5, solver)

    errors = {}
    for steps in (100, 200, 400):
        made = make_schedule(config, steps, 1.0, CPU), mixed(steps, "ddim"), mixed(steps, "dpm++")
        errors[steps] = [worst(config, schedule) for schedule in made]
        assert errors[steps][2] < errors[steps][0]
    for coarse, fine in ((100, 200), (200, 400)):
        assert all(f < 0.75 * c for c, f in zip(errors[coarse], errors[fine], strict=True)), errors
    assert max(errors[400]) < 0.012


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_solver_is_of_second_order(kind: str) -> None:
    """Its error falls fourfold where the steps double, DDIM's twofold; the ODE's solution is the marginals' map."""
    config = SD | KINDS[kind]

    def error(solver: str, outside: int) -> float:
        schedule = make_mixed_schedule(config, 500, 1.0, CPU, range(480, 500), outside, solver)
        before, *_ = stretches(schedule)
        return float(np.abs(np.subtract(moments(config, schedule), [marginal(a) for a in levels(config, schedule)]))[
            before.stop
        ].max())  # fmt: skip

    for solver, order in (("ddim", 1), ("dpm++", 2)):
        errors = [error(solver, outside) for outside in (30, 60, 120)]
        for coarse, fine in pairwise(errors):
            assert 2 ** (order - 0.4) < coarse / fine < 2 ** (order + 0.4), (solver, errors)


# ---------------------------------------------------------------------------------------------------------------------
# Where steps are


def test_steps_outside_are_shared_out_in_proportion() -> None:
    assert share_out(20, 20, 10) == (5, 5)
    assert share_out(30, 10, 10) == (8, 2)
    assert share_out(1, 40, 5) == (1, 4)
    assert share_out(40, 1, 5) == (4, 1)
    assert share_out(0, 41, 5) == (0, 5)
    assert share_out(7, 0, 5) == (5, 0)
    assert share_out(7, 4, 0) == (7, 4)
    assert share_out(0, 0, 0) == (0, 0)
    for before in range(9):
        for after in range(9):
            for outside in range(2, before + after + 1):
                shares = share_out(before, after, outside)
                assert sum(shares) == outside
                for share, places in zip(shares, (before, after), strict=True):
                    assert (1 if places else 0) <= share <= places
                    chosen = spread(3, 3 + places, share)
                    assert chosen == sorted(set(chosen))
                    assert not chosen or (chosen[0] == 3 and chosen[-1] < 3 + places)


def test_the_schedule_is_of_as_many_steps_wherever_the_window_is() -> None:
    rollout = RolloutConfig(steps=20, stochastic="window", steps_outside=6, solver_outside="dpm++")
    config = TrainConfig(rollout=rollout, grpo=GrpoConfig(window=4, window_every=2, window_stride=5))
    first = rollout_schedule(SD, config, CPU)
    whole = make_schedule(SD, 20, 1.0, CPU)
    moving = rollout_schedule(SD, config, CPU)
    addresses = [t.data_ptr() for t in (moving.timesteps, moving.tables, moving.trainable, moving.solver)]
    for iteration, place in ((1, 0), (2, 0), (3, 5), (5, 10), (7, 15), (9, 0)):
        schedule = rollout_schedule(SD, config, CPU, iteration)
        assert len(schedule) == config.rollout_steps == 10
        learned = trained_steps(schedule, config.grpo, iteration)
        assert schedule.timesteps[learned].tolist() == whole.timesteps[place : place + 4].tolist()
        moving.become(schedule)
        for name in ("timesteps", "tables", "trainable", "solver"):
            assert torch.equal(getattr(moving, name), getattr(schedule, name))
    assert addresses == [t.data_ptr() for t in (moving.timesteps, moving.tables, moving.trainable, moving.solver)]
    assert torch.equal(moving.tables, first.tables)
