"""Adds many gradients, each a tensor of its own, to one flat float32 buffer in few launches.

    total[starts[i] + k] += gradients[i][k]        k over the elements of gradients[i], in the order of their memory

total [n] float32; gradients in bfloat16, float16 or float32. Half precision is exact in float32, so each sum is rounded
once, by one program: the bits are those of `add_`. In half precision an element moves 10 bytes.
PyTorch adds tensors of different dtypes one launch each. Here a launch takes 64, whose addresses are its arguments: a
CUDA graph holds them, and no table has to be copied to the device.
"""

from collections.abc import Sequence
from itertools import accumulate as running_sum

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.operators import DTYPES, on_its_device

ALIGNMENT = 32
"""In elements. `starts` are multiples of it, so that both sides of a sum are moved 16 bytes at a time."""

_BYTES = 16
# A launch's arguments stay below 2 KB, and finding its tensor costs a program a fraction of what its elements take.
_COUNT = 64
_BLOCK = 4096  # 16 elements a thread of 256: two 16-byte loads in half precision and four in float32
_WARPS = 8


@triton.jit
def _accumulate_kernel(total_ptr, gradients, starts, sizes, firsts, BLOCK: tl.constexpr):
    """starts, sizes, firsts: as `_odd` makes them. firsts: the program that has a gradient's first elements."""
    program = tl.program_id(0)
    gradient_ptr, start, size, first = gradients[0], starts[0], sizes[0], firsts[0]
    for i in tl.static_range(1, len(gradients)):
        reached = program >= firsts[i] // 2 - 1
        gradient_ptr = tl.where(reached, gradients[i], gradient_ptr)
        start = tl.where(reached, starts[i], start)
        size = tl.where(reached, sizes[i], size)
        first = tl.where(reached, firsts[i], first)
    begin = (program - (first // 2 - 1)).to(tl.int64) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    sum_ptr = total_ptr + tl.multiple_of(start // 2 - 1, 32)
    left = size // 2 - 1 - begin
    if left >= BLOCK:  # without a mask, by which every access would be of one element
        added = tl.load(gradient_ptr + at).to(tl.float32)
        tl.store(sum_ptr + at, tl.load(sum_ptr + at) + added)
    else:
        mask = tl.arange(0, BLOCK) < left
        added = tl.load(gradient_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, tl.load(sum_ptr + at, mask, other=0.0) + added, mask)


def _odd(number: int) -> int:
    """Returns neither 1 nor a multiple of 16: in tuples, Triton always compiles a kernel anew for those."""
    return 2 * number + 3


@on_its_device
def _launch_accumulate(total: Tensor, gradients: Sequence[Tensor], starts: Sequence[int]) -> None:
    given = [pair for pair in zip(gradients, starts, strict=True) if pair[0].numel()]
    for dtype in DTYPES:
        _launch_some(total, [(g, s) for g, s in given if g.dtype == dtype and g.data_ptr() % _BYTES == 0])
    if others := [(g, s) for g, s in given if g.data_ptr() % _BYTES]:
        _cpu_accumulate(total, *zip(*others, strict=True))


def _launch_some(total: Tensor, given: Sequence[tuple[Tensor, int]]) -> None:
    """Adds gradients of one dtype. What no program reaches fills up the last launch, to be of the same kernel."""
    for begin in range(0, len(given), _COUNT):
        gradients, starts = zip(*given[begin : begin + _COUNT], strict=True)
        sizes = tuple(gradient.numel() for gradient in gradients)
        *firsts, programs = running_sum((triton.cdiv(size, _BLOCK) for size in sizes), initial=0)
        missing = _COUNT - len(gradients)
        _accumulate_kernel[(programs,)](
            total,
            gradients + gradients[-1:] * missing,
            tuple(map(_odd, starts + (0,) * missing)),
            tuple(map(_odd, sizes + (0,) * missing)),
            tuple(map(_odd, firsts + [programs] * missing)),
            _BLOCK,
            num_warps=_WARPS,
        )


_operator = torch.library.custom_op(
    "fastgrpo::accumulate", _launch_accumulate, mutates_args=("total",), device_types="cuda",
    schema="(Tensor(a!) total, Tensor[] gradients, int[] starts) -> ()",
)  # fmt: skip


@_operator.register_kernel("cpu")
def _cpu_accumulate(total: Tensor, gradients: Sequence[Tensor], starts: Sequence[int]) -> None:
    parts = [total[start : start + g.numel()] for g, start in zip(gradients, starts, strict=True)]
    torch._foreach_add_(parts, [g.as_strided((g.numel(),), (1,)) for g in gradients])


_operator.register_fake(lambda *arguments: None)


def accumulate(total: Tensor, gradients: Sequence[Tensor], starts: Sequence[int]) -> None:
    """Adds each gradient, in the order of its memory, to total[start : start + its elements].

    total: [n] float32, contiguous. gradients: bfloat16, float16 or float32, of any shape, each without holes in its
    memory. starts: a multiple of ALIGNMENT for each; the parts do not overlap. On the CPU the bits are the same.
    Raises ValueError for another dtype, or a part that is not in `total`.
    """
    if total.dtype != torch.float32 or total.dim() != 1 or not total.is_contiguous():
        raise ValueError(f"accumulate: total is {total.dtype} {list(total.shape)}; accepted is contiguous float32 [n]")
    for gradient, start in zip(gradients, starts, strict=True):
        size = gradient.numel()
        if gradient.dtype not in DTYPES or start % ALIGNMENT or not 0 <= start <= start + size <= len(total):
            raise ValueError(
                f"accumulate: a gradient is {gradient.dtype} of {size} elements for {start} and beyond; accepted are "
                f"bfloat16, float16 and float32 at a multiple of {ALIGNMENT} within {len(total)} elements"
            )
    _operator(total, list(gradients), list(starts))
