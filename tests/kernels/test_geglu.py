import pytest
import torch
from helpers import interpreted, on_device, on_kernels, poisoned, ulp
from torch import Tensor

from fastgrpo.kernels import geglu as module
from fastgrpo.kernels.geglu import SPEC, geglu, reference

CASES = {case.name: case for case in SPEC.cases}


def gradient(function, x: Tensor, dy: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, dy)[0]


def arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    (x,) = CASES[name].make(torch.device("cpu"), dtype, generator)
    return x, torch.randn(*x.shape[:-1], x.shape[-1] // 2, generator=generator).to(dtype)


def launch(x: Tensor, dy: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """y and dx from the kernels, whose memory held NaN before, on the CPU."""
    x, dy = on_device(x, device), on_device(dy, device)
    with poisoned():
        y, dx = module._launch_forward(x), module._launch_backward(dy, x)
    return y.cpu(), dx.cpu()


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = SPEC.tolerance(dtype)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@on_kernels
@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype, device: str) -> None:
    x, dy = arguments(name, dtype)
    y, dx = launch(x, dy, device)
    assert y.dtype == dx.dtype == dtype
    assert y.shape == dy.shape
    assert dx.shape == x.shape
    assert_near(y, reference(x.double()), dtype)
    assert_near(dx, gradient(reference, x.double(), dy.double()), dtype)


@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    x, dy = arguments(name, dtype)
    assert_near(geglu(x), reference(x.double()), dtype)
    assert_near(gradient(geglu, x, dy), gradient(reference, x.double(), dy.double()), dtype)


@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_on_the_cpu_it_is_diffusers_to_the_last_bit(dtype: torch.dtype) -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    layer = activations.GEGLU(24, 96).to(dtype)
    layer.proj = torch.nn.Identity()  # what is left of it is the activation
    for name in CASES:
        x, dy = arguments(name, dtype)
        assert torch.equal(geglu(x), layer(x))
        assert torch.equal(gradient(geglu, x, dy), gradient(layer, x, dy))


@on_kernels
def test_strides_of_any_kind(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(4, 6, 40, generator=generator)
    for x in (wide.transpose(0, 1), wide[:, :, ::2], wide[1:, ::2, 8:], wide[:1].expand(4, 6, 40)):
        dy = torch.randn(x.shape, generator=generator)[..., ::2]
        with poisoned():
            y, dx = launch(x, dy, device)
        assert_near(y, reference(x.double()), torch.float32)
        assert_near(dx, gradient(reference, x.double(), dy.double()), torch.float32)
        assert geglu(x).is_contiguous()
        assert_near(geglu(x), reference(x.double()), torch.float32)
        assert_near(gradient(geglu, x, dy), gradient(reference, x.double(), dy.double()), torch.float32)


@on_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered")  # 1e38 squared is infinite, as it should be
def test_extreme_gates_give_the_limits_of_gelu(device: str) -> None:
    """From 15 standard deviations on float32 holds Phi as exactly 0 or 1 and phi as 0, and nothing may be NaN."""
    gate = torch.tensor([15.0, 1e4, 1e19, 1e38, -15.0, -1e4, -1e19, -1e38, 0.0])
    cdf = (gate > 0).float()
    cdf[-1] = 0.5
    x = torch.cat((torch.full_like(gate, 0.5), gate))[None]
    y, dx = launch(x, torch.full((1, 9), 2.0), device)
    assert torch.equal(y[0], 0.5 * gate * cdf)
    assert torch.equal(dx[0], torch.cat((2 * gate * cdf, cdf)))


@interpreted
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    assert module._launch_forward(x).shape == (shape[0], shape[1] // 2)
    assert module._launch_backward(torch.empty(shape[0], shape[1] // 2), x).shape == shape


def test_the_tails_are_exact_enough() -> None:
    """Where Phi is small, y = h g Phi(g) is a small number with the absolute error of Phi, times h g.

    Libraries compute erf in float32 by polynomials of some ten terms (oneDNN another one for each instruction set), around
    numbers up to 1: a dozen roundings by half an ulp of 1, and as much again for the polynomial and for what is around it.
    """
    gate = torch.linspace(-6, 6, 40001)
    x = torch.cat((torch.ones_like(gate), gate))[None]
    error = (geglu(x) - reference(x.double())).abs()[0]
    assert (error <= 12 * ulp(torch.float32) * gate.abs() + 1e-12).all()


@pytest.mark.slow
def test_opcheck() -> None:
    for name in ("1x1", "2x3x128"):
        x, dy = arguments(name, torch.float32)
        torch.library.opcheck(module._forward, (x.requires_grad_(),))
        torch.library.opcheck(module._backward, (dy, x.detach()))


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.float64), torch.tensor(1.0)])
def test_what_it_does_not_take(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^geglu: x is torch\.float"):
        geglu(x)


def test_one_row_of_tiles_covers_the_widths_without_idle_lanes() -> None:
    for width in (1280, 2560, 5120):
        grid, blocks = module._blocks(16 * 64, width)
        assert blocks["COLUMNS"] * grid[1] == width
        assert blocks["ROWS"] * grid[0] == 16 * 64
