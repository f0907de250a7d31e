import pytest
import torch
from torch import Tensor

from fastgrpo.kernels import layer_norm as module
from fastgrpo.kernels.layer_norm import MAX_WIDTH, layer_norm, reference
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.specs.layer_norm import SPEC
from support.kernels import interpreted, on_device, on_kernels, poisoned, ulp

CASES = {case.name: case for case in SPEC.cases}
EPS = 1e-5


def arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias, a gradient of y, a residual and a gradient of the sum."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, eps, residual = CASES[name].make(torch.device("cpu"), dtype, generator)
    assert eps == EPS
    dy, dsum = (torch.randn(x.shape, generator=generator).to(dtype) for _ in range(2))
    return x, weight, bias, dy, residual, dsum


def without_residual(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return arguments(name, dtype)[:4]


def differentiate(
    function, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, residual=None, dsum=None, eps: float = EPS
) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias and, with a residual, the sum and dresidual, by autograd."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    if residual is None:
        y = function(*inputs, eps)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)
    inputs.append(residual.detach().requires_grad_())
    total, y = function(*inputs[:3], eps, inputs[3])
    *gradients, dresidual = torch.autograd.grad((total, y), inputs, (dsum, dy))
    return y.detach(), *gradients, total.detach(), dresidual


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, residual=None, dsum=None, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias, the sum, mean and rstd from the kernels, whose memory held NaN before, on the CPU."""
    x, weight, bias, dy = (on_device(tensor, device) for tensor in (x, weight, bias, dy))
    residual, dsum = (None if tensor is None else on_device(tensor, device) for tensor in (residual, dsum))
    with poisoned():
        y, total, mean, rstd = module._launch_forward(x, weight, bias, EPS, residual)
        normalised = x if residual is None else total
        dx, vectors = module._launch_backward(dy, normalised, weight, mean, rstd, True, dsum)
    return tuple(result.cpu() for result in (y, dx, *vectors, total, mean, rstd))


def expected(*tensors: Tensor, eps: float = EPS) -> tuple[Tensor, ...]:
    """What `differentiate` gives, in float64."""
    return differentiate(reference, *(tensor.double() for tensor in tensors), eps=eps)


def assert_near(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    rtol, atol = SPEC.tolerance(dtype)
    names = ("y", "dx", "dweight", "dbias", "sum", "dresidual")[: len(wanted)]
    for name, one, other in zip(names, actual, wanted, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=rtol, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype, device: str) -> None:
    tensors = arguments(name, dtype)
    *results, mean, rstd = launch(*tensors, device=device)
    assert [result.dtype for result in results] == [dtype] * 5
    assert mean.dtype == rstd.dtype == torch.float32
    assert mean.shape == rstd.shape == tensors[0].shape[:-1]
    assert_near(tuple(results), expected(*tensors)[:5], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    for tensors in (arguments(name, dtype), without_residual(name, dtype)):
        assert_near(differentiate(layer_norm, *tensors), expected(*tensors), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_its_norm_the_input_itself(dtype: torch.dtype) -> None:
    """The gradient that comes by way of it is added in the operator, once rounded; nothing is copied."""
    x, weight, bias, dy, _, dx = arguments("24x33", dtype)

    def kept(function, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        same, y = function(*inputs, EPS, None, True)
        assert torch.equal(same, x)
        assert same.data_ptr() == x.data_ptr()
        return y.detach(), *torch.autograd.grad((same, y), inputs, (dx, dy))

    results = kept(layer_norm, x, weight, bias, dy, dx)
    exact = [tensor.double() for tensor in (x, weight, bias, dy, dx)]
    assert_near(results, kept(reference, *exact), dtype)
    with torch.no_grad():
        assert torch.equal(layer_norm(x, weight, bias, EPS, keep=True)[1], results[0])


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_normalised_is_the_sum_as_it_is_stored(dtype: torch.dtype, device: str) -> None:
    """With a residual or alone, to the last bit: where the sum's gradient is 0, nothing is added."""
    x, weight, bias, dy = without_residual("24x33", dtype)
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    y, dx, dweight, dbias, total, mean, rstd = launch(x, weight, bias, dy, residual, torch.zeros_like(dy), device)
    torch.testing.assert_close(total.double(), x.double() + residual.double(), rtol=ulp(dtype), atol=0)
    assert not torch.equal(total.double(), x.double() + residual.double())
    alone = launch(total, weight, bias, dy, device=device)
    assert all(map(torch.equal, (y, dx, dweight, dbias, mean, rstd), (*alone[:4], *alone[5:])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpreter", [pytest.param(True, marks=interpreted), False])
def test_weights_may_stay_float32_beside_half_precision_inputs(interpreter: bool, dtype: torch.dtype) -> None:
    x, _, _, dy = without_residual("24x33", dtype)
    _, weight, bias, _ = without_residual("24x33", torch.float32)
    results = launch(x, weight, bias, dy)[:4] if interpreter else differentiate(layer_norm, x, weight, bias, dy)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(results, expected(x, weight, bias, dy), dtype)


def test_on_the_cpu_it_is_pytorch_to_the_last_bit_in_float32() -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None):
        total = x if residual is None else x + residual
        y = torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)
        return y if residual is None else (total, y)

    for name in CASES:
        for tensors in (arguments(name, torch.float32), without_residual(name, torch.float32)):
            assert all(map(torch.equal, differentiate(layer_norm, *tensors), differentiate(layer, *tensors)))


@pytest.mark.slow
@on_kernels
@pytest.mark.parametrize(("rows", "width"), [(513 * 8 + 3, 4), (40, 33), (2, MAX_WIDTH)])
def test_rows_are_dealt_out_to_programs_in_runs(rows: int, width: int, device: str) -> None:
    """More than 8 rows for each of 512 programs; several programs, the last with fewer rows; the widest row."""
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(rows, width, generator=generator) for _ in range(2))
    weight, bias = torch.ones(width), torch.zeros(width)
    y, dx, *sums = launch(x, weight, bias, dy, device=device)[:4]
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
        results = differentiate(layer_norm, x, weight, bias, dy)
        assert results[0].is_contiguous()
        assert_near(results, wanted, torch.float32)
        with_residual = x, weight, bias, dy, dy, dy[:1, :1, :1].expand(dy.shape)
        wanted = expected(*with_residual)
        assert_near(launch(*with_residual, device=device)[:5], wanted[:5], torch.float32)
        assert_near(differentiate(layer_norm, *with_residual), wanted, torch.float32)


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
    y, dx, dweight, dbias, _, _, rstd = launch(x, weight, bias, torch.ones(2, 37))
    slack = min(abs(value) * 2**-22 / EPS**0.5, 6)
    torch.testing.assert_close(y, bias.expand(2, 37), rtol=1e-6, atol=slack)
    assert dx.isfinite().all()
    assert (rstd <= EPS**-0.5 * (1 + 1e-6)).all()
    torch.testing.assert_close(dweight, torch.zeros(37), rtol=0, atol=2 * slack)
    assert torch.equal(dbias, torch.full((37,), 2.0))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_values(dtype: torch.dtype, device: str) -> None:
    """y does not depend on the scale of x as long as the variance is far from eps: 1e4 fits into all three dtypes."""
    x, weight, bias, dy = without_residual("24x33", dtype)
    results = launch(x * 1e4, weight, bias, dy, device=device)[:4]
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
    x, weight, bias, dy = without_residual("24x33", torch.float32)
    y, dx, *_ = launch(x, weight, bias, dy)
    for row in (0, 1, 7, 23):
        alone_y, alone_dx, *_ = launch(x[row : row + 1], weight, bias, dy[row : row + 1])
        # Only the tile's height differs, and no sum goes across rows.
        torch.testing.assert_close(alone_y[0], y[row], rtol=0, atol=2 * ulp(torch.float32))
        torch.testing.assert_close(alone_dx[0], dx[row], rtol=0, atol=2 * ulp(torch.float32) * dx.abs().max().item())


@pytest.mark.parametrize("interpreter", [pytest.param(True, marks=interpreted), False])
def test_frozen_weights_get_no_gradients(interpreter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, dy = without_residual("24x33", torch.float32)
    if interpreter:
        _, _, mean, rstd = module._launch_forward(x, weight, bias, EPS, None)
        dx, vectors = module._launch_backward(dy, x, weight, mean, rstd, False, None)
        assert vectors.shape == (2, 0)
        assert torch.equal(dx, module._launch_backward(dy, x, weight, mean, rstd, True, None)[0])
        return
    asked = []
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *given: asked.append(given[5]) or backward(*given))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias, EPS), x, dy)
    assert asked == [False]
    assert torch.equal(dx, differentiate(layer_norm, x, weight, bias, dy)[1])
    assert asked == [False, True]
    bias.requires_grad_()
    (dbias,) = torch.autograd.grad(layer_norm(x.detach(), weight, bias, EPS), bias, dy)
    torch.testing.assert_close(dbias, dy.sum(0))


@interpreted
def test_no_rows() -> None:
    x, weight = torch.empty(0, 5), torch.ones(5)
    y, dx, dweight, dbias, total, *_ = launch(x, weight, weight, x, x, x)
    assert y.shape == dx.shape == total.shape == (0, 5)
    assert torch.equal(dweight, torch.zeros(5))
    assert torch.equal(dbias, torch.zeros(5))


@pytest.mark.parametrize(("affine", "with_residual"), [(True, True), (True, False), (False, True)])
def test_opcheck(affine: bool, with_residual: bool) -> None:
    for name in ("1x1", "2x3x320"):
        x, weight, bias, dy, residual, dsum = arguments(name, torch.float32)
        residual, dsum = (residual.requires_grad_(), dsum) if with_residual else (None, None)
        inputs = (x.requires_grad_(), weight.requires_grad_(affine), bias.requires_grad_(affine), EPS, residual)
        torch.library.opcheck(module._forward, inputs)
        _, _, mean, rstd = module._forward(*inputs)
        torch.library.opcheck(module._backward, (dy, x.detach(), weight.detach(), mean, rstd, affine, dsum))


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
    for residual in (torch.zeros(4), x.half()):
        with pytest.raises(
            ValueError, match=r"^layer_norm: residual is .*; x's torch\.float32 \(2, 4\) is accepted\.$"
        ):
            layer_norm(x, ones, ones, EPS, residual)
