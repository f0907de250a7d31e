"""Which prompts each iteration gets."""

import random
from collections.abc import Sequence
from functools import lru_cache

from fastgrpo.settings.schema import PromptsConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt


class PromptSource:
    """Deals out the prompts of every iteration.

    Each label's prompts are gone through in a shuffled order, epoch after epoch, so that all come equally often. What
    an iteration gets depends on (seed, iteration) alone: to resume, the iteration's number is enough.
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
        self.warning = _rounded_away(per_iteration, config.negative_fraction)
        """A sentence where rounding leaves one of two labels out for good; else empty."""
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
            for index in _deal(self.seed, label, len(pool), count, iteration)
        )


def _rounded_away(per_iteration: int, fraction: float) -> str:
    if fraction in (0, 1) or 0 < round(per_iteration * fraction) < per_iteration:
        return ""
    label = POSITIVE if round(per_iteration * fraction) else NEGATIVE
    enough = next((p for p in range(2, 10_000) if 0 < round(p * fraction) < p), 0)  # nobody wants more
    return (
        f"prompts_per_iteration {per_iteration} and prompts.negative_fraction {fraction} are, rounded, "
        f"{round(per_iteration * fraction)} negative prompts an iteration, so that no {label} one is ever drawn"
        + (f"; with prompts_per_iteration {enough} both are" if enough else "")
    )


def _deal(seed: int, label: str, size: int, count: int, iteration: int) -> list[int]:
    """Positions iteration * count ... + count - 1 of the endless sequence of epochs, as indices below `size`."""
    positions = range(iteration * count, (iteration + 1) * count)
    return [_epoch(seed, label, size, count, p // size)[p % size] for p in positions]


@lru_cache(maxsize=8)
def _epoch(seed: int, label: str, size: int, count: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch, a permutation of range(size).

    An iteration may begin in one epoch and end in the next. Its first prompts, the last `earlier` of the epoch before,
    then go behind the others within this epoch's first `count`, so that none is dealt twice. A pool of fewer than two
    iterations' prompts keeps one order for good instead: any `count` neighbours on a circle differ.
    """
    if size < 2 * count:
        return _permutation(seed, label, size, 0)
    order = _permutation(seed, label, size, epoch)
    earlier = epoch * size % count
    just_dealt = set(_permutation(seed, label, size, epoch - 1)[size - earlier :]) if earlier else set()
    return (*sorted(order[:count], key=just_dealt.__contains__), *order[count:])


@lru_cache(maxsize=8)
def _permutation(seed: int, label: str, size: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/{label}/{epoch}").shuffle(order)
    return tuple(order)
