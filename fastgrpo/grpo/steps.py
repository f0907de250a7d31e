"""Which denoising steps an iteration draws by and learns from: all but the last few, a share, or a sliding window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrpo.grpo.branches import tree_of
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


def sampler_line(config: TrainConfig) -> str:
    """What a rollout is drawn by, in one line."""
    rollout, window = config.rollout, config.grpo.window
    if rollout.stochastic == "all":
        return f"drawn in {rollout.steps} steps of DDIM with eta {rollout.eta:g}"
    solver = {"ddim": "DDIM", "dpm++": "DPM-Solver++(2M)"}[rollout.solver_outside]
    return (
        f"drawn in {config.rollout_steps} steps: {window} of DDIM with eta {rollout.eta:g}, which a window over "
        f"{rollout.steps} chooses, and {config.rollout_steps - window} of {solver} without noise around it"
    )


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
    return _per_iteration(config, schedule, ends=True)


def passes_per_iteration(config: TrainConfig, schedule: Schedule) -> int:
    """Counts the latents that these pairs start from: fewer where rollout.branches are learned from together."""
    return _per_iteration(config, schedule, ends=False)


def _per_iteration(config: TrainConfig, schedule: Schedule, ends: bool) -> int:
    grpo, tree = config.grpo, tree_of(schedule, config)
    steps = trained_steps(schedule, grpo, iteration=1).tolist()
    if tree:
        of_group = sum(tree.counts[step + ends] for step in steps)
    else:
        of_group = (grpo.best_of or config.group_size - 2 * grpo.trim) * chosen_steps(len(steps), grpo.step_fraction)
    return config.prompts_per_iteration * of_group * grpo.epochs


def drawn_per_iteration(scheduler_config: Mapping[str, Any], config: TrainConfig) -> int:
    """Counts the latents that a rollout's steps start from, the mean over all places of a sliding window.

    scheduler_config: as of `make_schedule`.
    """
    grpo, cpu = config.grpo, torch.device("cpu")
    whole = rollout_schedule(scheduler_config, config, cpu)
    if not config.rollout.branches:
        return config.prompts_per_iteration * config.group_size * len(whole)
    slides = whole.windowed
    last = config.rollout.steps - grpo.drop_last_steps - grpo.window if slides else 0
    places = len(range(0, last, grpo.window_stride)) + 1
    found = []
    for place in range(places):
        schedule = rollout_schedule(scheduler_config, config, cpu, 1 + place * grpo.window_every)
        tree = tree_of(schedule, config)
        assert tree is not None
        found.append(tree.denoised)
    return round(config.prompts_per_iteration * sum(found) / len(found))
