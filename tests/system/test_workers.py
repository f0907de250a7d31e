"""Several workers do the same arithmetic as one: same results, in the same order, with the same gradient mode."""

import threading
from dataclasses import replace

import pytest
import torch

from fastgrpo.system.workers import Workers
from support.update import CONFIG, REWARDS, Scene


def test_map_keeps_order_and_raises():
    workers = Workers(3)
    first_may_end = threading.Event()

    def call(item):
        if item == 0:
            assert first_may_end.wait(10)  # only a second worker can set it
        first_may_end.set()
        return item * item

    assert list(workers.map(call, range(5))) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        list(workers.map(lambda item: 1 / item, [1, 0]))


@pytest.mark.parametrize("count", [1, 2])
def test_workers_take_over_the_callers_gradient_mode(count):
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert not any(y.requires_grad for y in Workers(count).map(lambda x: weight * x, [1, 2, 3]))
    assert all(y.requires_grad for y in Workers(count).map(lambda x: weight * x, [1, 2, 3]))


def test_several_workers_learn_exactly_what_one_does(tiny_pipeline):
    """Same micro-batches, gradients added in the same order: not a bit may differ, whichever worker is first."""
    config = replace(CONFIG, micro_batch=3, grpo=replace(CONFIG.grpo, kl=0.1, old_log_prob="replay"))
    gradients = []
    for count in (1, 3):
        scene = Scene(tiny_pipeline)
        base = scene.policy.unet
        scene.policy = replace(scene.policy, workers=Workers(count))
        gradients.append(scene.update(config, REWARDS, base=base)[1][0])
    assert torch.equal(*gradients)
