"""The clipped loss of policy gradients, alone: `grpo_step` computes it on its way, by the same functions.

    ratio = exp(log_ratio)
    loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))   (Schulman et al., arXiv 1707.06347, eq. 7)

for N pairs with advantages A, in float32. Bytes for a pair: 4 of the log-ratio, 4 of the advantage, 4 of the loss, 4 of the
ratio, 1 that says which bound decides.
"""

import torch
from torch import Tensor

from fastgrpo.kernels.device import on_its_device
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.spec import AotKernel, Arguments, Case, OpSpec
from fastgrpo.kernels.step_math import EXACT, check_pairs

_BLOCK = 1024


def surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clipped loss, the ratio, clipped int8, and d loss / d ratio: [N] each."""
    low, high = 1 - clip_low, 1 + clip_high
    ratio = torch.exp(log_ratio)
    free = torch.where(advantage == 0, -advantage, -advantage * ratio)  # 0 also where the ratio is infinite
    bounded = -advantage * ratio.clamp(low, high)
    decides = bounded > free
    clipped = decides.to(torch.int8) * torch.where(ratio > 1, 1, -1).to(torch.int8)
    # Where both are equal they share the gradient: half of it is lost if the ratio is out of bounds all the same.
    shared = torch.where(free == bounded, 0.5, 0.0)
    inside = (ratio >= low) & (ratio <= high)
    slope = -advantage * torch.where(decides, 0.0, 1 - shared + torch.where(inside, shared, 0.0))
    return torch.maximum(free, bounded), ratio, clipped, slope


def reference(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `clipped_loss`, in PyTorch; all float64 when its arguments are."""
    return surrogate(log_ratio, advantage, clip_low, clip_high)[:3]


# On the device.


@triton.jit
def clip(log_ratio, advantage, low, high):
    """The loss, the ratio, where the bounds decide (1 the upper, -1 the lower), and d loss / d ratio; float32."""
    # In float64, since exp's float32 version is an approximation.
    ratio = tl.exp(log_ratio.to(tl.float64)).to(tl.float32)
    within = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    free = tl.where(advantage == 0, -advantage, -advantage * ratio)
    bounded = -advantage * within
    decides = bounded > free
    clipped = tl.where(decides, tl.where(ratio > 1, 1, -1), 0)
    share = tl.where(free == bounded, 0.5, 0.0)
    share = 1 - share + tl.where((ratio >= low) & (ratio <= high), share, 0.0)
    return tl.where(decides, bounded, free), ratio, clipped, tl.where(decides, 0.0, -advantage * share)


@triton.jit
def clipped_loss_kernel(log_ratio, advantage, loss, ratio, clipped, pairs, low, high, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pairs
    value = tl.load(log_ratio + i, mask=inside, other=0.0)
    pair_loss, pair_ratio, pair_clipped, _ = clip(value, tl.load(advantage + i, mask=inside, other=0.0), low, high)
    tl.store(loss + i, pair_loss, mask=inside)
    tl.store(ratio + i, pair_ratio, mask=inside)
    tl.store(clipped + i, pair_clipped.to(tl.int8), mask=inside)


@on_its_device
def _launch_clipped_loss(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio, advantage = log_ratio.contiguous(), advantage.contiguous()
    loss, ratio = torch.empty_like(log_ratio), torch.empty_like(log_ratio)
    clipped = torch.empty_like(log_ratio, dtype=torch.int8)
    pairs = len(log_ratio)
    clipped_loss_kernel[(triton.cdiv(pairs, _BLOCK),)](
        log_ratio, advantage, loss, ratio, clipped, pairs, 1 - clip_low, 1 + clip_high, BLOCK=_BLOCK, **EXACT
    )
    return loss, ratio, clipped


_clipped_loss = torch.library.custom_op(
    "fastgrpo::clipped_loss", _launch_clipped_loss, mutates_args=(), device_types="cuda"
)
_clipped_loss.register_kernel("cpu")(reference)


@_clipped_loss.register_fake
def _clipped_loss_fake(log_ratio, *_):
    pairs = len(log_ratio)
    return log_ratio.new_empty(pairs), log_ratio.new_empty(pairs), log_ratio.new_empty(pairs, dtype=torch.int8)


def clipped_loss(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the ratio, [N] float32, and clipped [N] int8, of log_ratio and advantage, [N] float32.

    clipped: 1 where the upper bound decides, -1 where the lower. clip_low, clip_high: the ratio's range is 1 - clip_low to
    1 + clip_high. Not differentiable. Raises ValueError for tensors that are not alike.
    """
    if log_ratio.dim() != 1:
        raise ValueError(f"log_ratio is {list(log_ratio.shape)}; [N] is accepted")
    check_pairs(len(log_ratio), log_ratio=log_ratio, advantage=advantage)
    return _clipped_loss(log_ratio, advantage, clip_low, clip_high)


def _case(pairs: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        # float32, whatever the model computes in. About half of the ratios are out of bounds.
        log_ratio, advantage = torch.randn(2, pairs, generator=generator).to(device)
        return 0.3 * log_ratio, advantage, 0.2, 0.25

    return Case(f"{pairs}", make, pairs * (4 + 4 + 4 + 4 + 1))


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # float32: the exponential to a unit in the last place, 2^-23, the bound and the product each to half of one.
    return 2.0**-22, 0.0


SPEC = OpSpec(
    name="clipped_loss",
    function=clipped_loss,
    reference=reference,
    cases=(_case(1), _case(7), _case(1025)),
    bench=(_case(1 << 16),),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    tolerance=_tolerance,
    aot=(
        AotKernel(
            name="clipped_loss",
            kernel=clipped_loss_kernel,
            signature={
                **dict.fromkeys(("log_ratio", "advantage", "loss", "ratio"), "*fp32"),
                "clipped": "*i8",
                "pairs": "i32",
                **dict.fromkeys(("low", "high"), "fp32"),
                "BLOCK": "constexpr",
            },
            constants={"BLOCK": _BLOCK},
            options=EXACT,
        ),
    ),
)
