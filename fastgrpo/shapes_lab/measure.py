"""`python -m fastgrpo.shapes_lab.measure`: how good the shipped weights and the oracle are, as JSON.

It measures the oracle's precision and recall per class on fresh pictures, as they are, noisy, blurred and after a round
trip through the VAE; and of both encoders the choice between a true caption and one altered in a detail, between a
correct and a wrong picture that the model drew, and between a safe and an unsafe one, and where captions lie on the
safety axis. How often the base model is unsafe or right is in the before-evaluation of any run of the trainer.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgrpo.models.check import SHAPES_PIPELINE
from fastgrpo.policy import Policy, load_policy
from fastgrpo.rewards.anchors import ANCHORS, load_anchors
from fastgrpo.rewards.encoder import OpenClipEncoder, SharedEncoder, load_encoder
from fastgrpo.rewards.steering import SteeringReward, safety_direction
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes import oracle
from fastgrpo.shapes.captions import training_prompts
from fastgrpo.shapes.verdicts import shows, verdict_on
from fastgrpo.shapes.world import COLORS, GLYPHS, SHAPES, Scene
from fastgrpo.shapes_lab.drawings import CaptionedPictures, alter, blur, caption, paint_pictures, to_unit
from fastgrpo.system.console import run_command
from fastgrpo.system.errors import ConfigError, flag, require_at_least
from fastgrpo.system.workers import available_cores
from fastgrpo.types import Prompt

_GROUP = 16  # pictures drawn for a prompt
_PARTS = ("pipeline", "encoder", "held_out")


@dataclass(frozen=True)
class MeasureConfig:
    """Measure the oracle and the shipped weights."""

    weights: Path = SHAPES_PIPELINE.parent
    """Folder with pipeline/, encoder/ and held_out/, as pretraining writes it."""
    pictures: int = 2000
    """Freshly painted pictures."""
    prompts: int = 20
    """Training prompts of each task, and of each hazard category that preset `shapes` trains, to draw for."""
    seed: int = 900
    """Seed of the pictures; none of pretraining's."""


def measure(config: MeasureConfig) -> dict[str, object]:
    """What `main` prints. Raises ConfigError before anything is loaded."""
    for field in ("pictures", "prompts"):
        require_at_least(1, flag(field), getattr(config, field))
    for part in _PARTS:
        if not (config.weights / part).is_dir():
            accepted = ", ".join(f"{name}/" for name in _PARTS)
            raise ConfigError(
                f"--weights {config.weights}: there is no {part}/ in it; accepted is a folder of {accepted}."
            )
    model = ModelConfig(path=str(config.weights / "pipeline"))
    policy = load_policy(model, torch.device("cpu"), torch.float32, available_cores())
    encoders = {name: load_encoder(f"local-dir:{config.weights / name}", torch.device("cpu")) for name in _PARTS[1:]}
    pictures = paint_pictures(config.pictures, config.seed)
    images = to_unit(pictures.images)
    versions = distortions(images) | {"vae": round_trip(policy, images)}
    drawn = draw_groups(policy, config.prompts)
    return {
        "pictures": config.pictures,
        "seed": config.seed,
        "oracle": {name: oracle_quality(version, pictures.scenes) for name, version in versions.items()},
        "encoders": {
            name: encoder_quality(encoder, versions["vae"], pictures, config.seed)
            | {"prefers_in_group": teacher_quality(encoder, drawn)}
            for name, encoder in encoders.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 refused."""

    def command() -> None:
        arguments = sys.argv[1:] if argv is None else argv
        config = parse_flags(MeasureConfig, arguments, "python -m fastgrpo.shapes_lab.measure")
        print(json.dumps(measure(config), indent=2))

    return run_command(command, "nothing was measured")


def distortions(images: Tensor) -> dict[str, Tensor]:
    """The pictures as they are, with Gaussian noise of std 0.05, and blurred by a 3 x 3 binomial kernel."""
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return {"clean": images, "noise": (images + noise).clamp(0, 1), "blur": blur(images)}


@torch.no_grad()
def round_trip(policy: Policy, images: Tensor) -> Tensor:
    """The pictures encoded and decoded by the policy's VAE."""
    latents = [policy.vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in images.split(256)]
    return policy.decode(torch.cat(latents) * policy.vae.config.scaling_factor)


def oracle_quality(images: Tensor, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Precision and recall of what the oracle reads, by class; hits are counted per picture and class."""
    readings = oracle.read(images)
    quality = {}
    for kind, names, classes in _CLASSES:
        found, true = ([Counter(classes(scene)) for scene in some] for some in (readings, scenes))
        for name in names:
            hits = sum(min(f[name], t[name]) for f, t in zip(found, true, strict=True))
            claimed, present = sum(f[name] for f in found), sum(t[name] for t in true)
            quality[f"{kind} {name}"] = {
                "precision": round(hits / max(1, claimed), 4),
                "recall": round(hits / max(1, present), 4),
                "n": present,
            }
    return quality


_CLASSES: tuple[tuple[str, Sequence[str], Callable[[Scene], list[str]]], ...] = (
    ("shape", SHAPES, lambda scene: [o.shape for o in scene.objects]),
    ("color", tuple(COLORS), lambda scene: [o.color for o in scene.objects]),
    ("hazard", tuple(GLYPHS), lambda scene: [h.category for h in scene.hazards]),
    ("any", ("hazard",), lambda scene: ["hazard"] * bool(scene.hazards)),
)


def encoder_quality(
    encoder: OpenClipEncoder, images: Tensor, pictures: CaptionedPictures, seed: int
) -> dict[str, float]:
    """How often the encoder prefers a caption to an altered one, and how well the axis tells hazards apart (AUC)."""
    rng = np.random.default_rng(seed)
    image = encoder.encode_image(images)
    altered = [alter(request, rng) for request in pictures.requests]
    true_text = encoder.encode_text([caption(r, rng) for r in pictures.requests])
    false_text = encoder.encode_text([caption(r, rng) for r in altered])
    better = ((image * true_text).sum(-1) > (image * false_text).sum(-1)).cpu().numpy()
    wrong = np.array([not shows(s, r) for s, r in zip(pictures.scenes, altered, strict=True)])
    axis = safety_direction(encoder, ANCHORS["shapes"])
    unsafe = np.array([bool(scene.hazards) for scene in pictures.scenes])
    place, text_place = (image @ axis).cpu().numpy(), (true_text @ axis).cpu().numpy()
    relation = wrong & np.array([r.relation is not None for r in pictures.requests])
    counted = wrong & np.array([r.count > 1 for r in pictures.requests])
    return {
        "prefers_true_caption": round(float(better[wrong].mean()), 4),
        "prefers_true_caption_position": round(float(better[relation].mean()), 4),
        "prefers_true_caption_counting": round(float(better[counted].mean()), 4),
        "image_axis_auc": round(_auc(place[~unsafe], place[unsafe]), 4),
        "image_axis_mean_safe": round(float(place[~unsafe].mean()), 4),
        "image_axis_mean_unsafe": round(float(place[unsafe].mean()), 4),
        "text_axis_mean_safe": round(float(text_place[~unsafe].mean()), 4),
        "text_axis_mean_unsafe": round(float(text_place[unsafe].mean()), 4),
    }


@dataclass(frozen=True)
class DrawnGroups:
    """P training prompts, and _GROUP pictures [P, _GROUP, 3, 32, 32] float32 in [0, 1] for each.

    good: [P, _GROUP] bool, whether a positive prompt's picture is correct, and a negative one's is safe.
    """

    prompts: tuple[Prompt, ...]
    images: Tensor
    good: np.ndarray


def draw_groups(policy: Policy, count: int) -> DrawnGroups:
    """The policy's own pictures for `count` prompts of each task and trained category, drawn as by preset `shapes`."""
    preset = load_toml(find_preset("shapes"))
    positives, negatives = training_prompts(preset.prompts.categories)
    prompts = (*_spread(positives, count), *_spread(negatives, count))
    rollout = preset.rollout
    schedule = make_schedule(policy.scheduler_config, rollout.steps, rollout.eta, policy.device)
    each = [prompt for prompt in prompts for _ in range(_GROUP)]
    embeds = policy.encode([prompt.text for prompt in prompts]).repeat_interleave(_GROUP, 0)
    images = draw_images(policy, embeds, schedule, rollout.guidance, range(len(each)))
    verdicts = [verdict_on(scene, prompt) for scene, prompt in zip(oracle.read(images), each, strict=True)]
    good = np.array([not v.unsafe if v.correct is None else v.correct for v in verdicts])
    return DrawnGroups(prompts, images.unflatten(0, (-1, _GROUP)), good.reshape(-1, _GROUP))


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of each category's prompts, evenly spaced, or all where there are fewer."""
    chosen = []
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.category == category]
        some = min(count, len(own))
        chosen += [own[i * len(own) // some] for i in range(some)]
    return chosen


def teacher_quality(encoder: OpenClipEncoder, drawn: DrawnGroups) -> dict[str, dict[str, float | int | None]]:
    """How often preset `shapes`' reward puts a good picture above another of its group, by task and hazard category.

    pairs: of a good and another picture of one prompt. preferred: the share of them in which the good one has the
    larger reward; None where there are none. For positive prompts the reward is unsteered, for negative ones steered.
    """
    config = load_toml(find_preset("shapes")).reward
    reward = SteeringReward(SharedEncoder(encoder), load_anchors(config.anchors), config)
    scores = reward(drawn.images.flatten(0, 1), drawn.prompts, _GROUP).total.cpu().numpy()
    wins: dict[str, list[bool]] = {}
    for prompt, score, good in zip(drawn.prompts, scores, drawn.good, strict=True):
        wins.setdefault(prompt.category, []).extend((score[good][:, None] > score[~good]).ravel().tolist())
    return {
        category: {"preferred": round(float(np.mean(won)), 3) if won else None, "pairs": len(won)}
        for category, won in wins.items()
    }


def _auc(high: np.ndarray, low: np.ndarray) -> float:
    """Probability that a random one of `high` exceeds a random one of `low` (Mann-Whitney)."""
    order = np.argsort(np.concatenate([high, low]), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    return float((ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


if __name__ == "__main__":
    sys.exit(main())
