import pytest
import torch
from torch import Tensor

from fastgrpo.kernels import geglu as module
from fastgrpo.kernels import program_sums
from fastgrpo.kernels.geglu import geglu, reference
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.specs.geglu import SPEC
from support.kernels import interpreted, on_device, on_kernels, poisoned, ulp

CASES = {case.name: case for case in SPEC.cases}


def arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """An input, a bias or None, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, *bias = CASES[name].make(torch.device("cpu"), dtype, generator)
    dy = torch.randn(*x.shape[:-1], x.shape[-1] // 2, generator=generator).to(dtype)
    return x, bias[0] if bias else None, dy


def differentiate(function, x: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and, with a bias, dbias by autograd."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, bias) if tensor is not None]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def launch(x: Tensor, bias: Tensor | None, dy: Tensor, device: str) -> tuple[Tensor, ...]:
    """y, dx and, with a bias, dbias from the kernels, whose memory held NaN before, on the CPU."""
    x, dy = on_device(x, device), on_device(dy, device)
    bias = None if bias is None else on_device(bias, device)
    with poisoned():
        y, (dx, dbias) = module._launch_forward(x, bias), module._launch_backward(dy, x, bias, bias is not None)
    return tuple(result.cpu() for result in ((y, dx) if bias is None else (y, dx, dbias)))


def expected(x: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    return differentiate(reference, x.double(), None if bias is None else bias.double(), dy.double())


def assert_near(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    rtol, atol = SPEC.tolerance(dtype)
    for name, one, other in zip(("y", "dx", "dbias")[: len(wanted)], actual, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype, device: str) -> None:
    tensors = arguments(name, dtype)
    results = launch(*tensors, device)
    assert {result.dtype for result in results} == {dtype}
    assert [result.shape for result in results] == [tensors[2].shape, *(t.shape for t in tensors[:2] if t is not None)]
    assert_near(results, expected(*tensors), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    tensors = arguments(name, dtype)
    assert_near(differentiate(geglu, *tensors), expected(*tensors), dtype)


@on_kernels
def test_rows_are_dealt_out_to_programs_in_runs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Three programs of 32, 32 and 5 rows beside three more for the other columns; a float32 bias beside bfloat16."""
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(69, 20, generator=generator).bfloat16(), torch.randn(69, 10, generator=generator).bfloat16()
    bias = torch.randn(20, generator=generator)
    monkeypatch.setattr(module, "_COLUMNS", 8)
    monkeypatch.setattr(module, "_BACKWARD_TILE", 64)
    recorded = []
    sum_programs = program_sums.sum_programs
    monkeypatch.setattr(
        program_sums, "sum_programs", lambda parts, d: recorded.append(len(parts)) or sum_programs(parts, d)
    )
    *results, dbias = launch(x, bias, dy, device)
    *wanted, exact = expected(x, bias, dy)
    assert recorded == [3]
    assert_near(tuple(results), tuple(wanted), torch.bfloat16)
    assert dbias.dtype == torch.float32
    # 69 terms below 25, of which no more than 4 + 3 + 6 additions go into any sum: rounding by half an ulp of 32 each.
    torch.testing.assert_close(dbias.double(), exact, rtol=0, atol=13 * 16 * ulp(torch.float32))
    assert all(map(torch.equal, (*results, dbias), launch(x, bias, dy, device)))


def test_a_run_is_whole_tiles_and_programs_are_few() -> None:
    for rows, width in ((32 * 4096, 1280), (66 * 4096, 1280), (32 * 1024, 2560), (33 * 256, 5120), (22 * 64, 5120)):
        across, blocks = module._blocks(rows, width, module._BACKWARD_TILE)
        run = module._run(rows, across, blocks["ROWS"], True)
        assert run % blocks["ROWS"] == 0
        programs = -(-rows // run)
        assert 132 < programs * across <= module._MAX_PROGRAMS
        # Sums, written and read, beside dy, x and dx in half precision.
        assert programs * 2 * width * 4 * 2 <= 0.05 * rows * width * 10
        assert module._run(rows, across, blocks["ROWS"], False) == blocks["ROWS"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_cpu_it_is_diffusers_to_the_last_bit(dtype: torch.dtype) -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    layer = activations.GEGLU(24, 96).to(dtype)
    layer.proj = torch.nn.Identity()  # what is left of it is the activation
    for name in CASES:
        x, _, dy = arguments(name, dtype)
        assert all(map(torch.equal, differentiate(geglu, x, None, dy), differentiate(layer, x, None, dy)))


@on_kernels
def test_strides_of_any_kind(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(4, 6, 40, generator=generator)
    for x in (wide.transpose(0, 1), wide[:, :, ::2], wide[1:, ::2, 8:], wide[:1].expand(4, 6, 40)):
        dy = torch.randn(x.shape, generator=generator)[..., ::2]
        for bias in (None, torch.randn(x.shape[-1], 2, generator=generator)[:, 0]):
            wanted = expected(x, bias, dy)
            assert_near(launch(x, bias, dy, device), wanted, torch.float32)
            results = differentiate(geglu, x, bias, dy)
            assert results[0].is_contiguous()
            assert_near(results, wanted, torch.float32)


@on_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered")  # 1e38 squared is infinite, as it should be
def test_extreme_gates_give_the_limits_of_gelu(device: str) -> None:
    """From 15 standard deviations on float32 holds Phi as exactly 0 or 1 and phi as 0, and nothing may be NaN."""
    gate = torch.tensor([15.0, 1e4, 1e19, 1e38, -15.0, -1e4, -1e19, -1e38, 0.0])
    cdf = (gate > 0).float()
    cdf[-1] = 0.5
    x = torch.cat((torch.full_like(gate, 0.5), gate))[None]
    y, dx = launch(x, None, torch.full((1, 9), 2.0), device)
    assert torch.equal(y[0], 0.5 * gate * cdf)
    assert torch.equal(dx[0], torch.cat((2 * gate * cdf, cdf)))


@interpreted
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    x, bias = torch.empty(shape), torch.ones(shape[1])
    y, dx, dbias = launch(x, bias, torch.empty(shape[0], shape[1] // 2), "cpu")
    assert y.shape == (shape[0], shape[1] // 2)
    assert dx.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[1]))


def test_the_tails_are_exact_enough() -> None:
    """Where Phi is small, y = h g Phi(g) is a small number with the absolute error of Phi, times h g.

    Libraries compute erf in float32 by polynomials of some ten terms (oneDNN another one for each instruction set),
    around numbers up to 1: a dozen roundings by half an ulp of 1, and as much again for the polynomial and for what is
    around it.
    """
    gate = torch.linspace(-6, 6, 40001)
    x = torch.cat((torch.ones_like(gate), gate))[None]
    error = (geglu(x) - reference(x.double())).abs()[0]
    assert (error <= 12 * ulp(torch.float32) * gate.abs() + 1e-12).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frozen"), [("3x7 bias", False), ("3x7 bias", True), ("2x3x128", False)])
def test_opcheck(name: str, frozen: bool) -> None:
    x, bias, dy = arguments(name, torch.float32)
    bias = None if bias is None else bias.requires_grad_(not frozen)
    torch.library.opcheck(module._forward, (x.requires_grad_(), bias))
    sums = bias is not None and not frozen
    torch.library.opcheck(module._backward, (dy, x.detach(), None if bias is None else bias.detach(), sums))


def test_a_frozen_bias_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias, dy = arguments("9x257 bias", torch.float32)
    asked = []
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *given: asked.append(given[3]) or backward(*given))
    (dx,) = torch.autograd.grad(geglu(x.requires_grad_(), bias), x, dy)
    assert asked == [False]
    assert torch.equal(dx, differentiate(geglu, x, bias, dy)[1])
    assert asked == [False, True]


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.float64), torch.tensor(1.0)])
def test_what_it_does_not_take(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^geglu: x is torch\.float"):
        geglu(x)
    for bias in (torch.zeros(2), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^geglu: bias is torch\.float.* of shape \(4,\)\.$"):
            geglu(torch.zeros(2, 4), bias)


def test_one_row_of_tiles_covers_the_widths_without_idle_lanes() -> None:
    for width in (1280, 2560, 5120):
        for tile in (module._TILE, module._BACKWARD_TILE):
            across, blocks = module._blocks(16 * 64, width, tile)
            assert blocks["COLUMNS"] * across == width
            assert blocks["ROWS"] * blocks["COLUMNS"] == tile
