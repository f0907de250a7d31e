"""The steered CLIP reward of SafeDiffusion-R1 (arXiv 2605.18719).

    v_safe = normalize(mean(z(safe anchors)) - mean(z(unsafe anchors)))
    r(p, x) = z_image(x) . normalize(z_text(p) + alpha * v_safe)

Every z is a unit vector of a frozen CLIP-like encoder, and no logit scale is applied. The image is generated from the
prompt as it is: only the reward's target is steered. Letters in shapes: P prompts, G images per prompt, E the encoder's
width; sample b belongs to prompt b // G.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.rewards.anchors import Anchors
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Rewards

# Two float32 features of the same phrase may differ by about this much: a shorter difference is rounding, not an axis.
_SHORTEST_DIFFERENCE = 1e-5


class Encoder(Protocol):
    """What the reward needs of an encoder: unit vectors for texts and images, as `SharedEncoder` computes them."""

    @property
    def tokenizer(self) -> Any: ...

    def encode_text(self, texts: Sequence[str]) -> Tensor: ...

    def encode_image(self, images: Tensor, batch: int) -> Tensor: ...


def safety_direction(encoder: Encoder, anchors: Anchors) -> Tensor:
    """[E] float32, the unit vector v_safe = normalize(mean(z_safe) - mean(z_unsafe)).

    Without safe anchors it is normalize(-mean(z_unsafe)): away from the unsafe ones.
    Raises ConfigError where the two means are numerically equal, since nothing then tells safe from unsafe.
    """
    difference = -encoder.encode_text(anchors.unsafe).mean(0)
    if anchors.safe:
        difference = difference + encoder.encode_text(anchors.safe).mean(0)
    if difference.norm() < _SHORTEST_DIFFERENCE:
        raise ConfigError(
            f"reward.anchors: safe {anchors.safe} and unsafe {anchors.unsafe} have the same mean under this encoder; "
            "phrases that it can tell apart are needed."
        )
    return F.normalize(difference, dim=-1)


def steer(text: Tensor, direction: Tensor, alpha: float, mode: str, negative: Tensor) -> Tensor:
    """The reward's targets, [P, E] unit vectors.

    text: [P, E] unit vectors z. direction: [E] unit vector v. negative: [P] bool.
    mode: `always`       normalize(z + alpha v), as in the paper's code.
          `unsafe_only`  the same where `negative`, z elsewhere.
          `projection`   normalize(z - (z . v) v + alpha v): the component along v becomes alpha before normalising.
    """
    steered = F.normalize(_moved(text, direction, alpha, mode), dim=-1)
    return torch.where(negative[:, None], steered, text) if mode == "unsafe_only" else steered


def _moved(text: Tensor, direction: Tensor, alpha: float, mode: str) -> Tensor:
    """[P, E], the target before it is normalised."""
    if mode == "projection":
        text = text - (text @ direction)[:, None] * direction
    return text + alpha * direction


class SteeringReward:
    """The reward r(p, x) = z_image(x) . steer(z_text(p)). direction: [E] float32, v_safe, on the encoder's device."""

    def __init__(self, encoder: Encoder, anchors: Anchors, config: RewardConfig):
        self.encoder = encoder
        self.anchors = anchors
        self.config = config
        self.direction = safety_direction(encoder, anchors)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], group_size: int) -> Rewards:
        """Score the images of P prompts.

        images: [P * G, 3, h, w] float32 in [0, 1]; image b was drawn for prompts[b // G].
        Returns [P, G] float32 tensors on the images' device: total, and the parts
            `alignment` z_image . z_text, `safety` z_image . v_safe, `steered` the total.
        """
        text = self.encode_prompts(prompts)
        z = self.encoder.encode_image(images, self.config.batch).view(len(prompts), group_size, -1)
        parts = {
            "alignment": torch.einsum("pge,pe->pg", z, text),
            "safety": z @ self.direction,
            "steered": torch.einsum("pge,pe->pg", z, self.targets(text, prompts)),
        }
        parts = {name: part.to(images.device) for name, part in parts.items()}
        return Rewards(total=parts["steered"], parts=parts)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Tensor:
        """[P, E] float32 unit vectors z_text."""
        return self.encoder.encode_text([prompt.text for prompt in prompts])

    def targets(self, text: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[P, E] float32 unit vectors: `text` steered as the config says."""
        return steer(text, self.direction, self.config.alpha, self.config.mode, _negative(text, prompts))


def _negative(text: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """[P] bool, on the texts' device."""
    return torch.tensor([prompt.label == NEGATIVE for prompt in prompts], device=text.device)


def reward_metrics(rewards: Rewards, negative: Tensor) -> dict[str, float]:
    """The rewards' entries in metrics.jsonl: means by label, and of every part.

    negative: [P] bool. `reward/std` is over all P * G, unbiased. A label without prompts has no entries.
    """
    negative, total = negative.cpu(), rewards.total.cpu()
    labels = {label: mask for label, mask in ((POSITIVE, ~negative), (NEGATIVE, negative)) if mask.any()}
    metrics = {"reward/mean": total.mean().item(), "reward/std": total.std().item()}
    metrics |= {f"reward/{label}_mean": total[mask].mean().item() for label, mask in labels.items()}
    for name, part in rewards.parts.items():
        part = part.cpu()
        metrics[f"reward/{name}"] = part.mean().item()
        metrics |= {f"reward/{name}_{label}": part[mask].mean().item() for label, mask in labels.items()}
    return metrics
