"""The optimizer step on flat buffers: against torch.optim.AdamW, a float64 recursion, and exact sums."""

import math
from collections.abc import Iterator

import pytest
import safetensors.torch
import torch
from torch import Tensor

import fastgrpo  # noqa: F401
from fastgrpo.kernels import fused_adamw as module
from fastgrpo.kernels.fused_adamw import AdamWArguments, clip_coefficient, fused_adamw, global_norm
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.specs.fused_adamw import SPEC
from support.kernels import interpreted, on_gpu, on_kernels, poisoned

U = 2.0**-24  # half an ulp of 1 in float32
OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture(params=[pytest.param("triton", marks=interpreted), pytest.param("gpu", marks=on_gpu), "cpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The public functions run Triton's kernels, interpreted or on the GPU, or PyTorch's; memory is poisoned."""
    if request.param == "triton":
        monkeypatch.setattr(module, "_adamw_operator", module._launch_fused_adamw)
        monkeypatch.setattr(module, "_norm_operator", module._launch_global_norm)
        monkeypatch.setattr(module, "_clip_operator", module._launch_clip_coefficient)
    with torch.device("cuda" if request.param == "gpu" else "cpu"), poisoned():
        yield request.param


def draw(n: int, seed: int = 0) -> Tensor:
    """The same numbers on whatever the default device is."""
    numbers = torch.randn(n, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def state(n: int, steps: float = 0.0) -> dict[str, Tensor]:
    """A state in the midst of training, at `steps`; a new one at 0."""
    moments = torch.zeros(n), torch.zeros(n)
    if steps:
        moments = draw(n, 1), draw(n, 2).square()
    return {
        "parameters": draw(n),
        "exp_avg": moments[0],
        "exp_avg_sq": moments[1],
        "step": torch.tensor([steps]),
    }


def learning_rate(lr: float = 1e-3) -> Tensor:
    return torch.tensor([lr], dtype=torch.float64)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name in first:
        assert torch.equal(first[name], second[name]), name


def torch_adamw(start: dict[str, Tensor], gradients: list[Tensor], lr: float, options: dict[str, float]) -> dict:
    """torch.optim.AdamW from the same state, on the CPU."""
    start = {name: tensor.cpu().clone() for name, tensor in start.items()}
    parameter = torch.nn.Parameter(start["parameters"])
    betas = (options["beta1"], options["beta2"])
    optimizer = torch.optim.AdamW(
        [parameter], lr=lr, betas=betas, eps=options["eps"], weight_decay=options["weight_decay"]
    )
    moments = {name: start[name] for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": start["step"][0], **moments}
    for gradient in gradients:
        parameter.grad = gradient.cpu()
        optimizer.step()
    end = optimizer.state[parameter]
    return {
        "parameters": parameter.data,
        "exp_avg": end["exp_avg"],
        "exp_avg_sq": end["exp_avg_sq"],
        "step": end["step"].reshape(1),
    }


CONFIGURATIONS = [
    OPTIONS,
    {"beta1": 0.3, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.0},  # lerp goes from the other end
    {"beta1": 0.0, "beta2": 0.5, "eps": 1e-6, "weight_decay": 3.0},
]


@pytest.mark.parametrize("options", CONFIGURATIONS)
@pytest.mark.parametrize("n", [1, 7, 1023, 70_001])
def test_on_the_cpu_the_bits_are_those_of_torch(n: int, options: dict[str, float]) -> None:
    """100 steps; the largest n has more than one chunk."""
    ours, steps = state(n), 100 if n < 10_000 else 3
    gradients = [draw(n, 10 + seed) for seed in range(steps)]
    expected = torch_adamw(ours, gradients, 3e-3, options)
    for gradient in gradients:
        fused_adamw(**ours, gradient=gradient, lr=learning_rate(3e-3), **options)
    assert_same(ours, expected)


@on_kernels
@pytest.mark.parametrize("options", CONFIGURATIONS)
@pytest.mark.parametrize("steps", [0.0, 1.0, 9.0, 999.0, 1e6])
@pytest.mark.parametrize("n", [1, 1100])
def test_a_step_of_triton_is_that_of_torch_to_the_last_digits(
    n: int, steps: float, options: dict[str, float], device: str
) -> None:
    ours, lr, gradient = state(n, steps), 1e-2, draw(n, 5)
    before = copied(ours)
    expected = torch_adamw(ours, [gradient], lr, options)
    launched = AdamWArguments(**ours, gradient=gradient, lr=learning_rate(lr), **options)
    launched = AdamWArguments(*(a.to(device) if isinstance(a, Tensor) else a for a in launched))
    with poisoned():
        module._launch_fused_adamw(*launched)
    ours = {name: getattr(launched, name).cpu() for name in ours}
    assert torch.equal(ours["step"], expected["step"])
    # They may differ by one fused multiply-add in each moment: a rounding of its product (2 U of at most these sizes),
    # and by the last digit of sqrt, which torch takes from a library that is off by 1 ulp.
    size = before["exp_avg"].abs() + gradient.abs()
    assert ((ours["exp_avg"] - expected["exp_avg"]).abs() <= 4 * U * size).all()
    square = expected["exp_avg_sq"]
    assert ((ours["exp_avg_sq"] - square).abs() <= 4 * U * square).all()
    # The update lr * m / denominator then differs by m's 4 U, v's 4 U / 2, and 2 U each for sqrt, two divisions, the
    # sum with eps, the product and the coefficients; and one rounding of the new parameter.
    t = steps + 1
    denominator = (square.double() / (1 - options["beta2"] ** t)).sqrt() + options["eps"]
    update = lr / (1 - options["beta1"] ** t) * size.double() / denominator
    bound = 18 * U * update + 2 * U * (before["parameters"].abs() + update)
    assert ((ours["parameters"].double() - expected["parameters"].double()).abs() <= bound).all()


@pytest.mark.slow
def test_a_hundred_steps_stay_at_the_recursion_in_float64(path: str) -> None:
    """The bound follows the recursion: every rounding to first order (and 1% for the others), carried on by it."""
    n, steps, lr = 257, 100, 1e-2
    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 1 - lr * OPTIONS["weight_decay"]
    ours = state(n)
    p, m, v = ours["parameters"].double(), torch.zeros(n).double(), torch.zeros(n).double()
    p_error, m_error, v_error = torch.zeros(3, n, dtype=torch.float64)
    for t in range(1, steps + 1):
        gradient = draw(n, 20 + t)
        fused_adamw(**ours, gradient=gradient, lr=learning_rate(lr), **OPTIONS)
        g = gradient.double()
        difference, m, v = g - m, beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        # m + w (g - m): the difference, w, the product, the sum. v: two constants, two products of two, the sum.
        m_error = beta1 * m_error + U * (3 * (1 - beta1) * difference.abs() + m.abs())
        v_error = beta2 * v_error + U * 4 * v
        root = v.sqrt() / math.sqrt(1 - beta2**t)
        denominator = root + eps
        # sqrt (2 U: 1 ulp), the root of the bias correction, the division; eps and the sum.
        denominator_error = root * v_error / (2 * v) + U * (4 * root + eps + denominator)
        quotient = lr / (1 - beta1**t) * m / denominator
        # The coefficient, its product with m, the division.
        relative = m_error / m.abs() + denominator_error / denominator + 3 * U
        p_error = decay * p_error + 2 * U * decay * p.abs() + quotient.abs() * relative
        p = decay * p - quotient
        p_error += U * p.abs()
    for tensor, exact, error in ((ours["parameters"], p, p_error), (ours["exp_avg"], m, m_error)):
        assert ((tensor.double() - exact).abs() <= 1.01 * error).all()
    assert ((ours["exp_avg_sq"].double() - v).abs() <= 1.01 * v_error).all()
    assert p_error.max() < 1e-4, "the bound itself says something: parameters moved by about 1"
    assert ours["step"].item() == steps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cases_follow_their_reference_in_float64(path: str, dtype: torch.dtype) -> None:
    for case in SPEC.cases:
        device = torch.get_default_device()
        arguments = case.make(device, dtype, torch.Generator(device).manual_seed(3))
        double = [a.double() if isinstance(a, Tensor) else a for a in arguments]
        rtol, atol = SPEC.tolerance(dtype)
        for actual, expected in zip(SPEC.function(*arguments), SPEC.reference(*double), strict=True):
            torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 1500])
def test_half_gradient_scale_working_copy_and_average(path: str, n: int, dtype: torch.dtype) -> None:
    """Each is what the same step without it leaves to others: those do it here, after torch's order of roundings."""
    gradient, scale = draw(n, 4).to(dtype), torch.tensor([0.3])
    plain, full = state(n, 4.0), state(n, 4.0)
    fused_adamw(**plain, gradient=gradient.float() * scale, lr=learning_rate(), **OPTIONS)
    working, ema = torch.empty(n, dtype=dtype), draw(n, 6)
    expected = ema.lerp(plain["parameters"], 1 - 0.9)
    extra = {"scale": scale, "working": working, "ema": ema, "ema_decay": 0.9}
    fused_adamw(**full, gradient=gradient, lr=learning_rate(), **OPTIONS, **extra)
    assert_same(full, plain)
    exact = full["parameters"].to(dtype)
    if path == "triton":
        # Truncated instead of rounded by the interpreter.
        torch.testing.assert_close(working, exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert (working.float() - exact.float()).abs().max() > 0 or n == 1 or dtype == torch.float16
    else:
        assert torch.equal(working, exact)
    if path == "cpu":
        assert torch.equal(ema, expected)
    else:
        # A product that is or is not fused with its sum.
        assert ((ema - expected).abs() <= 2 * U * (draw(n, 6).abs() + plain["parameters"].abs())).all()


def test_the_average_may_forget_most_of_what_it_was(path: str) -> None:
    ours, ema = state(9), draw(9, 6)
    start = ema.clone()
    fused_adamw(**ours, gradient=draw(9, 4), lr=learning_rate(), ema=ema, ema_decay=0.2)
    expected = 0.2 * start.double() + 0.8 * ours["parameters"].double()
    assert ((ema - expected).abs() <= 4 * U * (start.abs() + ours["parameters"].abs())).all()


@pytest.mark.parametrize("steps", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_step_without_finite_gradient_changes_nothing(path: str, steps: float, dtype: torch.dtype) -> None:
    n = 1030
    ours = state(n, steps)
    ours["step"] = ours["step"].to(dtype)
    extra = {"working": draw(n, 7).bfloat16(), "ema": draw(n, 8)}
    before, extra_before = copied(ours), copied(extra)
    for bad in (math.nan, math.inf, -math.inf):
        gradient = draw(n, 3)
        gradient[n - 1] = bad
        scale, found_inf = clip_coefficient(global_norm(gradient), 1.0)
        assert found_inf.item() == 1
        arguments = {"gradient": gradient, "lr": learning_rate(), "scale": scale, "ema_decay": 0.5}
        fused_adamw(**ours, **extra, **arguments, found_inf=found_inf)
        assert_same(ours, before)
        assert_same(extra, extra_before)
    found_inf = torch.zeros(1)
    fused_adamw(**ours, **extra, gradient=draw(n, 3), lr=learning_rate(), found_inf=found_inf, ema_decay=0.5)
    assert ours["step"].item() == steps + 1
    assert ours["step"].dtype == dtype
    assert not any(torch.equal(tensor, before[name]) for name, tensor in ours.items())


def test_without_gradient_there_is_only_decay(path: str) -> None:
    ours = state(100)
    before = ours["parameters"].clone()
    arguments = {"gradient": torch.zeros(100), "lr": learning_rate(0.5)}
    fused_adamw(**ours, **arguments, weight_decay=0.0)
    assert torch.equal(ours["parameters"], before)
    fused_adamw(**ours, **arguments, weight_decay=0.5)
    assert torch.equal(ours["parameters"], before * 0.75)
    assert ours["exp_avg"].count_nonzero() == ours["exp_avg_sq"].count_nonzero() == 0


def test_a_huge_gradient_moves_by_the_learning_rate(path: str) -> None:
    """The first step is lr * sign(g), whatever the size, as long as float32 holds its square."""
    ours = state(40)
    before = ours["parameters"].clone()
    gradient = 1e18 * draw(40, 3)
    fused_adamw(**ours, gradient=gradient, lr=learning_rate(0.25), weight_decay=0.0)
    # Six roundings of the update and one of the parameter.
    bound = 10 * U * 0.25 + U * ours["parameters"].abs()
    assert ((before - 0.25 * gradient.sign() - ours["parameters"]).abs() <= bound).all()


def test_the_same_step_twice_gives_the_same_bits(path: str) -> None:
    first, second = state(2050, 3.0), state(2050, 3.0)
    for ours in (first, second):
        scale, found_inf = clip_coefficient(global_norm(draw(2050, 3)), 0.1)
        fused_adamw(**ours, gradient=draw(2050, 3), lr=learning_rate(), scale=scale, found_inf=found_inf)
    assert_same(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_goes_on_from_a_stored_state_gives_the_same_bits(path: str, dtype: torch.dtype) -> None:
    """Five steps, and two whose state goes through a file's bytes before three more."""

    def take(tensors: dict[str, Tensor], seeds: range) -> None:
        for seed in seeds:
            gradient = draw(1030, seed)
            scale, found_inf = clip_coefficient(global_norm(gradient), 1.0)
            extra = {"scale": scale, "found_inf": found_inf, "ema_decay": 0.9}
            fused_adamw(**tensors, gradient=gradient, lr=learning_rate(), **extra)

    start = {**state(1030), "working": draw(1030).to(dtype), "ema": draw(1030)}
    whole, parts = copied(start), copied(start)
    take(whole, range(5))
    take(parts, range(2))
    stored = safetensors.torch.save({name: tensor.cpu() for name, tensor in parts.items()})
    parts = {name: tensor.to(start[name].device) for name, tensor in safetensors.torch.load(stored).items()}
    take(parts, range(2, 5))
    assert_same(whole, parts)
    assert not torch.equal(whole["ema"], start["ema"])


def exact_norm(gradient: Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in gradient.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 2047, 2048, 10_001])
def test_the_norm_is_exact_but_for_its_rounding(
    path: str, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two programs: the longest needs three rounds of both, and the last is not full. Behind it lies NaN."""
    monkeypatch.setattr(module, "_NORM_PROGRAMS", 2)
    gradient = torch.full((n + module._NORM_BLOCK,), math.nan, dtype=dtype)[:n].copy_(draw(n, 3))
    # U for the rounding to float32, and float64's n * 2^-53, which is below 1% of it.
    assert global_norm(gradient).item() == pytest.approx(exact_norm(gradient), rel=1.01 * U)
    assert torch.equal(global_norm(gradient), global_norm(gradient))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_norm_holds_where_squares_leave_float32(path: str, size: float) -> None:
    gradient = size * draw(100, 3)
    assert global_norm(gradient).item() == pytest.approx(exact_norm(gradient), rel=1.01 * U)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # which is what is wanted of numpy here
def test_the_norm_of_nothing_and_of_what_is_not_finite(path: str) -> None:
    assert global_norm(torch.zeros(5)).item() == 0
    assert global_norm(torch.tensor([1.0, -math.inf])).item() == math.inf
    assert math.isnan(global_norm(torch.tensor([1.0, math.nan, math.inf])).item())
    assert global_norm(torch.full((4,), 3e38)).item() == math.inf, "a norm of 6e38 is more than float32 holds"


@pytest.mark.parametrize("norm", [0.0, 1e-7, 0.3, 0.999999, 1.0, 17.0, 1e30])
@pytest.mark.parametrize("max_norm", [1.0, 0.7, math.inf])
def test_clipping_is_that_of_torch(path: str, norm: float, max_norm: float) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)  # times the coefficient
    torch.nn.utils.clip_grads_with_norm_([parameter], max_norm, torch.tensor(norm))
    coefficient, found_inf = clip_coefficient(torch.tensor([norm]), max_norm)
    assert torch.equal(coefficient, parameter.grad)
    assert found_inf.item() == 0


def test_clipping_takes_the_loss_scale_away_first(path: str) -> None:
    """Powers of two, so exactly."""
    scale = torch.tensor([1024.0])
    plain, _ = clip_coefficient(torch.tensor([3.0]), 1.0)
    scaled, found_inf = clip_coefficient(torch.tensor([3.0 * 1024]), 1.0, scale)
    assert torch.equal(scaled * 1024, plain)
    assert found_inf.item() == 0
    within, _ = clip_coefficient(torch.tensor([0.5 * 1024]), 1.0, scale)
    assert within.item() == 1 / 1024
    for bad in (math.inf, math.nan):
        assert clip_coefficient(torch.tensor([bad]), 1.0, scale)[1].item() == 1


@pytest.mark.slow
def test_the_operators_keep_their_promises() -> None:
    ours = state(33, 2.0)
    arguments = (ours["parameters"], ours["exp_avg"], ours["exp_avg_sq"], draw(33, 3), ours["step"], learning_rate())
    arguments = (*arguments, *OPTIONS.values())
    torch.library.opcheck(module._adamw_operator, (*arguments, None, None, None, None, 0.0))
    extra = torch.ones(1), torch.zeros(1), draw(33).bfloat16(), draw(33), 0.5
    torch.library.opcheck(module._adamw_operator, (*arguments, *extra))
    torch.library.opcheck(module._norm_operator, (draw(33),))
    torch.library.opcheck(module._clip_operator, (torch.ones(1), 0.5))
    torch.library.opcheck(module._clip_operator, (torch.ones(1), 0.5, torch.ones(1)))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("exp_avg", torch.zeros(9)),
        ("exp_avg_sq", torch.zeros(8).double()),
        ("gradient", torch.zeros(16)[::2]),
        ("gradient", torch.zeros(2, 4)),
        ("gradient", torch.zeros(8, dtype=torch.int64)),
        ("step", torch.tensor(0.0)),
        ("lr", torch.tensor([1])),
        ("scale", torch.ones(2)),
        ("found_inf", torch.tensor([False])),
        ("working", torch.zeros(8)),
        ("ema", torch.zeros(8, device="meta")),
    ],
)
def test_wrong_tensors_are_refused(name: str, wrong: Tensor) -> None:
    arguments = {**state(8), "gradient": draw(8), "lr": learning_rate()}
    with pytest.raises(ValueError, match=rf"^{name} is torch"):
        fused_adamw(**{**arguments, name: wrong})


def test_a_norm_needs_a_flat_gradient() -> None:
    with pytest.raises(ValueError, match=r"^gradient is torch"):
        global_norm(torch.zeros(0))
    with pytest.raises(ValueError, match=r"^norm is torch"):
        clip_coefficient(torch.tensor(1.0), 1.0)
