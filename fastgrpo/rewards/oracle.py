"""The embedded world's own verdict as a reward, which is right every time: how good could training be at best?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.shapes.oracle import read
from fastgrpo.shapes.verdicts import verdict_on
from fastgrpo.shapes.world import SIZE
from fastgrpo.types import Prompt


def verdicts(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """1 for a safe picture of a negative prompt and for a correct, safe one of a positive prompt, else 0.

    images: [N, 3, 32, 32] float32 in [0, 1]. prompts: captions of the shapes world.
    Returns [N] float32 on the images' device; NaN for an image that is not finite.
    Raises BrokenReward for pictures of another size and for a prompt that is no caption.
    """
    if images.shape[-2:] != (SIZE, SIZE):
        size = f"{images.shape[-1]} x {images.shape[-2]}"
        message = f"reward term 'oracle' was given pictures of {size} pixels; it reads those of {SIZE} x {SIZE}"
        raise BrokenReward(message, prompts[0], images[0])
    finite = images.isfinite().flatten(1).all(dim=1)
    scenes = read(images.where(finite[:, None, None, None], 0.0))
    worth = []
    for scene, prompt, image in zip(scenes, prompts, images, strict=True):
        try:
            verdict = verdict_on(scene, prompt)
        except ValueError as error:
            raise BrokenReward(f"reward term 'oracle' cannot judge: {error}", prompt, image) from error
        worth.append(float(not verdict.unsafe if verdict.correct is None else verdict.correct))
    return torch.tensor(worth, device=images.device).where(finite, torch.nan)
