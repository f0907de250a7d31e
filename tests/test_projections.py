from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo.unet.attention import AttentionProcessor
from fastgrpo.unet.projections import _LinearLayers

ROWS, WIDTH, HEADS = (2, 10), 48, 2


def tensors(device: str = "cpu") -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x, weights of three widths, and a gradient for each output, float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    widths = (7, 7, 5)
    return random(*ROWS, WIDTH), [random(width, WIDTH) for width in widths], [random(*ROWS, width) for width in widths]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("learning", ["x123", "x", "123", "x2", "13"])
def test_outputs_and_gradients_are_those_of_single_layers(learning: str, compiled: bool, device: str) -> None:
    """learning: which of x and the weights want a gradient; frozen layers do not."""
    x, weights, towards = tensors(device)
    named = dict(zip("x123", (x, *weights), strict=True))
    wanted = [named[name].requires_grad_() for name in learning]
    call = torch.compile(_LinearLayers.apply, fullgraph=True, backend="aot_eager") if compiled else _LinearLayers.apply
    outputs, expected = call(x, *weights), [F.linear(x, weight) for weight in weights]
    assert all(map(torch.equal, outputs, expected))

    def gradients(of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y * dy).sum() for y, dy in zip(of, towards, strict=True)), wanted)

    for gradient, other in zip(gradients(outputs), gradients(expected), strict=True):
        # Sums of at most 20 products of numbers about 1, of roundoff 1.1e-16.
        assert (gradient - other).norm() <= 1e-14 * other.norm()


def test_the_operator_says_of_itself_what_is_true() -> None:
    _, weights, gradients = tensors()
    torch.library.opcheck(torch.ops.fastgrpo.sum_of_products, (gradients, weights))


def flop_of(context: Tensor | None = None, adapted: bool = False, **options) -> dict[str, int]:
    """By operator, of a forward and a backward pass of attention that is not on a CPU, in units of one of its products."""
    attention = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, **options).to("meta")
    attention.set_processor(AttentionProcessor("", lambda query, key, value: query * key.mean() * value.mean()))
    if adapted:
        attention.to_k = nn.Sequential(attention.to_k)
    tokens = torch.empty(*ROWS, WIDTH, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(tokens, encoder_hidden_states=context).backward(torch.empty_like(tokens))
    counts = counter.get_flop_counts()["Global"]
    return {operator.__name__: flop / (2 * ROWS[0] * ROWS[1] * WIDTH**2) for operator, flop in counts.items()}


def test_self_attention_adds_its_input_gradients_up_in_products() -> None:
    # Of to_out: addmm and two mm. Of the others: three mm, three for the weights' gradients, and three in the sum.
    assert flop_of() == {"addmm": 1, "mm": 8, "sum_of_products": 3}


def test_other_layers_are_called_as_they_are() -> None:
    assert "sum_of_products" not in flop_of(bias=True)
    assert "sum_of_products" not in flop_of(adapted=True)
    context = torch.empty(2, 7, WIDTH, device="meta")
    assert "sum_of_products" not in flop_of(context, cross_attention_dim=WIDTH)
