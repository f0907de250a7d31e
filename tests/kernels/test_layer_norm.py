import pytest
import torch
from helpers import interpreted, on_device, on_kernels, poisoned, ulp
from torch import Tensor

from fastgrpo.kernels import layer_norm as module
from fastgrpo.kernels.layer_norm import MAX_WIDTH, SPEC, layer_norm, reference

CASES = {case.name: case for case in SPEC.cases}
EPS = 1e-5


def arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, eps = CASES[name].make(torch.device("cpu"), dtype, generator)
    assert eps == EPS
    return x, weight, bias, torch.randn(x.shape, generator=generator).to(dtype)


def gradients(function, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float = EPS) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    return torch.autograd.grad(function(*inputs, eps), inputs, dy)


def launch(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, device: str = "cpu") -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias, mean and rstd from the kernels, whose memory held NaN before, on the CPU."""
    x, weight, bias, dy = (on_device(tensor, device) for tensor in (x, weight, bias, dy))
    with poisoned():
        y, mean, rstd = module._launch_forward(x, weight, bias, EPS)
        results = (y, *module._launch_backward(dy, x, weight, mean, rstd, True), mean, rstd)
    return tuple(result.cpu() for result in results)


def expected(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float = EPS) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias in float64."""
    tensors = [tensor.double() for tensor in (x, weight, bias, dy)]
    return reference(*tensors[:3], eps), *gradients(reference, *tensors, eps)


def assert_near(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    rtol, atol = SPEC.tolerance(dtype)
    for name, one, other in zip(("y", "dx", "dweight", "dbias"), actual, wanted, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=rtol, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


@on_kernels
@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype, device: str) -> None:
    tensors = arguments(name, dtype)
    *results, mean, rstd = launch(*tensors, device=device)
    assert [result.dtype for result in results] == [dtype] * 4
    assert mean.dtype == rstd.dtype == torch.float32
    assert mean.shape == rstd.shape == tensors[0].shape[:-1]
    assert_near(tuple(results), expected(*tensors), dtype)


@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, dy = arguments(name, dtype)
    results = (layer_norm(x, weight, bias, EPS), *gradients(layer_norm, x, weight, bias, dy))
    assert_near(results, expected(x, weight, bias, dy), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpreter", [pytest.param(True, marks=interpreted), False])
def test_weights_may_stay_float32_beside_half_precision_inputs(interpreter: bool, dtype: torch.dtype) -> None:
    x, _, _, dy = arguments("24x33", dtype)
    _, weight, bias, _ = arguments("24x33", torch.float32)
    if interpreter:
        results = launch(x, weight, bias, dy)[:4]
    else:
        results = (layer_norm(x, weight, bias, EPS), *gradients(layer_norm, x, weight, bias, dy))
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(results, expected(x, weight, bias, dy), dtype)


def test_on_the_cpu_it_is_pytorch_to_the_last_bit_in_float32() -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    for name in CASES:
        x, weight, bias, dy = arguments(name, torch.float32)
        assert torch.equal(layer_norm(x, weight, bias, EPS), layer(x, weight, bias, EPS))
        ours, theirs = (gradients(function, x, weight, bias, dy) for function in (layer_norm, layer))
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.slow
@on_kernels
@pytest.mark.parametrize(("rows", "width"), [(513 * 8 + 3, 4), (40, 33), (2, MAX_WIDTH)])
def test_rows_are_dealt_out_to_programs_in_runs(rows: int, width: int, device: str) -> None:
    """More than 8 rows for each of 512 programs; several programs, the last with fewer rows; the widest row."""
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(rows, width, generator=generator) for _ in range(2))
    weight, bias = torch.ones(width), torch.zeros(width)
    y, dx, *sums, _, _ = launch(x, weight, bias, dy, device=device)
    exact_y, exact_dx, *exact_sums = expected(x, weight, bias, dy)
    # Sums over rows grow like the root of their number, and no term goes through more than 9 + 8 + 6 additions.
    sums, exact_sums = ([one / rows**0.5 for one in both] for both in (sums, exact_sums))
    assert_near((y, dx, *sums), (exact_y, exact_dx, *exact_sums), torch.float32)


@on_kernels
def test_strides_of_any_kind(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(4, 6, 40, generator=generator)
    for x in (
        wide.transpose(0, 1),
        wide[:, :, ::2],
        wide[1:, ::2, 8:],
        wide[:1].expand(4, 6, 40),
        wide.transpose(1, 2),
    ):
        dy = torch.randn(*x.shape[:-1], 2 * x.shape[-1], generator=generator)[..., ::2]
        weight, bias = torch.randn(2 * x.shape[-1], 2, generator=generator)[::2].unbind(1)
        wanted = expected(x, weight, bias, dy)
        assert_near(launch(x, weight, bias, dy, device=device)[:4], wanted, torch.float32)
        y = layer_norm(x, weight, bias, EPS)
        assert y.is_contiguous()
        assert_near((y, *gradients(layer_norm, x, weight, bias, dy)), wanted, torch.float32)


@on_kernels
def test_a_large_mean_costs_only_its_own_rounding(device: str) -> None:
    """x = 10,000 + noise of deviation 1: a variance from sum(x^2) - sum(x)^2 would have lost seven of float32's digits.

    The mean of 320 numbers near 1e4 is off by a few of their ulps, 2^-10 each, and so is z; the variance is about that
    mean, so its error is the square of this, below 1e-5.
    """
    generator = torch.Generator().manual_seed(3)
    x = 1e4 + torch.randn(3, 320, generator=generator)
    weight, bias = torch.ones(320), torch.zeros(320)
    y, *_, mean, rstd = launch(x, weight, bias, torch.ones_like(x), device=device)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=0, atol=4 * 2**-10)
    torch.testing.assert_close(rstd.double(), (exact.var(-1, correction=0) + EPS).rsqrt(), rtol=2e-5, atol=0)
    torch.testing.assert_close(
        y.double(), reference(exact, weight.double(), bias.double(), EPS), rtol=2e-5, atol=4 * 2**-10
    )


@interpreted
@pytest.mark.parametrize("value", [0.0, 3.0, -6e4, 1e-30])
def test_a_constant_row_becomes_the_bias(value: float) -> None:
    """Its deviations are 0, or as large as the mean's rounding, 2^-22 of the value, over sqrt(eps)."""
    x = torch.full((2, 37), value)
    weight, bias = torch.linspace(-1, 1, 37), torch.linspace(1, 2, 37)
    y, dx, dweight, dbias, _, rstd = launch(x, weight, bias, torch.ones(2, 37))
    slack = min(abs(value) * 2**-22 / EPS**0.5, 6)
    torch.testing.assert_close(y, bias.expand(2, 37), rtol=1e-6, atol=slack)
    assert dx.isfinite().all()
    assert (rstd <= EPS**-0.5 * (1 + 1e-6)).all()
    torch.testing.assert_close(dweight, torch.zeros(37), rtol=0, atol=2 * slack)
    assert torch.equal(dbias, torch.full((37,), 2.0))


@on_kernels
@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_large_and_small_values(dtype: torch.dtype, device: str) -> None:
    """y does not depend on the scale of x as long as the variance is far from eps: 1e4 fits into all three dtypes."""
    x, weight, bias, dy = arguments("24x33", dtype)
    *results, _, _ = launch(x * 1e4, weight, bias, dy, device=device)
    y, dx, dweight, dbias = expected(x * 1e4, weight, bias, dy)
    # dx is about 1e-4: below fp16's normal numbers, whose distance 2^-24 then is the tolerance.
    torch.testing.assert_close(
        results[1].double(), dx, rtol=2 * ulp(dtype), atol=2**-24 if dtype == torch.float16 else 4e-9
    )
    assert_near((results[0], dx, *results[2:]), (y, dx, dweight, dbias), dtype)


@on_kernels
def test_the_same_inputs_give_the_same_bits(device: str) -> None:
    tensors = arguments("24x33", torch.float32)
    assert all(map(torch.equal, launch(*tensors, device=device), launch(*tensors, device=device)))


@interpreted
def test_a_row_is_normalised_alike_wherever_it_stands() -> None:
    x, weight, bias, dy = arguments("24x33", torch.float32)
    y, dx, *_ = launch(x, weight, bias, dy)
    for row in (0, 1, 7, 23):
        alone_y, alone_dx, *_ = launch(x[row : row + 1], weight, bias, dy[row : row + 1])
        # Only the tile's height differs, and no sum goes across rows.
        torch.testing.assert_close(alone_y[0], y[row], rtol=0, atol=2 * ulp(torch.float32))
        torch.testing.assert_close(alone_dx[0], dx[row], rtol=0, atol=2 * ulp(torch.float32) * dx.abs().max().item())


@pytest.mark.parametrize("interpreter", [pytest.param(True, marks=interpreted), False])
def test_frozen_weights_get_no_gradients(interpreter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, dy = arguments("24x33", torch.float32)
    if interpreter:
        _, mean, rstd = module._launch_forward(x, weight, bias, EPS)
        dx, dweight, dbias = module._launch_backward(dy, x, weight, mean, rstd, False)
        assert dweight.numel() == dbias.numel() == 0
        assert torch.equal(dx, module._launch_backward(dy, x, weight, mean, rstd, True)[0])
        return
    asked = []
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *given: asked.append(given[-1]) or backward(*given))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias, EPS), x, dy)
    assert asked == [False]
    assert torch.equal(dx, gradients(layer_norm, x, weight, bias, dy)[0])
    assert asked == [False, True]
    bias.requires_grad_()
    (dbias,) = torch.autograd.grad(layer_norm(x.detach(), weight, bias, EPS), bias, dy)
    torch.testing.assert_close(dbias, dy.sum(0))


@interpreted
def test_no_rows() -> None:
    x, weight = torch.empty(0, 5), torch.ones(5)
    with poisoned():
        y, mean, rstd = module._launch_forward(x, weight, weight, EPS)
        dx, dweight, dbias = module._launch_backward(x, x, weight, mean, rstd, True)
    assert y.shape == dx.shape == (0, 5)
    assert torch.equal(dweight, torch.zeros(5))
    assert torch.equal(dbias, torch.zeros(5))


@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(affine: bool) -> None:
    for name in ("1x1", "2x3x320"):
        x, weight, bias, dy = arguments(name, torch.float32)
        inputs = (x.requires_grad_(), weight.requires_grad_(affine), bias.requires_grad_(affine), EPS)
        torch.library.opcheck(module._forward, inputs)
        _, mean, rstd = module._forward(*inputs)
        torch.library.opcheck(module._backward, (dy, x.detach(), weight.detach(), mean, rstd, affine))


def test_what_it_does_not_take() -> None:
    x, ones = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"^layer_norm: x is torch\.float64, .* the same for weight and bias\.$"):
        layer_norm(x.double(), ones, ones, EPS)
    with pytest.raises(ValueError, match=r"weight torch\.float16, bias torch\.float32"):
        layer_norm(x, ones.half(), ones, EPS)
    wide = torch.zeros(1, MAX_WIDTH + 1)
    for given, weight in ((x, torch.ones(3)), (x, torch.ones(1, 4)), (wide, wide[0]), (torch.tensor(1.0), ones)):
        with pytest.raises(ValueError, match=r"^layer_norm: x is \(.* with C from 1 to 4096\.$"):
            layer_norm(given, weight, weight, EPS)
