"""Adds up the sums over rows that the programs of a kernel made, in their order: the same inputs give the same bits."""

import torch
from torch import Tensor

from fastgrpo.kernels.language import tl, triton

_PROGRAMS = 64  # whose sums are added at a time
_COLUMNS = 32  # of a program; they are independent


@triton.jit
def _sum_kernel(parts_ptr, sums_ptr, programs, width, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    sums = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
    for start in range(0, programs, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        mask = (program < programs)[:, None] & inside[None, :]
        sums += tl.load(parts_ptr + program[:, None] * width + column[None, :], mask, other=0.0)
    tl.store(sums_ptr + column, tl.sum(sums, axis=0).to(sums_ptr.dtype.element_ty), inside)


def sum_programs(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [programs, ...] float32, contiguous, to [...] of `dtype`: 0 where there were no programs."""
    sums = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    width = sums.numel()
    if width:
        _sum_kernel[(triton.cdiv(width, _COLUMNS),)](
            parts, sums, len(parts), width, PROGRAMS=_PROGRAMS, COLUMNS=_COLUMNS
        )
    return sums
