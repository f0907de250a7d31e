"""Long trainings that can be stopped and go on: an optimizer, a moving average, and snapshots of both."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.system.console import Console
from fastgrpo.system.errors import ConfigError

SNAPSHOT_EVERY = 200  # steps


class Stage:
    """One stage's optimization: AdamW under a one-cycle schedule, gradients clipped to a norm of 1.

    What a step draws at random comes from its own number (`random`), so a stage that goes on from a snapshot does what
    it would have done without the stop, bit for bit on the same machine.
    """

    def __init__(
        self,
        module: nn.Module,
        snapshot: Path,
        steps: int,
        lr: float,
        seed: int,
        weight_decay: float = 1e-3,
        averaged: bool = False,
        made_with: str = "",
    ) -> None:
        """snapshot: a file to go on from, if it is there. averaged: keep `average`, a moving average of the module.

        made_with: all settings that the snapshot depends on. Raises ConfigError for a snapshot made with others.
        """
        self._module, self._file, self._steps, self._seed = module, snapshot, steps, seed
        self._made_with = made_with
        self._parameters: list[Tensor] = list(module.parameters())
        self._adam = torch.optim.AdamW(self._parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._adam, lr, total_steps=steps + 1, pct_start=0.04)
        self.average = copy.deepcopy(module).requires_grad_(False) if averaged else None
        self._done = 0
        self._running: dict[str, float] = {}
        if snapshot.exists():
            self._load()

    @property
    def measured(self) -> dict[str, float]:
        """Moving averages of what `step` was told."""
        return dict(self._running)

    def steps(self, what: str) -> Iterator[int]:
        """The numbers of the steps that are left."""
        with Console().bar(what, self._steps) as bar:
            bar.advance(self._done)
            while self._done < self._steps:
                yield self._done
                bar.advance(1)

    def random(self, step: int) -> tuple[np.random.Generator, torch.Generator]:
        """What a step draws from."""
        seed = int(np.random.SeedSequence((self._seed, step)).generate_state(1)[0])
        return np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def step(self, loss: Tensor, **measured: float) -> None:
        """Backward, one optimizer step, and a snapshot when it is time."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._schedule.step()
        if self.average is not None:
            decay = min(0.998, (1 + self._done) / (10 + self._done))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), self._parameters, 1 - decay)
        self._done += 1
        for name, value in (measured | {"loss": loss.item()}).items():
            self._running[name] = value + 0.99 * (self._running.get(name, value) - value)
        if self._done % 100 == 0:
            print(f"step {self._done}: {', '.join(f'{k} {v:.4f}' for k, v in self._running.items())}", flush=True)
        if self._done % SNAPSHOT_EVERY == 0 and self._done < self._steps:
            self._save()

    def _save(self) -> None:
        state = {
            "module": self._module.state_dict(),
            "adam": self._adam.state_dict(),
            "schedule": {k: v for k, v in self._schedule.state_dict().items() if not callable(v)},
            "average": self.average.state_dict() if self.average is not None else None,
            "done": self._done,
            "made_with": self._made_with,
            "running": self._running,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, self._file)

    def _load(self) -> None:
        state = torch.load(self._file, weights_only=True)
        if state["made_with"] != self._made_with:
            raise ConfigError(
                f"{self._file} is of a pretraining with other settings; accepted are those, or the file's removal."
            )
        self._module.load_state_dict(state["module"])
        self._adam.load_state_dict(state["adam"])
        self._schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._done, self._running = state["done"], state["running"]
