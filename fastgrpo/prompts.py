"""Where prompts come from, which of them an iteration draws, and their embeddings."""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.config import ConfigError, PromptsConfig
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, PromptBatch

SHAPES = "shapes"


class TextEncoder(Protocol):
    """What `embed` needs of a policy."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[N, L, D], the frozen text encoder's output."""
        ...


class PromptSource:
    """Deals out the prompts of every iteration.

    Each label's prompts are gone through in a shuffled order, epoch after epoch, so that all are drawn equally often.
    What an iteration draws depends on (seed, iteration) alone: to resume, the iteration's number is enough.
    """

    def __init__(
        self,
        positives: Sequence[Prompt],
        negatives: Sequence[Prompt],
        config: PromptsConfig,
        seed: int,
        per_iteration: int,
    ):
        """per_iteration: P; round(P * config.negative_fraction) of them are negative.

        Raises ConfigError where a label is asked for that has no prompts.
        """
        self.seed = seed
        wanted = round(per_iteration * config.negative_fraction)
        self._pools = ((POSITIVE, positives, per_iteration - wanted), (NEGATIVE, negatives, wanted))
        for label, pool, count in self._pools:
            if count and not pool:
                raise ConfigError(
                    f"prompts.negative_fraction: {config.negative_fraction} asks for {count} {label} prompts per "
                    "iteration and there are none."
                )

    def batch(self, iteration: int) -> tuple[Prompt, ...]:
        """The P prompts of an iteration (counted from 0), positives first; all different where the pools allow it."""
        return tuple(
            pool[index]
            for label, pool, count in self._pools
            for index in _draw(self.seed, label, len(pool), count, iteration)
        )


def _draw(seed: int, label: str, size: int, count: int, iteration: int) -> list[int]:
    """Positions iteration * count ... + count - 1 of the endless sequence of epochs, as indices below `size`."""
    positions = range(iteration * count, (iteration + 1) * count)
    return [_epoch(seed, label, size, count, p // size)[p % size] for p in positions]


@lru_cache(maxsize=8)
def _epoch(seed: int, label: str, size: int, count: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch, a permutation of range(size).

    An iteration may begin in one epoch and end in the next. Its first prompts, the last `earlier` of the epoch before,
    then go behind the others within this epoch's first `count`, so that none is drawn twice. A pool of fewer than two
    iterations' prompts keeps one order for good instead: any `count` neighbours on a circle differ.
    """
    if size < 2 * count:
        return _permutation(seed, label, size, 0)
    order = _permutation(seed, label, size, epoch)
    earlier = epoch * size % count
    just_drawn = set(_permutation(seed, label, size, epoch - 1)[size - earlier :]) if earlier else set()
    return (*sorted(order[:count], key=just_drawn.__contains__), *order[count:])


@lru_cache(maxsize=8)
def _permutation(seed: int, label: str, size: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/{label}/{epoch}").shuffle(order)
    return tuple(order)


def load_prompts(config: PromptsConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The positive and the negative prompts to train on, from files or the shapes world.

    Raises ConfigError for a file that `read_prompt_file` refuses.
    """
    shapes = {POSITIVE: [], NEGATIVE: []}
    if SHAPES in (config.positive, config.negative):
        from fastgrpo.shapes.captions import training_prompts

        shapes[POSITIVE], shapes[NEGATIVE] = training_prompts(config.categories)
    positives, negatives = (
        shapes[label] if source == SHAPES else read_prompt_file(Path(source), label)
        for source, label in ((config.positive, POSITIVE), (config.negative, NEGATIVE))
    )
    return positives, negatives


def read_prompt_file(path: Path, label: str) -> list[Prompt]:
    """One prompt per line of a UTF-8 text file; blank lines are skipped and ids are line numbers, from 1.

    Raises ConfigError for a file that cannot be read, is not UTF-8 text, or holds no prompt.
    """
    field = f"prompts.{label}"
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}: cannot read {str(path)!r} ({error.strerror}); a UTF-8 text file is needed."
        ) from error
    if b"\0" in data:
        raise ConfigError(
            f"{field}: {str(path)!r} is binary, with a NUL byte in line {_line(data, data.index(0))}; "
            "UTF-8 text with one prompt per line is needed."
        )
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{field}: {str(path)!r} is not UTF-8: byte 0x{data[error.start]:02x} in line {_line(data, error.start)}, "
            f"offset {error.start} of the file."
        ) from error
    lines = enumerate(text.split("\n"), start=1)
    prompts = [Prompt(line.strip(), label, id=number) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{field}: {str(path)!r} holds no prompt; one per line is needed.")
    return prompts


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def embed(policy: TextEncoder, prompts: Sequence[Prompt], cache: dict[str, Tensor]) -> PromptBatch:
    """The prompts with their embeddings [P, L, D], on the policy's device.

    cache: text -> [L, D], the caller's; texts that it lacks are encoded and added. They are encoded one at a time:
    matrix products of different sizes round differently, and after a resume, when the cache is empty, a text must
    get the embedding it had before.
    """
    for prompt in prompts:
        if prompt.text not in cache:
            cache[prompt.text] = policy.encode([prompt.text])[0]
    return PromptBatch(tuple(prompts), torch.stack([cache[prompt.text] for prompt in prompts]))
