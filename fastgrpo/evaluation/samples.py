"""Picture grids in RUN/samples: the same prompts and seeds before, during and after training, one row a prompt.

The grids are before.png, iter-000010.png, ..., after.png and before_after.png; prompts.json has the prompts of their
rows, from the top.
"""

import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image

from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.evaluation.results.before_after import AFTER, BEFORE
from fastgrpo.evaluation.results.summary import PROMPTS_FILE
from fastgrpo.policy import Policy
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import DDIM
from fastgrpo.system import pictures
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.files import write_atomically
from fastgrpo.system.finite import PictureSource
from fastgrpo.system.randomness import seed_for
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

BEFORE_AFTER = "before_after"  # the grid of both
PICTURES_PER_PROMPT = 4
PROMPTS_PER_LABEL = 4  # that are pictured, where no suite says which


class SampleGrids:
    """Draws a run's grids. settings: what one policy's grid and held-out reward depend on, JSON-able.

    All processes are to draw, each a share; the first writes.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        policy: Policy,
        schedule: Schedule,
        prompts: tuple[Prompt, ...],
        held_out: HeldOutReward | None,
        console: Console,
        ranks: Ranks,
    ) -> None:
        """prompts: one for each row. held_out: measures the pictures, where there is one."""
        self._folder, self._config, self._policy, self._schedule = run / "samples", config, policy, schedule
        self._prompts, self._held_out, self._console, self._ranks = prompts, held_out, console, ranks
        rollout = config.rollout
        drawing = {"sampler": DDIM, "steps": len(schedule), "eta": rollout.eta, "guidance": rollout.guidance}
        if rollout.guidance_rescale:
            drawing["guidance_rescale"] = rollout.guidance_rescale
        pictured = {"pictured": [prompt.text for prompt in prompts]}
        self.settings = drawing | {"seed": config.eval.seed, "encoder": config.eval.encoder} | pictured
        if not ranks.first:
            return
        self._folder.mkdir(exist_ok=True)
        text = json.dumps([dataclasses.asdict(prompt) for prompt in prompts], indent=1, ensure_ascii=False)
        write_atomically(self._folder / PROMPTS_FILE, f"{text}\n".encode())

    def file(self, name: str) -> Path:
        """Where a grid is, or will be."""
        return self._folder / f"{name}.png"

    def draw(self, name: str) -> dict[str, float]:
        """Draw a grid with the policy as it is. Returns eval/held_out_* of its pictures, where they are measured."""
        drawn = [(prompt, k) for prompt in self._prompts for k in range(PICTURES_PER_PROMPT)]
        seeds = [seed_for(self._config.eval.seed, p.id, f"picture {k} of a {p.label} prompt") for p, k in drawn]
        requests = [PictureSource(f"{name}.png, picture {k + 1}", p.text) for p, k in drawn]
        policy, rollout, own = self._policy, self._config.rollout, self._ranks.share(len(drawn))
        # On CUDA no more than are decoded together: most of the memory is the training's.
        batch = rollout.batch or (len(seeds) if policy.device.type == "cpu" else rollout.decode_batch)
        with self._console.bar("pictures"), torch.no_grad():
            embeds = policy.encode([prompt.text for prompt in self._prompts])
            embeds = embeds.repeat_interleave(PICTURES_PER_PROMPT, dim=0)
            how = self._schedule, rollout.guidance, seeds[own], batch, rollout.decode_batch
            images = self._ranks.gather(draw_images(policy, embeds[own], *how, requests=requests[own]))
        if self._ranks.first:
            pictures.write_png(self.file(name), pictures.grid(images, self._prompts))
        return self._held_out(images, self._prompts, PICTURES_PER_PROMPT, self._ranks) if self._held_out else {}

    def join(self) -> None:
        """Put the grids before and after training side by side."""
        with Image.open(self.file(BEFORE)) as before, Image.open(self.file(AFTER)) as after:
            pictures.write_png(self.file(BEFORE_AFTER), pictures.side_by_side(before, after))


def first_of_each_label(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    """Some positive and some negative prompts."""
    positive, negative = ([p for p in prompts if p.label == label] for label in (POSITIVE, NEGATIVE))
    return (*positive[:PROMPTS_PER_LABEL], *negative[:PROMPTS_PER_LABEL])
