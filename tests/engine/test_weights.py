"""The flat weights and their AdamW: the same bits as torch.optim.AdamW's, with everything where it was."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgrpo.engine.weights import FlatAdamW, FlatWeights
from fastgrpo.kernels import accumulate as accumulate_module
from fastgrpo.kernels.fused_adamw import global_norm

LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.95), 1e-7, 0.02


def make_model(seed: int = 0) -> nn.Module:
    """Convolutions in channels_last, among them 1 x 1, odd sizes, a scalar, and a matrix stored transposed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Conv2d(6, 5, 1), nn.GroupNorm(5, 5))
        model.register_parameter("gain", nn.Parameter(torch.randn(())))
        model.register_parameter("matrix", nn.Parameter(torch.randn(7, 5).t()))
    return model.to(memory_format=torch.channels_last)


def loss(model: nn.Module, seed: int) -> Tensor:
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (model(images).relu().mean((2, 3)) @ model.matrix * model.gain).square().sum()


def gradients(model: nn.Module, seed: int) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(model, seed), list(model.parameters()))


def flat(model: nn.Module, ema: bool = False, **options: float) -> FlatAdamW:
    weights = FlatWeights(dict(model.named_parameters()), ema=ema)
    return FlatAdamW(weights, LR, BETAS, EPS, DECAY, **options)


def torch_adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_flat_model_is_the_same_model() -> None:
    model, plain = make_model(), make_model()
    weights = FlatWeights(dict(model.named_parameters()))
    assert_same_weights(model, plain)
    assert torch.equal(loss(model, 1), loss(plain, 1))
    for parameter, before in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.stride() == before.stride()
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(make_model(3).state_dict())  # loads in place
    assert_same_weights(model, make_model(3))
    assert torch.equal(weights.views(weights.values)["matrix"], make_model(3).matrix)


def test_views_are_aligned_and_do_not_overlap() -> None:
    weights = FlatWeights(dict(make_model().named_parameters()))
    buffer = torch.arange(weights.size, dtype=torch.float64)
    seen = torch.cat([view.flatten() for view in weights.views(buffer).values()])
    assert len(seen.unique()) == len(seen) == sum(p.numel() for p in weights.parameters.values())
    for dtype in (torch.float32, torch.bfloat16):
        assert all(view.data_ptr() % 16 == 0 for view in weights.views(weights.zeros(dtype)).values())


@pytest.mark.parametrize("how", ["backward", "accumulate", "assign"])
def test_ten_steps_give_the_bits_of_torch(how: str) -> None:
    """Also where gradients are small enough to need no clipping; with two micro-batches a step."""
    model, plain = make_model(), make_model()
    optimizer, expected = flat(model), torch_adamw(plain)
    for t in range(10):
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["lr"] = LR * (1 - t / 20)
        optimizer.zero_grad()
        expected.zero_grad()
        for seed in (2 * t, 2 * t + 1):
            loss(plain, seed).backward()
            if how == "backward":
                loss(model, seed).backward()
            elif how == "accumulate":
                optimizer.weights.accumulate(gradients(model, seed))
        if how == "assign":
            for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
                parameter.grad = other.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step(max_grad_norm=1e6)
        expected.step()
        assert_same_weights(model, plain)
    moments = optimizer.state_tensors()
    for name, parameter in plain.named_parameters():
        for key, value in expected.state[parameter].items():
            assert torch.equal(moments[f"{key}.{name}"], value), (key, name)
    assert_padding_is_zero(optimizer)


def assert_padding_is_zero(optimizer: FlatAdamW) -> None:
    weights = optimizer.weights
    for buffer in (weights.values, weights.gradient, optimizer.exp_avg, optimizer.exp_avg_sq):
        inside = sum(view.count_nonzero() for view in weights.views(buffer).values())
        assert buffer.count_nonzero() == inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_summed_together_where_they_lie_as_their_places_do(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call for all of them; what autograd laid out otherwise is added all the same."""
    together = []
    operator = accumulate_module._operator
    monkeypatch.setattr(
        accumulate_module, "_operator", lambda *given: (together.append(len(given[1])), operator(*given))
    )
    model = make_model()
    weights = FlatWeights(dict(model.named_parameters()))
    weights._device = torch.device("cuda")  # as there; the tensors themselves stay here
    expected = [torch.zeros_like(p) for p in model.parameters()]
    weights.zero_gradient()
    for seed in range(3):
        given = [g.to(dtype) for g in gradients(model, seed)]
        names = list(weights.parameters)
        given[names.index("0.weight")] = given[names.index("0.weight")].contiguous()
        weights.accumulate(given)
        for total, gradient in zip(expected, given, strict=True):
            total += gradient
    for view, total in zip(weights.views(weights.gradient).values(), expected, strict=True):
        assert torch.equal(view, total)
    # All but the convolution of several pixels, whose place is in channels_last; that of one pixel lies the same in
    # both.
    assert together == [len(expected) - 1] * 3
    assert weights.gradient.count_nonzero() == sum(t.count_nonzero() for t in expected)


def test_clipping_is_that_of_torch_with_the_exact_norm() -> None:
    model, plain = make_model(), make_model()
    optimizer, expected = flat(model), torch_adamw(plain)
    for t in range(10):
        optimizer.zero_grad()
        optimizer.weights.accumulate(gradients(model, t))
        before = optimizer.weights.gradient.clone()
        loss(plain, t).backward()
        exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in plain.parameters()))
        norm = optimizer.step(max_grad_norm=0.1)
        assert norm.shape == ()
        assert norm.item() == pytest.approx(exact, rel=2.0**-24 * 1.01)  # rounded to float32
        assert exact > 0.1, "it is clipped"
        torch.nn.utils.clip_grads_with_norm_(plain.parameters(), 0.1, norm)
        expected.step()
        expected.zero_grad()
        assert_same_weights(model, plain)
        assert torch.equal(optimizer.weights.gradient, before)


def test_the_average_is_that_of_torch_and_needs_no_pass_of_its_own() -> None:
    model = make_model()
    optimizer = flat(model, ema=True, ema_decay=0.9)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    for t in range(5):
        optimizer.weights.accumulate(gradients(model, t))
        optimizer.step(max_grad_norm=1.0)
        optimizer.zero_grad()
        torch._foreach_lerp_(list(averages.values()), [p.detach() for p in model.parameters()], 1 - 0.9)
    for name, view in optimizer.weights.views(optimizer.weights.ema).items():
        assert torch.equal(view, averages[name])
        assert not torch.equal(view, dict(model.named_parameters())[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_working_copy_follows_in_the_same_memory(dtype: torch.dtype) -> None:
    model = make_model()
    optimizer = flat(model)
    working = optimizer.weights.working_copy(dtype)

    def check() -> None:
        for name, parameter in model.named_parameters():
            assert torch.equal(working[name], parameter.to(dtype))
            assert working[name].stride() == parameter.stride()

    check()
    before = {name: view.clone() for name, view in working.items()}
    for t in range(5):
        optimizer.weights.accumulate(gradients(model, t))
        optimizer.step()
        optimizer.zero_grad()
    check()
    assert not torch.equal(working["matrix"], before["matrix"])
    model.load_state_dict(make_model(3).state_dict())
    optimizer.weights.working_copy(dtype)
    check()


def test_a_run_goes_on_from_its_file_with_the_same_bits(tmp_path: Path) -> None:
    def train(optimizer: FlatAdamW, model: nn.Module, steps: range) -> None:
        for t in steps:
            optimizer.weights.accumulate(gradients(model, t))
            optimizer.step(max_grad_norm=0.3)
            optimizer.zero_grad()

    whole, first, second = make_model(), make_model(), make_model(9)
    optimizer = flat(whole)
    train(optimizer, whole, range(8))
    begun = flat(first)
    train(begun, first, range(4))
    save_file(begun.state_tensors(), tmp_path / "optimizer.safetensors")
    save_file({n: p.contiguous() for n, p in first.state_dict().items()}, tmp_path / "model.safetensors")

    resumed = flat(second)
    train(resumed, second, range(2))  # what it held is replaced
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"))
    train(resumed, second, range(4, 8))
    assert_same_weights(second, whole)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[name], tensor), name


def test_it_goes_on_where_torch_left_off() -> None:
    model, plain = make_model(), make_model()
    expected = torch_adamw(plain)

    def step(seed: int) -> None:
        loss(plain, seed).backward()
        expected.step()
        expected.zero_grad()

    for seed in range(3):
        step(seed)
    names = {parameter: name for name, parameter in plain.named_parameters()}
    state = {f"{key}.{names[p]}": value for p, values in expected.state.items() for key, value in values.items()}
    optimizer = flat(model)
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_tensors(state)
    step(3)
    loss(model, 3).backward()
    optimizer.step()
    assert_same_weights(model, plain)


def test_states_that_do_not_fit_are_refused() -> None:
    optimizer = flat(make_model())
    good = optimizer.state_tensors()
    with pytest.raises(KeyError, match=r"step\.gain"):
        optimizer.load_state_tensors({name: t for name, t in good.items() if name != "step.gain"})
    with pytest.raises(KeyError, match=r"exp_avg_sq\.gain"):
        optimizer.load_state_tensors({name: t for name, t in good.items() if name != "exp_avg_sq.gain"})
    with pytest.raises(RuntimeError, match="different steps"):
        optimizer.load_state_tensors({**good, "step.gain": torch.tensor(3.0)})
    with pytest.raises(RuntimeError, match=r"exp_avg\.matrix has another shape"):
        optimizer.load_state_tensors({**good, "exp_avg.matrix": torch.zeros(5, 1)})
    optimizer.weights.accumulate([torch.ones_like(p) for p in optimizer.weights.parameters.values()])
    optimizer.step()
    optimizer.load_state_tensors({})
    assert all(tensor.count_nonzero() == 0 for tensor in optimizer.state_tensors().values())


def test_the_loss_scale_is_taken_out_and_an_overflow_halves_it() -> None:
    """Powers of two: the same bits as without, but for the scaled gradients that a step never writes."""
    model, plain = make_model(), make_model()
    optimizer, expected = flat(model), flat(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for t in range(4):
        scaler.scale(loss(model, t)).backward()
        loss(plain, t).backward()
        if t == 2:
            model.gain.grad.fill_(math.inf)
        before = copy.deepcopy(model)
        norm = scaler.step(optimizer, max_grad_norm=0.5)
        scaler.update()
        if t == 2:
            assert not norm.isfinite()
            assert_same_weights(model, before)
            assert optimizer.state_tensors()["step.gain"].item() == 2
        else:
            assert torch.equal(norm, expected.step(max_grad_norm=0.5))
            assert_same_weights(model, plain)
        optimizer.zero_grad()
        expected.zero_grad()
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forgets(set_to_none: bool) -> None:
    model = make_model()
    optimizer = flat(model)
    loss(model, 1).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) == set_to_none for p in model.parameters())
    assert global_norm(optimizer.weights.collect_gradients()).item() == 0
    loss(model, 2).backward()
    fresh = gradients(model, 2)
    for parameter, gradient in zip(model.parameters(), fresh, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_parameter_that_was_moved_away_is_told() -> None:
    model = make_model()
    optimizer = flat(model)
    model.matrix.data = model.matrix.data.clone()
    with pytest.raises(RuntimeError, match=r"^matrix was moved out of the flat buffer"):
        optimizer.step()


def test_copies_of_the_model_are_on_their_own() -> None:
    model = make_model()
    optimizer = flat(model)
    base = copy.deepcopy(model)
    loss(model, 1).backward()
    optimizer.step()
    assert_same_weights(base, make_model())
    assert base.matrix.untyped_storage().nbytes() < 4 * optimizer.weights.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.to(torch.bfloat16), r"a is torch\.bfloat16; accepted is torch\.float32"),
        (lambda p: p.to("meta"), r"the parameters are on \['cpu', 'meta'\]"),
    ],
)
def test_parameters_that_cannot_be_flat_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatWeights({"b": nn.Parameter(torch.zeros(3)), "a": nn.Parameter(change(torch.zeros(3)))})
