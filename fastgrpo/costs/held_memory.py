"""How much memory passes of a model hold, watched on the meta device: nothing is allocated or computed."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgrpo.unet.gradient_checkpointing import checkpointed


@dataclass(frozen=True)
class PeakBytes:
    """The bytes that N samples hold at the worst moment: the most of fixed + N * each over moments (fixed, each)."""

    moments: tuple[tuple[int, int], ...]

    def bytes(self, samples: int) -> int:
        return max(fixed + samples * each for fixed, each in self.moments)


class FusedAttention(TorchFunctionMode):
    """Computes attention on the meta device as one kernel, not in steps that hold a matrix of all tokens by all."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return function(*args, **(kwargs or {}))


def recompute_with_fused_attention(unet: UNet2DConditionModel) -> None:
    """Lets a UNet with gradient checkpointing use `FusedAttention` also where it computes its blocks again, in place.

    torch.autograd.grad leaves the mode that it is called in.
    """
    unet.enable_gradient_checkpointing(partial(checkpointed, context_fn=lambda: (nullcontext(), FusedAttention())))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what is computed until it is let go. history: the bytes after each result, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = [0]
        self._now = 0
        self._alive: set[int] = set()

    @property
    def most(self) -> int:
        return max(self.history)

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_identity(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _identity(tensor) not in given | self._alive:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._alive.add(storage._cdata)
        self._now += storage.nbytes()
        self.history.append(self._now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self._now -= size


def saved_bytes(unet: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Returns the bytes that a forward pass on the meta device leaves for the backward pass, without weights."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[_identity(tensor)] = tensor.untyped_storage()  # held, so that no other takes its identity over
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(*inputs, return_dict=False)
    weights = {_identity(tensor) for tensor in unet.parameters()}
    return sum(storage.nbytes() for identity, storage in storages.items() if identity not in weights)


def held_bytes(unet: nn.Module, inputs: list[tuple[Tensor, ...]]) -> tuple[int, PeakBytes]:
    """Returns the bytes that a forward pass holds for a sample, and those that it and its backward pass hold.

    inputs: of two samples and of four, on the meta device; one sample alone spares some copies. The passes do the same
    things in the same order, so at each moment memory is a line through the two numbers.
    """
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    forwards: list[int] = []
    histories: list[list[int]] = []
    for some in inputs:
        with FusedAttention(), LiveBytes() as live:
            output = unet(*some, return_dict=False)[0]
            forwards.append(live.most)
            torch.autograd.grad(output, trained, torch.empty_like(output))
        histories.append(live.history)
    lines = {(2 * two - four, (four - two) // 2) for two, four in zip(*histories, strict=True)}
    return (forwards[1] - forwards[0]) // 2, PeakBytes(tuple(sorted(lines)))


def _identity(tensor: Tensor) -> int:
    """The same for all views of one storage, while it lives; on the meta device addresses are all 0."""
    return tensor.untyped_storage()._cdata
