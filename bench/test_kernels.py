"""Every operation at the sizes that matter, beside its rivals: `make bench`.

On a GPU the time is that of the device: a CUDA graph's replay where the call can be captured, with a cold L2 cache.
On the CPU this is a smoke test: the tests' cases, two rounds, nothing kept.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measure import CUDA, DEVICE, DeviceClock, captured, free, launches, seconds_called, warm_up
from pytest_benchmark.fixture import BenchmarkFixture
from rivals import rivals_of
from torch import Tensor

from fastgrpo.kernels.compile import load_specs
from fastgrpo.kernels.spec import Case, OpSpec

DTYPE = torch.bfloat16
OURS = "fastgrpo"
PASSES = ("forward", "forward + backward")
SMOKE_CASES = 2
TIMER = DeviceClock() if CUDA else time.perf_counter
# Rounding to bfloat16 differs by about 2^-9 of a number; a wrong result by far more.
DISAGREEMENT = 0.05


@dataclass(frozen=True)
class Subject:
    """One thing to be measured. name: ours, a rival's, or "torch.compile" of the eager rival."""

    spec: OpSpec
    case: Case
    direction: str
    name: str


def _subjects() -> list[Subject]:
    """What takes long to compile comes last, in case time runs out."""
    subjects = [
        Subject(spec, case, direction, name)
        for spec in load_specs().values()
        for case in (spec.bench if CUDA else sorted(spec.cases, key=lambda case: case.bytes)[-SMOKE_CASES:])
        for direction in (PASSES if spec.differentiable else PASSES[:1])
        for name in (OURS, *rivals_of(spec), "torch.compile")
    ]
    return sorted(subjects, key=lambda subject: subject.name == "torch.compile")


def _function(subject: Subject) -> Callable[..., Any]:
    if subject.name == OURS:
        return subject.spec.function
    rivals = rivals_of(subject.spec)
    if subject.name != "torch.compile":
        return rivals[subject.name]
    torch._dynamo.reset()  # every case has its own sizes, and after eight of them Dynamo would give up
    return torch.compile(rivals["eager"], dynamic=False, backend="inductor" if CUDA else "aot_eager")


@functools.lru_cache(maxsize=1)
def _arguments(operation: str, case: Case) -> tuple[Any, ...]:
    """Drawn on the device: the CPU would take minutes for SD 1.x's optimizer state."""
    free()
    with DEVICE:
        return case.make(DEVICE, DTYPE, torch.Generator(DEVICE).manual_seed(0))


def _tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, tuple | list) else (values,)
    return [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _call(subject: Subject, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[[], Any], int]:
    """What is to be timed, which returns outputs or gradients, and the bytes it has to move at least.

    A backward pass reads the outputs' gradients and the arguments, and writes the arguments' gradients.
    """
    if subject.direction == PASSES[0]:
        return torch.no_grad()(functools.partial(function, *args)), subject.case.bytes
    # Leaves of their own: a backward pass must not find what another left behind.
    positions = subject.spec.differentiable_in(args)
    args = tuple(value.detach().requires_grad_() if i in positions else value for i, value in enumerate(args))
    inputs = [args[position] for position in positions]
    generator = torch.Generator(DEVICE).manual_seed(1)
    directions = [
        torch.empty_like(output).normal_(generator=generator)
        for output in _tensors(function(*args))
        if output.requires_grad
    ]

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = [output for output in _tensors(function(*args)) if output.requires_grad]
        return torch.autograd.grad(outputs, inputs, directions)

    return forward_and_backward, subject.case.bytes + _bytes(_tensors(args)) + _bytes(directions) + _bytes(inputs)


def _assert_right(subject: Subject, call: Callable[[], Any], args: tuple[Any, ...]) -> None:
    """A time is worth nothing if the result is wrong. Rivals that work in place return nothing to be looked at.

    Eager goes first: what is in place changes the arguments.
    """
    want = _tensors(_call(subject, rivals_of(subject.spec)["eager"], args)[0]())
    got = _tensors(call())
    assert got or subject.name != OURS
    for mine, expected in zip(got, want, strict=bool(got)):
        difference = torch.linalg.vector_norm(mine.float() - expected.float())
        assert difference <= DISAGREEMENT * torch.linalg.vector_norm(expected.float()), "a wrong result"


def _few() -> list[Subject]:
    """Ours at the largest case of the tests and the smallest that matters, of each operation; the former first."""
    specs = load_specs().values()
    cases = [(spec, max(spec.cases, key=lambda case: case.bytes)) for spec in specs]
    cases += [(spec, min(spec.bench, key=lambda case: case.bytes)) for spec in specs if CUDA]
    return [Subject(spec, case, PASSES[bool(spec.differentiable)], OURS) for spec, case in cases]


@pytest.mark.parametrize("subject", [pytest.param(s, id=f"{s.spec.name}-{s.case.name}") for s in _few()])
def test_right(subject: Subject) -> None:
    """Whether an operation works here at all: what a GPU is asked first."""
    args = _arguments(subject.spec.name, subject.case)
    _assert_right(subject, _call(subject, _function(subject), args)[0], args)
    free()


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, id=f"{s.spec.name}-{s.case.name}-{s.direction}-{s.name}") for s in _subjects()],
)
def test_kernel(subject: Subject, benchmark: BenchmarkFixture, results: Any) -> None:
    """Ours must work. A rival that does not is left out, with its reason."""
    benchmark.group = f"{subject.spec.name} {subject.case.name} {subject.direction}"
    try:
        row = _measure(subject, benchmark)
    except Exception as error:
        if subject.name == OURS:
            raise
        pytest.skip(f"{subject.name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    finally:
        free()
    if results is not None:
        results.add(
            operation=subject.spec.name,
            case=subject.case.name,
            dtype=str(DTYPE).removeprefix("torch."),
            direction=subject.direction,
            function=subject.name,
            **row,
        )


def _measure(subject: Subject, benchmark: BenchmarkFixture) -> dict[str, Any]:
    args = _arguments(subject.spec.name, subject.case)
    call, moved = _call(subject, _function(subject), args)
    _assert_right(subject, call, args)
    if not CUDA:
        benchmark.pedantic(call, rounds=2, warmup_rounds=1)
        return {}
    warm_up(call)
    row = {"bytes": moved, "launches": launches(call), "seconds_called": seconds_called(call)}
    replay = captured(call)
    timed = TIMER.timed(replay or call)
    timed()
    # A tenth of a second of calls, without the flushes of the cache between them.
    rounds = round(min(100, max(10, 0.1 / row["seconds_called"])))
    benchmark.pedantic(timed, rounds=rounds)
    return {"seconds": benchmark.stats.stats.median, "graph": replay is not None, "rounds": rounds, **row}
