"""Calls on fixed memory; on a GPU, that replaying a graph is making the calls."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.engine.graphs import StaticCall, capture_all, memory_pool, no_host_sync


def example(device: str = "cpu") -> tuple[Tensor, None, Tensor]:
    return torch.zeros(2, 3, 4, 4, device=device), None, torch.zeros(1, dtype=torch.int64, device=device)


def add(x: Tensor, offset: None, step: Tensor) -> Tensor:
    assert offset is None
    return x + step


def test_inputs_are_copied_into_memory_that_stays() -> None:
    seen = []

    def function(*inputs: Tensor | None) -> Tensor:
        seen.append(inputs)
        return add(*inputs)

    given = example()
    call = StaticCall(function, given, capture=False)
    assert not seen, "without a capture there is no warm-up"
    for step in (3, 5):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        output = call(x, None, torch.tensor([step]))
        assert torch.equal(output, x + step)
    assert all(a is b is c for a, b, c in zip(*seen, call.buffers, strict=True))
    assert given[0].count_nonzero() == 0, "the example stays as it is"
    assert not call.buffers[0].requires_grad
    call.buffers[0].fill_(7)
    assert torch.equal(call(call.buffers[0], None, call.buffers[2]), torch.full((2, 3, 4, 4), 12.0))


def test_buffers_have_the_layout_of_the_example() -> None:
    image = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    row = torch.zeros(1, 5).expand(6, 5)
    call = StaticCall(lambda image, row: (image, row), (image, row), capture=False)
    assert call.buffers[0].is_contiguous(memory_format=torch.channels_last)
    given = torch.randn(2, 3, 4, 4), torch.randn(6, 5)
    assert all(map(torch.equal, call(*given), given)), "an expanded example has memory for every element"


@pytest.mark.parametrize(
    ("position", "given", "message"),
    [
        (0, torch.zeros(2, 3, 4, 5), r"input 0 is \[2, 3, 4, 5\] torch.float32 on cpu; accepted is \[2, 3, 4, 4\]"),
        (1, torch.zeros(1), r"input 1 is \[1\] torch.float32 on cpu; accepted is None"),
        (2, torch.zeros(1), r"input 2 is \[1\] torch.float32 on cpu; accepted is \[1\] torch.int64 on cpu"),
        (2, None, r"input 2 is None; accepted is \[1\] torch.int64 on cpu"),
        (0, torch.zeros(2, 3, 4, 4, device="meta"), r"input 0 is .* on meta; accepted is .* on cpu"),
    ],
)
def test_other_inputs_are_named_and_leave_the_memory_alone(position: int, given: Tensor | None, message: str) -> None:
    call = StaticCall(add, example(), capture=False)
    inputs = [torch.ones(2, 3, 4, 4), None, torch.ones(1, dtype=torch.int64)]
    inputs[position] = given
    with pytest.raises(ValueError, match=message):
        call(*inputs)
    assert call.buffers[0].count_nonzero() == 0
    with pytest.raises(ValueError, match="2 inputs were given; accepted are 3"):
        call(*inputs[:2])


def test_gradients_within_a_call() -> None:
    """As a micro-batch does it: the gradients are added up outside."""
    layer, total = nn.Linear(4, 2), torch.zeros(2, 4)

    def learn(x: Tensor, weight: Tensor) -> Tensor:
        loss = (layer(x).square().sum(-1) * weight).sum()
        total.add_(torch.autograd.grad(loss, layer.weight)[0])
        return loss.detach()

    call = StaticCall(learn, (torch.zeros(3, 4), torch.zeros(3)), capture=False)
    expected = torch.zeros(2, 4)
    for _ in range(2):
        x, weight = torch.randn(3, 4), torch.rand(3)
        call(x, weight)
        # d/dW sum_n w_n |W x_n + b|^2 = 2 sum_n w_n (W x_n + b) x_n^T
        expected += 2 * (weight[:, None] * layer(x).detach()).T @ x
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)  # sums of 3 terms, about 10 roundings of 6e-8


def test_a_graph_needs_cuda() -> None:
    with pytest.raises(ValueError, match=r"inputs are on \['cpu'\]; accepted is one CUDA device"):
        StaticCall(add, example(), capture=True)
    with pytest.raises(ValueError, match=r"inputs are on \[\]"):
        StaticCall(add, (None,), capture=True)
    assert memory_pool(torch.device("cpu")) is None
    with no_host_sync():
        assert torch.ones(1).item() == 1


def make_learn() -> tuple[Callable[[Tensor, Tensor | None, Tensor], Tensor], Tensor]:
    """A micro-batch of a small convolution network, and where it adds its gradients to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).cuda()
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), device="cuda")

    def learn(x: Tensor, offset: Tensor | None, weight: Tensor) -> Tensor:
        output = model(x)
        gradient = output.detach() * weight
        gradients = torch.autograd.grad(output, parameters, gradient)
        total.add_(torch.cat([g.flatten() for g in gradients]))
        return output.detach()

    return learn, total


def batches(count: int, size: int = 2) -> list[tuple[Tensor, None, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator).cuda(), None, torch.rand(1, generator=generator).cuda())
        for _ in range(count)
    ]


@pytest.fixture
def _deterministic_convolutions():
    """cuDNN's backward may otherwise add in any order."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic_convolutions")
def test_replays_are_the_plain_calls() -> None:
    (plain, expected), (learn, total) = make_learn(), make_learn()
    given = batches(4)
    x, offset, weight = given[0]
    call = StaticCall(learn, (x, offset, torch.zeros_like(weight)), capture=True)
    assert total.count_nonzero() == 0, "warm-up and capture leave nothing behind"
    addresses = set()
    for inputs in given:
        with no_host_sync():
            output = call(*inputs)
        assert torch.equal(output, plain(*inputs))
        addresses.add(output.data_ptr())
    assert torch.equal(total, expected)
    assert total.count_nonzero() > 0
    assert len(addresses) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic_convolutions")
def test_two_graphs_share_a_pool() -> None:
    """Called in turn, each output read before the next call, as the rollout and the update do."""
    learn, _ = make_learn()
    small, large = batches(2), batches(2, size=8)
    pool = memory_pool(torch.device("cuda"))
    calls = [StaticCall(learn, given[0], capture=True, pool=pool) for given in (small, large)]
    for inputs in zip(small, large, strict=True):
        for call, given in zip(calls, inputs, strict=True):
            assert torch.equal(call(*given).clone(), learn(*given))


@pytest.mark.gpu
def test_a_shared_pool_is_as_large_as_the_largest_graph_needs() -> None:
    """256 MiB and its copy; warming up takes no more, and what it took is given back."""

    def function(x: Tensor) -> Tensor:
        return (x.expand(1 << 26).clone() + 1).sum()

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    pool = memory_pool(torch.device("cuda"))
    calls = [StaticCall(function, (torch.zeros(1, device="cuda"),), capture=False, pool=pool) for _ in range(3)]
    capture_all(calls)
    assert torch.cuda.max_memory_reserved() - before < 1.2 * 2**29
    assert all(call(torch.ones(1, device="cuda")) == 2**27 for call in calls)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic_convolutions")
@pytest.mark.parametrize("failure", ["error", "sync", "memory"])
def test_after_a_failed_capture_the_device_goes_on(failure: str) -> None:
    learn, _ = make_learn()
    given = batches(1)[0]
    calls = 0

    def fails(x: Tensor, offset: Tensor | None, weight: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output = learn(x, offset, weight)
        if calls > 3:  # the capture, after the warm-up
            if failure == "error":
                raise KeyError("mine")
            if failure == "sync":
                output.sum().item()
            torch.empty(1 << 46, device="cuda")  # 64 TiB
        return output

    stream = torch.cuda.current_stream()
    expected = {"error": KeyError, "sync": RuntimeError, "memory": torch.OutOfMemoryError}[failure]
    with pytest.raises(expected):
        StaticCall(fails, given, capture=True)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(1, device="cuda").isfinite(), "the default generator is not left within a capture"
    assert torch.equal(StaticCall(learn, given, capture=True)(*given), learn(*given))
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_waiting_for_the_device_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        torch.ones(1, device="cuda").item()
    assert torch.ones(1, device="cuda").item() == 1


def test_functions_that_make_something_new_each_time_may_do_so() -> None:
    """Without a graph the output is the function's own."""
    call = StaticCall(lambda x: F.relu(x), (torch.zeros(3),), capture=False)
    first = call(torch.tensor([-1.0, 0.0, 1.0]))
    second = call(torch.ones(3))
    assert torch.equal(first, torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(second, torch.ones(3))
