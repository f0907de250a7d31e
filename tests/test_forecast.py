"""What would run on a GPU, counted without one: kernels, bytes and FLOP of a module against numbers worked out by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.kernels.geglu import geglu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import generated  # noqa: E402
from generated import Prediction, predict  # noqa: E402

ROWS, CHANNELS, SIDE = 4, 64, 16
PIXELS = ROWS * SIDE * SIDE
HALF = 2  # bytes


class Layers(nn.Module):
    """A convolution with a bias and SiLU, a linear layer, GEGLU, and attention in heads of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.linear = nn.Linear(CHANNELS, 2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.nn.functional.silu(self.conv(x)).permute(0, 2, 3, 1).flatten(1, 2)
        hidden = geglu(self.linear(tokens))
        heads = hidden.unflatten(-1, (-1, 8)).transpose(1, 2)
        return torch.ops.aten._scaled_dot_product_flash_attention(heads, heads, heads)[0]


@pytest.fixture(scope="module")
def layers() -> Prediction:
    with torch.device("meta"):
        module = Layers().bfloat16().to(memory_format=torch.channels_last)
        x = torch.empty(ROWS, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    return predict(module, [x])


def _only(kernels: tuple[generated.Kernel, ...], name: str) -> generated.Kernel:
    (found,) = (kernel for kernel in kernels if kernel.name == name)
    return found


def test_flop_are_those_of_the_formulas(layers: Prediction) -> None:
    conv = 2 * PIXELS * CHANNELS * CHANNELS * 9
    linear = 2 * PIXELS * CHANNELS * 2 * CHANNELS
    attention = 2 * 2 * ROWS * (CHANNELS // 8) * (SIDE * SIDE) ** 2 * 32  # heads of 8 are padded to 32
    forward, backward = layers.forward.kernels, layers.backward.kernels
    assert _only(forward, "aten::convolution").flop == conv
    assert _only(forward, "aten::addmm").flop == linear
    assert _only(forward, "aten::_scaled_dot_product_flash_attention").flop == attention
    assert _only(backward, "aten::convolution_backward").flop == conv  # of the weight alone: x wants no gradient
    assert [k.flop for k in backward if k.name == "aten::mm"] == [linear, linear]
    assert _only(backward, "aten::_scaled_dot_product_flash_attention_backward").flop == 2.5 * attention


def test_bytes_are_those_that_are_read_and_written(layers: Prediction) -> None:
    image, weight = HALF * PIXELS * CHANNELS, HALF * CHANNELS * CHANNELS * 9
    forward, backward = layers.forward.kernels, layers.backward.kernels
    bias = HALF * CHANNELS
    assert _only(forward, "aten::convolution").bytes == 2 * image + weight + bias
    assert _only(forward, "fastgrpo::geglu").bytes == 3 * image
    assert _only(backward, "fastgrpo::geglu_backward").bytes == 5 * image
    # In one pass the convolution's bias is added, which the backward pass wants to know, and SiLU applied.
    assert [k.bytes for k in forward if k.name.startswith("triton")] == [3 * image + bias]
    assert {k.kind for k in forward} == set(generated.CLASSES)
