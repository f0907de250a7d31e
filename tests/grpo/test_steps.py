"""Which steps of a sample are trained."""

import json
from dataclasses import replace

import torch

from fastgrpo.grpo.steps import steps_of_samples, trained_steps, window_start
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import GrpoConfig


def test_window_slides_over_the_steps_and_begins_again(tiny_pipeline):
    grpo = GrpoConfig(drop_last_steps=1, window=3, window_every=2, window_stride=3)
    # Of 8 steps 7 are trainable: places 0, 3 and the last possible, 4, two iterations each.
    assert [window_start(7, grpo, i) for i in range(1, 9)] == [0, 0, 3, 3, 4, 4, 0, 0]
    scheduler = json.loads((tiny_pipeline / "scheduler" / "scheduler_config.json").read_text())
    schedule = make_schedule(scheduler, 8, 1.0, torch.device("cpu"))
    assert trained_steps(schedule, grpo, 3).tolist() == [3, 4, 5]
    assert trained_steps(schedule, replace(grpo, window=7), 9).tolist() == list(range(7))


def test_a_fraction_of_steps_is_drawn_for_each_sample():
    steps = torch.tensor([0, 1, 2, 3, 5, 8])
    drawn = steps_of_samples(steps, 2000, 0.5, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 3)
    assert (drawn.diff(dim=1) > 0).all(), "three different steps, in order"
    counts = (drawn[..., None] == steps).sum(dim=(0, 1))
    # Each step is drawn by half of 2000 samples: binomial, std 22; 5 std.
    assert ((counts - 1000).abs() <= 112).all()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert torch.equal(steps_of_samples(steps, 4, 1.0, generator), steps.expand(4, -1))
    assert torch.equal(generator.get_state(), state), "nothing is drawn where nothing is left out"
