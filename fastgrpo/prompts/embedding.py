"""The embeddings of prompts, each computed once."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.types import Prompt, PromptBatch


class TextEncoder(Protocol):
    """What `embed` needs of a policy."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[N, L, D], the frozen text encoder's output."""


def embed(policy: TextEncoder, prompts: Sequence[Prompt], cache: dict[str, Tensor]) -> PromptBatch:
    """Embed prompts: [P, L, D] for P of them, on the policy's device.

    cache: text -> [L, D], the caller's; texts that it lacks are encoded and added. They are encoded one at a time:
    matrix products of different sizes round differently, and after a resume, when the cache is empty, a text must
    get the embedding it had before.
    """
    for prompt in prompts:
        if prompt.text not in cache:
            cache[prompt.text] = policy.encode([prompt.text])[0]
    return PromptBatch(tuple(prompts), torch.stack([cache[prompt.text] for prompt in prompts]))
