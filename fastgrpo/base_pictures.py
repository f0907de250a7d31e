"""What the base model draws for the positive prompts, seen by the reward's encoder: what training starts from.

Drawn once, before a checkpoint is loaded, and kept in the run's folder, so that a resumed run has the same bits:

    RUN/
      base.safetensors   features [N, K, D] float32, ids [N] int64
      base.json          what they were drawn with, the prompts, and the SHA-256 of base.safetensors, written last
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.models.hashes import weights_sha256
from fastgrpo.policy import Policy
from fastgrpo.rewards.axis.report import choose_prompts
from fastgrpo.rewards.encoder import SharedEncoder
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.finite import PictureSource
from fastgrpo.system.kept import Kept, keep, reusable
from fastgrpo.system.randomness import seed_for
from fastgrpo.types import POSITIVE, Prompt

MOST_PROMPTS = 384
PICTURES = 4
"""K, of each prompt: two say how far one prompt's pictures are apart, but how well they match it only roughly."""
STEM = "base"
"""Their files' name, without the suffixes, in the run's folder."""

_TOGETHER = 32  # prompts whose pictures are held at once; a constant, since the bits may depend on it


@dataclass(frozen=True)
class BasePictures:
    """The base model's pictures of N positive prompts, as features.

    ids: the N prompts' own ids, which are different. features: [N, K, D] float32 unit vectors of the reward's encoder,
    on its device. texts: [N, D], those of the prompts themselves.
    """

    ids: tuple[int, ...]
    features: Tensor
    texts: Tensor


def base_pictures(
    config: TrainConfig,
    policy: Policy,
    schedule: Schedule,
    encoder: SharedEncoder,
    prompts: Sequence[Prompt],
    run: Path | None,
    ranks: Ranks,
    say: Callable[[str], object],
) -> BasePictures:
    """The base model's pictures of at most 384 of the positive `prompts`, evenly spaced, K of each.

    policy: with the weights that training begins with. schedule: the first rollout's. encoder: the reward's.
    run: a claimed folder, where they are kept; where it has them already they are read, unless they were drawn
    otherwise or the files are damaged, which is said. None keeps nothing. ranks: each draws those of a share of the
    prompts; the first has the files.
    Raises BrokenPicture for a picture that is not finite, and OSError where the folder cannot be written.
    """
    chosen = [prompt for prompt in choose_prompts(prompts, MOST_PROMPTS) if prompt.label == POSITIVE]
    ids = tuple(prompt.id for prompt in chosen)
    if not chosen:
        return BasePictures((), torch.empty(0, PICTURES, 0), torch.empty(0, 0))
    texts = encoder.encode_text([prompt.text for prompt in chosen])
    nothing = texts.new_empty(0, PICTURES, texts.shape[-1])
    kept: Kept | None = None
    made_by: dict[str, Any] = {}
    if ranks.first and run:
        made_by = _made_by(config, policy, schedule, encoder, chosen)
        kept = reusable(run / STEM, made_by, "the base model's pictures", say)
    if ranks.any(kept is not None):
        return BasePictures(ids, ranks.gather(kept.tensors["features"].to(texts.device) if kept else nothing), texts)
    say(f"drawing {PICTURES} pictures of each of {len(chosen)} positive prompts with the base model")
    own = chosen[ranks.share(len(chosen))]
    features = ranks.gather(_draw(config, policy, schedule, encoder, own) if own else nothing)
    if ranks.first and run:
        keep(run / STEM, made_by, {"features": features, "ids": torch.tensor(ids)})
    return BasePictures(ids, features, texts)


def _draw(
    config: TrainConfig, policy: Policy, schedule: Schedule, encoder: SharedEncoder, prompts: Sequence[Prompt]
) -> Tensor:
    """[N, K, D] features of the pictures of N prompts."""
    rollout, features = config.rollout, []
    for start in range(0, len(prompts), _TOGETHER):
        drawn = [(prompt, k) for prompt in prompts[start : start + _TOGETHER] for k in range(PICTURES)]
        seeds = [seed_for(config.seed, prompt.id, f"base picture {k}") for prompt, k in drawn]
        sources = [PictureSource(f"the base model's picture {k + 1}", prompt.text) for prompt, k in drawn]
        # One text at a time, as in training: products of other sizes round otherwise.
        texts = [policy.encode([prompt.text]) for prompt in prompts[start : start + _TOGETHER]]
        embeds = torch.cat(texts).repeat_interleave(PICTURES, dim=0)
        # On CUDA no more than are decoded together: most of the memory is the training's.
        batch = rollout.batch or (len(seeds) if policy.device.type == "cpu" else rollout.decode_batch)
        images = draw_images(
            policy, embeds, schedule, rollout.guidance, seeds, batch, rollout.decode_batch, requests=sources
        )
        features.append(encoder.encode_image(images, config.reward.batch))
        encoder.forget_images()
    return torch.cat(features).unflatten(0, (len(prompts), PICTURES))


def _made_by(
    config: TrainConfig, policy: Policy, schedule: Schedule, encoder: SharedEncoder, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """All that the features depend on but for rounding, JSON-able."""
    rollout = config.rollout
    mixed = {"window": config.grpo.window, "solver_outside": rollout.solver_outside}
    return {
        "unet": weights_sha256(policy.unet),
        "encoder": weights_sha256(encoder.model),
        "steps": len(schedule),
        "eta": rollout.eta,
        **({"timesteps": schedule.timesteps.tolist(), **mixed} if schedule.windowed else {}),
        "guidance": rollout.guidance,
        "guidance_rescale": rollout.guidance_rescale,
        "seed": config.seed,
        "pictures": PICTURES,
        "prompts": [{"id": prompt.id, "text": prompt.text} for prompt in prompts],
    }
