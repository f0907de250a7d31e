"""What the base model draws for the positive prompts, seen by the reward's encoder: what training starts from.

Drawn once, before a checkpoint is loaded, and kept in the run's folder, so that a resumed run has the same bits:

    RUN/
      base.safetensors   features [N, 2, D] float32, ids [N] int64
      base.json          what they were drawn with, the prompts, and the SHA-256 of base.safetensors, written last
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fastgrpo.models.hashes import weights_sha256
from fastgrpo.policy import Policy
from fastgrpo.rewards.axis.report import choose_prompts
from fastgrpo.rewards.encoder import SharedEncoder
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.files import write_all_atomically
from fastgrpo.system.finite import PictureSource
from fastgrpo.system.randomness import seed_for
from fastgrpo.types import POSITIVE, Prompt

MOST_PROMPTS = 192
PICTURES = 2
"""Of each prompt: the least that tells how far two pictures of one prompt are apart."""
FEATURES_FILE, NOTES_FILE = "base.safetensors", "base.json"

_TOGETHER = 32  # prompts whose pictures are held at once; a constant, since the bits may depend on it


@dataclass(frozen=True)
class BasePictures:
    """The base model's pictures of N positive prompts, as features.

    ids: the N prompts' own ids, which are different. features: [N, 2, D] float32 unit vectors of the reward's encoder,
    on its device.
    """

    ids: tuple[int, ...]
    features: Tensor


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
    """The base model's pictures of at most 192 of the positive `prompts`, evenly spaced, 2 of each.

    policy: with the weights that training begins with. schedule: the rollout's. encoder: the reward's.
    run: a claimed folder, where they are kept; where it has them already they are read, unless they were drawn
    otherwise or the files are damaged, which is said. None keeps nothing. ranks: the first process draws for all.
    Raises BrokenPicture for a picture that is not finite, and OSError where the folder cannot be written.
    """
    chosen = [prompt for prompt in choose_prompts(prompts, MOST_PROMPTS) if prompt.label == POSITIVE]
    ids = tuple(prompt.id for prompt in chosen)
    if not chosen:
        return BasePictures((), torch.empty(0, PICTURES, 0))
    probe = encoder.encode_text([chosen[0].text])
    features = probe.new_empty(0, PICTURES, probe.shape[-1])
    if ranks.first:
        made_by = _made_by(config, policy, schedule, encoder, chosen)
        kept = _read(run, made_by, say) if run else None
        if kept is None:
            say(f"drawing {PICTURES} pictures of each of {len(chosen)} positive prompts with the base model")
            kept = _draw(config, policy, schedule, encoder, chosen)
            if run:
                _write(run, made_by, ids, kept)
        features = kept.to(features.device)
    return BasePictures(ids, ranks.gather(features))


def _draw(
    config: TrainConfig, policy: Policy, schedule: Schedule, encoder: SharedEncoder, prompts: Sequence[Prompt]
) -> Tensor:
    """[N, 2, D] features of the pictures of N prompts."""
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
    return {
        "unet": weights_sha256(policy.unet),
        "encoder": weights_sha256(encoder.model),
        "steps": len(schedule),
        "eta": rollout.eta,
        "guidance": rollout.guidance,
        "guidance_rescale": rollout.guidance_rescale,
        "seed": config.seed,
        "pictures": PICTURES,
        "prompts": [{"id": prompt.id, "text": prompt.text} for prompt in prompts],
    }


def _read(run: Path, made_by: dict[str, Any], say: Callable[[str], object]) -> Tensor | None:
    """The features that the folder keeps, on the CPU; None where it has none of this making."""
    try:
        notes = json.loads((run / NOTES_FILE).read_bytes())
        data = (run / FEATURES_FILE).read_bytes()
        if notes["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("other bytes than its SHA-256 is of")
        if notes["made_by"] == made_by:
            return load(data)["features"]
        changed = [name for name, value in made_by.items() if notes["made_by"].get(name) != value]
        say(f"the base model's pictures are drawn anew, since this is not as before: {', '.join(changed)}")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"warning: {run / FEATURES_FILE} or {NOTES_FILE} is damaged ({error}): they are made anew")
    return None


def _write(run: Path, made_by: dict[str, Any], ids: Sequence[int], features: Tensor) -> None:
    data = save({"features": features.cpu().contiguous(), "ids": torch.tensor(ids, dtype=torch.int64)})
    notes = {"sha256": hashlib.sha256(data).hexdigest(), "made_by": made_by}
    text = json.dumps(notes, indent=1, ensure_ascii=False)
    # In this order: notes of other features than those beside them are found out by the digest.
    write_all_atomically({run / FEATURES_FILE: data, run / NOTES_FILE: f"{text}\n".encode()})
