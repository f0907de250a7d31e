"""What would run on a GPU, counted without one: kernels, bytes and FLOP of a module against numbers by hand."""

import forecast
import generated
import pytest
import torch
from absent import absent_device
from generated import SPEEDS, Kernel, Prediction, predict
from torch import Tensor, nn
from torch.utils._triton import has_triton
from watch import DeviceWait, Watch

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.kernels.geglu import geglu
from fastgrpo.rewards.encoder import tf32_products

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
    has_triton()  # what torch remembers of the real machine is not what counts
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


def test_outputs_and_memory_are_those_of_the_graph(layers: Prediction) -> None:
    """The forward pass returns its output and what the backward pass wants, each buffer once and inputs as they are."""
    forward = layers.forward
    assert forward.outputs[0].shape == (ROWS, CHANNELS // 8, SIDE * SIDE, 8)
    kept = {output.name for output in forward.outputs} & set(forward.inputs)
    assert len(kept) == 3  # x and two weights; biases are not wanted
    image = HALF * PIXELS * CHANNELS
    assert 6 * image <= forward.transient <= 8 * image  # convolution, SiLU, two of the linear layer's, GEGLU, attention


# ---------------------------------------------------------------------------------------------------------------------
# Operators that are called one by one


WAITING = {
    "a number": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.sum() > 0 else 2,
    "how many are not 0": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.zeros(3).to(x.device),
    "into memory of the host": lambda x: torch.zeros(x.shape).copy_(x),
}
GOING_ON = {
    "indices": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "a copy that is not waited for": lambda x: x.to("cpu", non_blocking=True),
    "where": lambda x: torch.where(x > 0, x, 0),
    "the host's own numbers": lambda x: torch.zeros(3).add(1),
    "another dtype": lambda x: x.to(torch.float64),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_an_error_that_names_operator_and_place(name: str) -> None:
    with absent_device(), Watch(SPEEDS) as watch, watch.phase("update"):
        x = torch.empty(4, 5, device="cuda")
        with pytest.raises(
            DeviceWait, match=r"aten\.\w+.*waits for the device in update, called at tests/bench/test_forecast.py"
        ):
            WAITING[name](x)


@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_wait_is_no_error(name: str) -> None:
    with absent_device(), Watch(SPEEDS) as watch, watch.phase("update"):
        GOING_ON[name](torch.empty(4, 5, device="cuda"))


def test_launches_bytes_and_memory_of_operators() -> None:
    watch = Watch(SPEEDS)
    with absent_device(), watch, watch.phase("update"):
        x = torch.empty(1000, 64, device="cuda")
        y = x.view(64, 1000) @ x + 1  # a view is no launch; the product is gone after the sum
        x.copy_(x.clone())
        del x, y
        torch.empty(10, device="cuda").zero_()
    total = watch.totals["update", "the rest"]
    big, small = 4 * 64000, 4 * 64 * 64
    assert total.launches == 5
    assert total.bytes == (2 * big + small) + 2 * small + 2 * big + 2 * big + 40
    assert total.flop == 2 * 64 * 64 * 1000
    assert watch.peaks["update"] == 2 * big + small


def test_what_is_let_go_is_no_longer_counted() -> None:
    with absent_device(), Watch(SPEEDS) as watch, watch.phase("decoding"):
        x, weight = torch.empty(2, 64, 16, 16, device="cuda"), torch.empty(64, 64, 3, 3, device="cuda")
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        assert watch._live == 4 * (2 * x.numel() + weight.numel())
        del x, y, weight
        assert watch._live == 0


def test_float32_products_are_slower_than_tf32() -> None:
    def seconds() -> float:
        watch = Watch(SPEEDS)
        with absent_device(), watch, watch.phase("reward"):
            torch.empty(4096, 4096, device="cuda") @ torch.empty(4096, 4096, device="cuda")
        return watch.totals["reward", "the rest"].seconds

    plain = seconds()
    with tf32_products():
        assert plain / seconds() == pytest.approx(SPEEDS.tf32 / SPEEDS.single)


def test_the_table_says_that_it_predicts_and_sums_phases() -> None:
    watch = Watch(SPEEDS)
    for phase, part, seconds in (
        ("rollout", "UNet forward", 14.0),
        ("decoding", "the rest", 1.0),
        ("reward", "the rest", 0.25),
        ("update", "UNet backward", 30.0),
        ("optimizer", "the rest", 0.125),
    ):
        with watch.phase(phase):
            kind = generated.ATTENTION if part == "UNet backward" else ""
            watch._add(part, Kernel(part, kind, 1e12, 10**9, seconds))
    rows = forecast.phases(watch)
    found = {
        "images": 64, "device": "NVIDIA H200", "attention": "cudnn", "speeds": {"cudnn": 2.0},
        "torch": "2", "triton": "3", "commit": "c", "date": "d",
        "micro_batch": 33, "chosen": {"size": 33, "ms_a_pair": {22: 1.0, 33: 1.0}}, "padding": 0.01,
        "seconds": sum(row["seconds"] for row in rows), "phases": rows,
        "unet_us_a_row": {"forward": dict.fromkeys(generated.CLASSES, 100.0)},
        "memory": [{"stage": "update", "traced_gb": 80.0, "planned_gb": 79.0}],
    }  # fmt: skip
    measured = {
        "rows": [
            {"name": "fastgrpo", "images": 64, "values": {f"time/{s}_s": 9.0 for s in ("rollout", "reward", "update")}}
        ]
    }
    text = forecast.table(found, measured)
    assert text.startswith("**PREDICTED, not measured**")
    assert "45.4 s" in text
    assert "With flash attention, 30.0 s more: 75.4 s." in text
    assert "| **rollout** | all | | | | **15.00** | 9.00 |" in text
    assert "| **update** | all | | | | **30.12** | 9.00 |" in text
    assert "| forward | 100 | 100 | 100 | 100 | 100 | 500 |" in text
