"""The way from an iteration to its arithmetic is short enough to be read."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fastgrpo
from fastgrpo.assembly import load_training
from fastgrpo.engine import sampler
from fastgrpo.grpo import loss
from fastgrpo.settings.command_line import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from support.graph_stand_in import imitated
from support.training import altered

OURS = Path(fastgrpo.__file__).parent
MOST = 6


def own_frames(frame: FrameType | None) -> list[str]:
    """Our functions that are being called, the innermost first; operators and their parts do not count."""
    names = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(OURS) and not file.is_relative_to(OURS / "kernels"):
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return names


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[tuple[str, ...]]]]:
    """What is called -> our stacks that called it; a worker's goes on with the stack that handed over to it."""
    found: dict[str, set[tuple[str, ...]]] = {}
    handed: list[list[str]] = [[]]

    def seen(name: str, frame: FrameType) -> None:
        own = own_frames(frame)
        found.setdefault(name, set()).add(tuple(own if "iterate" in own else [*own, *handed[-1]]))

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*args: Any, **options: Any) -> Any:
            seen(name, sys._getframe())
            return call(*args, **options)

        return calling

    submit = ThreadPoolExecutor.submit

    def submitting(self: ThreadPoolExecutor, *args: Any, **options: Any) -> Any:
        handed.append(own_frames(sys._getframe()))
        return submit(self, *args, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submitting)
    for module, name in ((sampler, "ddim_step"), (loss, "grpo_step")):
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: seen("UNet", sys._getframe()) if type(module).__name__ == "UNet2DConditionModel" else None
    )
    yield found
    hook.remove()


@pytest.mark.parametrize(
    ("changes", "threads", "captured"),
    [
        ({}, 1, False),
        ({}, 2, False),
        ({"engine.reuse": "on", "rollout.initial_noise": "shared"}, 2, False),
        ({"engine.graphs": "on"}, 1, False),
        ({"engine.graphs": "on"}, 1, True),
    ],
    ids=["plain", "workers", "shared first step", "fixed shapes", "graphs"],
)
def test_six_frames_from_an_iteration_to_its_arithmetic(
    config_file: Path,
    stacks: dict[str, set[tuple[str, ...]]],
    changes: dict[str, object],
    threads: int,
    captured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph's replay calls nothing of ours at all: those that are imitated are looked at in the second iteration."""
    config = altered(load_toml(config_file), {"grpo.std_floor": 1e-9, "micro_batch": 3} | changes)
    training = load_training(config, threads, say=lambda line: None)
    stacks.clear()
    if captured:
        training.engine._capture, training.engine._pool = True, (0, 1000)
    with imitated(monkeypatch) if captured else nullcontext():
        for iteration in (1, 2) if captured else (1,):
            stacks.clear()
            iterate(training, iteration, Console())
    assert stacks.keys() == (set() if captured else {"ddim_step", "grpo_step", "UNet"})
    for name, found in stacks.items():
        for stack in found:
            assert stack[-1] == "iterate"
            assert len(stack) <= MOST, f"{name} is called by {' < '.join(stack)}"
