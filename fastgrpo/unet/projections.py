"""Linear layers on the same input, whose gradients for it are added up where they are computed.

    y_i = x W_i^T        dx = sum of dy_i W_i        dW_i = dy_i^T x

x [..., in], W_i [out_i, in]. Autograd adds the products of dx in passes of their own, which read and write whole tensors of
tokens; a matrix product can add to what is there. One product of a merged weight needs no addition either, but attention's
gradients come as three tensors, and joining them costs more than the two additions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("fastgrpo::sum_of_products", mutates_args=())
def _sum_of_products(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of gradients[i] [..., out_i] @ weights[i] [out_i, in] -> [..., in]."""
    first, *others = (gradient.flatten(0, -2) for gradient in gradients)
    total = first @ weights[0]
    for gradient, weight in zip(others, weights[1:], strict=True):
        total.addmm_(gradient, weight)
    return total.view(*gradients[0].shape[:-1], -1)


@_sum_of_products.register_fake
def _(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return gradients[0].new_empty(*gradients[0].shape[:-1], weights[0].shape[1])


@register_flop_formula(torch.ops.fastgrpo.sum_of_products)
def _flop(gradients: Sequence[Sequence[int]], weights: Sequence[Sequence[int]], *_, out_shape: Sequence[int]) -> int:
    return sum(2 * torch.Size(shape).numel() * weight[1] for shape, weight in zip(gradients, weights, strict=True))


class _LinearLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needed, *wanted = ctx.needs_input_grad
        rows = x.flatten(0, -2)
        return (
            _sum_of_products(gradients, weights) if needed else None,
            *(dy.flatten(0, -2).t() @ rows if want else None for dy, want in zip(gradients, wanted, strict=True)),
        )


def linear_layers(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x W^T [..., out] for each W [out, in], x [..., in]. On the CPU, or under autocast, each is a layer of its own."""
    if x.device.type == "cpu" or torch.is_autocast_enabled("cuda"):
        return tuple(F.linear(x, weight) for weight in weights)
    return _LinearLayers.apply(x, *weights)
