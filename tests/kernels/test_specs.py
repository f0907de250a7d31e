"""Every operator against its reference in float64, on the CPU path and, where there is a GPU, on the Triton kernels."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.kernels.compile import OPERATIONS, load_specs
from fastgrpo.kernels.spec import Case, OpSpec
from support import ROOT
from support.kernels import poisoned

SPECS = load_specs()
DEVICES = (
    "cpu",
    pytest.param(
        "cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
    ),
)


def every_case(kind: str = "cases", differentiable: bool = False) -> list:
    """(spec, case) of all operations, as parameters with readable ids."""
    return [
        pytest.param(spec, case, id=f"{name}-{case.name}")
        for name, spec in SPECS.items()
        for case in getattr(spec, kind)
        if spec.differentiable or not differentiable
    ]


def arguments(case: Case, device: str, dtype: torch.dtype) -> tuple:
    """The same for the same case, whatever was called before."""
    return case.make(torch.device(device), dtype, torch.Generator().manual_seed(0))


def convert(args: Sequence, change: Callable[[Tensor], Tensor]) -> list:
    return [change(value) if isinstance(value, Tensor) else value for value in args]


def exact(args: Sequence) -> list:
    """Copies in float64, which holds every number of a shorter type."""
    return convert(args, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.clone())


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], rtol: float, atol: float) -> None:
    assert len(got) == len(want)
    for mine, reference in zip(got, want, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine.double(), reference.double(), rtol=rtol, atol=atol)
        else:
            assert torch.equal(mine, reference.to(mine.dtype))


def test_operators_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which may be another one. Their CUDA sides begin with making theirs current."""

    class Entered(Exception):
        pass

    def device_of(tensor: Tensor) -> None:
        raise Entered(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    ours = {name: operator for name, operator in OPDEFS.items() if name.startswith("fastgrpo::")}
    operators = {name: op for name, op in ours.items() if op._init_fn.__module__.startswith("fastgrpo.kernels.")}
    assert len(operators) >= len(SPECS)
    for name, operator in operators.items():
        first = torch.zeros(1)
        with pytest.raises(Entered) as entered:
            operator._backend_fns["cuda"](first)
        assert entered.value.args[0] is first, name


by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def test_every_operator_has_a_spec() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name, text in files.items() if "torch.library.custom_op" in text} == set(OPERATIONS)
    assert {name: spec.name for name, spec in SPECS.items()} == {name: name for name in OPERATIONS}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_operator_has_cases_with_odd_sizes(spec: OpSpec) -> None:
    sizes = [
        size
        for case in spec.cases
        for value in arguments(case, "cpu", torch.float32)
        if isinstance(value, Tensor)
        for size in value.shape
    ]
    assert any(size > 1 and size % 2 for size in sizes)
    names = [case.name for case in (*spec.cases, *spec.bench)]
    assert len(set(names)) == len(names)


@by_dtype
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("spec", "case"), every_case())
def test_results_are_the_references(spec: OpSpec, case: Case, device: str, dtype: torch.dtype) -> None:
    want = as_tuple(spec.reference(*exact(arguments(case, device, dtype))))
    with poisoned():
        got = as_tuple(spec.function(*arguments(case, device, dtype)))
    assert want[0].dtype == torch.float64
    assert {tensor.device.type for tensor in got} == {device}
    assert_close(got, want, *spec.tolerance(dtype))


@by_dtype
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("spec", "case"), every_case(differentiable=True))
def test_gradients_are_those_of_the_reference(spec: OpSpec, case: Case, device: str, dtype: torch.dtype) -> None:
    args = arguments(case, device, dtype)
    with poisoned():
        positions = spec.differentiable_in(args)
        got, directions = gradients(spec.function, positions, args)
    want, _ = gradients(spec.reference, positions, exact(args), directions)
    assert [tensor.dtype for tensor in got] == [args[position].dtype for position in positions]
    assert_close(got, want, *spec.tolerance(dtype))


def gradients(
    function: Callable, positions: Sequence[int], args: Sequence, directions: Sequence[Tensor] | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Vector-Jacobian products for the arguments at `positions`, and the vectors: standard normal unless given."""
    args = convert(args, torch.clone)
    inputs = [args[position].requires_grad_() for position in positions]
    outputs = [output for output in as_tuple(function(*args)) if output.requires_grad]
    if directions is None:
        generator = torch.Generator().manual_seed(1)
        directions = [
            torch.randn(output.shape, generator=generator).to(output.device, output.dtype) for output in outputs
        ]
    directions = [direction.to(output.dtype) for direction, output in zip(directions, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, directions), directions


@by_dtype
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_same_arguments_give_the_same_bits(spec: OpSpec, device: str, dtype: torch.dtype) -> None:
    case = max(spec.cases, key=lambda case: case.bytes)
    first = as_tuple(spec.function(*arguments(case, device, dtype)))
    again = as_tuple(spec.function(*arguments(case, device, dtype)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if positions := spec.differentiable_in(arguments(case, device, dtype)):
        first, directions = gradients(spec.function, positions, arguments(case, device, dtype))
        again, _ = gradients(spec.function, positions, arguments(case, device, dtype), directions)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("spec", "case"), every_case("bench"))
def test_benchmark_cases_build_and_state_the_bytes_they_move(spec: OpSpec, case: Case) -> None:
    # Fake tensors have shapes and no memory: SD 1.x's parameters alone would be 3.4 GB.
    with FakeTensorMode():
        args = [value for value in arguments(case, "cpu", torch.bfloat16) if isinstance(value, Tensor)]
        total = sum(tensor.numel() * tensor.element_size() for tensor in args)
    # Each argument may be read and written, and no output is larger than the largest of them. A tensor may be read
    # twice where a first pass has to see all of it.
    largest = max(tensor.numel() * tensor.element_size() for tensor in args)
    assert total / 2 <= case.bytes <= 2 * total + largest
