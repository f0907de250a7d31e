"""Which denoising steps an iteration draws by and learns from: all but the last few, a share, or a sliding window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrpo.schedule import Schedule, make_mixed_schedule, make_schedule
from fastgrpo.settings.schema import GrpoConfig, TrainConfig, chosen_steps
from fastgrpo.system.errors import ConfigError


def rollout_schedule(
    scheduler_config: Mapping[str, Any], config: TrainConfig, device: torch.device, iteration: int = 1
) -> Schedule:
    """The steps that iteration number `iteration` draws by: the same in all of them, unless rollout.stochastic slides.

    scheduler_config: as of `make_schedule`. Then there are equally many in every iteration.
    Raises ConfigError for a scheduler's config or a setting with which none could be trained.
    """
    rollout = config.rollout
    given = scheduler_config, rollout.steps, rollout.eta
    whole = make_schedule(*given, device, guidance_rescale=rollout.guidance_rescale)
    if rollout.stochastic == "all":
        return whole
    learned = trained_steps(whole, config.grpo, iteration)
    window = range(int(learned[0]), int(learned[-1]) + 1)
    outside, solver = rollout.steps_outside, rollout.solver_outside
    return make_mixed_schedule(*given, device, window, outside, solver, rollout.guidance_rescale)


def trained_steps(schedule: Schedule, config: GrpoConfig, iteration: int) -> Tensor:
    """[S] int64 on the CPU, ascending: the positions in the schedule that iteration number `iteration` may learn from.

    Those with noise, without the last `drop_last_steps`; of them, with a `window`, the neighbours inside it. Of a
    windowed schedule, which is one iteration's own, all with noise.
    Raises ConfigError when none is left.
    """
    if schedule.windowed:
        return schedule.trainable.nonzero().flatten()
    steps = schedule.trainable[: max(len(schedule) - config.drop_last_steps, 0)].nonzero().flatten()
    if not len(steps):
        raise ConfigError(
            f"grpo.drop_last_steps is {config.drop_last_steps}, which leaves none of the {len(schedule)} rollout.steps "
            "to train on; a smaller number is accepted"
        )
    if not config.window:
        return steps
    start = window_start(len(steps), config, iteration)
    return steps[start : start + config.window]


def window_start(count: int, config: GrpoConfig, iteration: int) -> int:
    """Where the window begins among `count` steps: every `window_every` iterations it moves by `window_stride`.

    The last place is always visited, even if the stride does not divide the way; then it begins again at 0.
    """
    last = max(count - config.window, 0)
    places = [*range(0, last, config.window_stride), last]
    return places[(iteration - 1) // config.window_every % len(places)]


def steps_of_samples(steps: Tensor, samples: int, fraction: float, generator: torch.Generator) -> Tensor:
    """[samples, K] int64: for each sample K = chosen_steps(len(steps), fraction) different ones of `steps`, ascending.

    DanceGRPO (arXiv 2505.07818, section 3.3) trains on such a share. Nothing is drawn where K is all of the steps.
    """
    count = chosen_steps(len(steps), fraction)
    if count == len(steps):
        return steps.expand(samples, -1)
    drawn = torch.rand(samples, len(steps), generator=generator).argsort(dim=1)[:, :count]
    return steps[drawn.sort(dim=1).values]


def pairs_per_iteration(config: TrainConfig, schedule: Schedule) -> int:
    """Counts the pairs that an iteration learns from, all epochs together. Raises ConfigError where there is none."""
    grpo = config.grpo
    samples = config.prompts_per_iteration * (grpo.best_of or config.group_size - 2 * grpo.trim)
    steps = chosen_steps(len(trained_steps(schedule, grpo, iteration=1)), grpo.step_fraction)
    return samples * steps * grpo.epochs
