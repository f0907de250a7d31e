"""A stage of pretraining that was stopped goes on as if it had not been."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.shapes_lab import optimization
from fastgrpo.shapes_lab.optimization import Stage

STEPS = 11


def made(snapshot: Path) -> tuple[nn.Module, Stage]:
    """A small module with buffers, and its stage."""
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 2)).train()
    return module, Stage(module, snapshot, STEPS, 1e-2, seed=9, weight_decay=0.1, averaged=True)


def trained(snapshot: Path, stop_before: int | None = None) -> tuple[dict[str, Tensor], list[int]]:
    """All state after the last step, and the numbers of the steps taken; or stopped before some step."""
    module, stage = made(snapshot)
    taken = []
    for step in stage.steps("test"):
        if step == stop_before:
            break
        rng, generator = stage.random(step)
        x = torch.randn(8, 5, generator=generator) * float(rng.uniform(0.5, 2))
        stage.step((module(x) - x[:, :2]).square().mean(), accuracy=float(step))
        taken.append(step)
    average = {f"average.{name}": tensor for name, tensor in stage.average.state_dict().items()}
    return module.state_dict() | average | {k: torch.tensor(v) for k, v in stage.measured.items()}, taken


def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "SNAPSHOT_EVERY", 3)
    whole, taken = trained(tmp_path / "whole.pt")
    assert taken == list(range(STEPS))
    cut = tmp_path / "cut.pt"
    _, first = trained(cut, stop_before=5)
    _, second = trained(cut, stop_before=7)
    resumed, third = trained(cut)
    assert (first, second, third) == ([0, 1, 2, 3, 4], [3, 4, 5, 6], [6, 7, 8, 9, 10])
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_every_step_and_every_seed_draws_something_else(tmp_path: Path) -> None:
    def drawn(seed: int, step: int) -> tuple[float, float]:
        rng, generator = Stage(nn.Linear(1, 1), tmp_path / "none.pt", 3, 1e-3, seed).random(step)
        return float(rng.random()), torch.rand((), generator=generator).item()

    each = [drawn(seed, step) for seed in (1, 2) for step in (0, 1, 2)]
    assert each == [drawn(seed, step) for seed in (1, 2) for step in (0, 1, 2)]
    assert len({a for a, _ in each}) == len({b for _, b in each}) == 6


def test_it_is_adamw_under_one_cycle_with_clipped_gradients(tmp_path: Path) -> None:
    """Against torch's own, step by step, and the average against its recursion."""
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(module)
    stage = Stage(module, tmp_path / "none.pt", STEPS, 1e-2, seed=9, weight_decay=0.1, averaged=True)
    adam = torch.optim.AdamW(twin.parameters(), 1e-2, (0.9, 0.98), weight_decay=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, total_steps=STEPS + 1, pct_start=0.04)
    average = [p.detach().clone() for p in twin.parameters()]
    for step in stage.steps("test"):
        _, generator = stage.random(step)
        x = 100 * torch.randn(8, 5, generator=generator, dtype=torch.float64)  # gradients beyond a norm of 1
        stage.step(module(x).square().sum())
        adam.zero_grad()
        twin(x).square().sum().backward()
        norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt().item()
        for parameter in twin.parameters():
            parameter.grad *= min(1.0, 1 / norm)
        adam.step()
        cycle.step()
        decay = min(0.998, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, twin.parameters(), strict=True)]
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    for one, exact in zip(stage.average.parameters(), average, strict=True):
        assert torch.allclose(one, exact, rtol=0, atol=1e-12)
