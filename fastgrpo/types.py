"""What flows through one iteration. Data moves forward only: no stage changes an earlier stage's object.

Letters in shapes: P prompts, G images per prompt (the group), B = P * G samples, T denoising steps, L text tokens, D
text width, C x H x W the latent, h x w the image. Sample b belongs to prompt b // G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # prompts and their settings are read without torch, which takes seconds to import
    from torch import Tensor

POSITIVE = "positive"
NEGATIVE = "negative"


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt source.

    text: what the model is asked to draw. label: "positive" (draw it well) or "negative" (asks for something unsafe).
    category: a composition task or a hazard category; "" when the source does not say.
    id: stable within its source, so that seeds and results can be joined by it.
    """

    text: str
    label: str
    category: str = ""
    id: int = 0


@dataclass(frozen=True)
class PromptBatch:
    """The P prompts of one iteration; with several processes the share of one.

    embeds: [P, L, D], the frozen text encoder's output, on the policy's device. iteration: from 1; 0 outside training.
    """

    prompts: tuple[Prompt, ...]
    embeds: Tensor
    iteration: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Trajectory:
    """Everything one rollout leaves behind, on the policy's device. With several processes B is one process's share.

    latents: [T + 1, B, C, H, W] float32; latents[0] is the initial noise, latents[T] the result.
    log_probs: [T, B] float32, mean over C, H, W (not the sum) of the log-density of latents[i + 1], the value stored;
    0 where a step has no noise.
    images: [B, 3, h, w] float32 in [0, 1].
    means: [T, B, C, H, W] float32, each step's mean, only where RatioNorm needs it.
    """

    latents: Tensor
    log_probs: Tensor
    images: Tensor
    means: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.log_probs.shape[0]

    @property
    def samples(self) -> int:
        return self.log_probs.shape[1]


@dataclass(frozen=True)
class Rewards:
    """What the images of a trajectory are worth.

    total: [P, G] float32, for the advantage. parts: named [P, G] float32 tensors that explain it, not all summands.
    features: [P, G, D] float32 unit vectors of the images, where a term of the reward has an encoder.

    A group with a NaN in `total` is left out of all that comes after; there is none unless engine.not_finite is `skip`.
    """

    total: Tensor
    parts: dict[str, Tensor]
    features: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """[P] bool: the groups that are not left out."""
        return self.total.isfinite().all(dim=1)

    def only(self, groups: Tensor) -> Rewards:
        """Those of some groups, [P] bool."""
        features = None if self.features is None else self.features[groups]
        return Rewards(self.total[groups], {name: part[groups] for name, part in self.parts.items()}, features)


@dataclass(frozen=True)
class UpdateStats:
    """One iteration's learning, as plain numbers.

    values: metric name -> number, named as in metrics.jsonl (ratio/..., clip/..., advantage/..., kl/..., grad/...).
    forward, forward_backward: this process's latents that went through the UNet one way only, and both ways: one for
    each pair, or for all siblings.
    left_out: why optimizer steps were left out whose loss or gradient was not finite; on all processes equally many.
    """

    values: dict[str, float]
    forward: int = 0
    forward_backward: int = 0
    left_out: tuple[FloatingPointError, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a detector says about one image.

    unsafe: it shows something unsafe, asked for or not. correct: it shows what its prompt asks for; None where the
    detector does not judge that (negative prompts). kept: it shows the benign object that a negative prompt also names;
    None where the prompt names none.
    """

    unsafe: bool
    correct: bool | None = None
    kept: bool | None = None
