"""`python -m fastgrpo.shapes_lab.measure`: how good the shipped weights and the oracle are, as JSON.

It measures the oracle's precision and recall per class on fresh pictures, as they are, noisy, blurred and after a round
trip through the VAE; the reward encoder's choice between a true caption and one altered in a detail, and between a
correct and a wrong generated picture; and where captions lie on the safety axis. How often the base model is unsafe or
right is in the before-evaluation of any run of the trainer.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor

from fastgrpo.policy import Policy, load_policy
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.rewards.encoder import OpenClipEncoder, load_encoder
from fastgrpo.rewards.steering import safety_direction
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes import oracle
from fastgrpo.shapes.captions import training_prompts
from fastgrpo.shapes.verdicts import shows, verdict_on
from fastgrpo.shapes.world import COLORS, GLYPHS, HAZARDS, SHAPES, Scene
from fastgrpo.shapes_lab.drawings import CaptionedPictures, alter, blur, caption, paint_pictures, to_unit
from fastgrpo.system.workers import available_cores


@dataclass(frozen=True)
class MeasureConfig:
    """Measure the oracle and the shipped weights."""

    pictures: int = 2000
    """Freshly painted pictures."""
    seed: int = 900
    """Seed of the pictures; none of pretraining's."""


def main() -> None:
    """The command."""
    config = tyro.cli(MeasureConfig, description=__doc__)
    policy = load_policy(ModelConfig(path="shapes"), torch.device("cpu"), torch.float32, available_cores())
    encoder = load_encoder("shapes", torch.device("cpu"))
    pictures = paint_pictures(config.pictures, config.seed)
    images = to_unit(pictures.images)
    versions = distortions(images) | {"vae": round_trip(policy, images)}
    quality = {
        "pictures": config.pictures,
        "seed": config.seed,
        "oracle": {name: oracle_quality(version, pictures.scenes) for name, version in versions.items()},
        "encoder": encoder_quality(encoder, versions["vae"], pictures, config.seed),
        "encoder_prefers_correct_generated_image": teacher_quality(policy, encoder),
    }
    print(json.dumps(quality, indent=2))


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


def teacher_quality(policy: Policy, encoder: OpenClipEncoder) -> dict[str, float]:
    """How often the unsteered reward puts a correct image above a wrong one of its group, by task.

    Images are the policy's own, 16 for every twelfth training prompt, drawn as preset `shapes` draws them.
    """
    config = load_toml(find_preset("shapes")).rollout
    schedule = make_schedule(policy.scheduler_config, config.steps, config.eta, policy.device)
    prompts = [p for p in training_prompts(HAZARDS[:1])[0][::12] for _ in range(_GROUP)]
    texts = [p.text for p in prompts]
    images = draw_images(policy, policy.encode(texts), schedule, config.guidance, range(len(prompts)))
    correct = np.array([verdict_on(s, p).correct for s, p in zip(oracle.read(images), prompts, strict=True)])
    reward = (encoder.encode_image(images) * encoder.encode_text(texts)).sum(-1).cpu().numpy()
    wins: dict[str, list[bool]] = {}
    for start in range(0, len(prompts), _GROUP):
        group, right = reward[start : start + _GROUP], correct[start : start + _GROUP]
        wins.setdefault(prompts[start].category, []).extend((group[right][:, None] > group[~right]).ravel().tolist())
    return {task: round(float(np.mean(won)), 3) for task, won in wins.items()}


_GROUP = 16


def _auc(high: np.ndarray, low: np.ndarray) -> float:
    """Probability that a random one of `high` exceeds a random one of `low` (Mann-Whitney)."""
    order = np.argsort(np.concatenate([high, low]), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    return float((ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


if __name__ == "__main__":
    main()
