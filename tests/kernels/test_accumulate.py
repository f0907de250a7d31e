"""Many gradients added to one buffer: the bits of PyTorch's own sums, in few launches of one kernel."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastgrpo  # noqa: F401
from fastgrpo.kernels import accumulate as module
from fastgrpo.kernels.accumulate import ALIGNMENT, accumulate
from fastgrpo.kernels.operators import DTYPES
from support.kernels import interpreted, on_gpu


@pytest.fixture(params=[pytest.param("triton", marks=interpreted), pytest.param("gpu", marks=on_gpu), "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors are to be; the public function runs Triton's kernels, interpreted or on the GPU, or PyTorch's."""
    if request.param == "triton":
        monkeypatch.setattr(module, "_operator", module._launch_accumulate)
    monkeypatch.setattr(module, "_BLOCK", 64)
    return "cuda" if request.param == "gpu" else "cpu"


def laid_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each begins, with a gap of ALIGNMENT before it, and the elements of all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end + ALIGNMENT)
        end = starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def draw(size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("sizes", [[1], [64, 128, 63, 65, 1, 200], [0, 5, 0], [*range(1, 65), 130]], ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_add(device: str, sizes: list[int], dtype: torch.dtype) -> None:
    starts, end = laid_out(sizes)
    total = draw(end, 0)
    gradients = [draw(size, seed, dtype) for seed, size in enumerate(sizes, 1)]
    wanted = total.clone()
    for gradient, start in zip(gradients, starts, strict=True):
        wanted[start : start + len(gradient)].add_(gradient)  # what lies between them stays as it is
    total = total.to(device)
    accumulate(total, [gradient.to(device) for gradient in gradients], starts)
    assert torch.equal(total.cpu(), wanted)


def test_any_shape_dtype_and_address_is_taken(device: str) -> None:
    """The order is that of memory. An address that is no multiple of 16 bytes goes its own way."""
    convolution = draw(70, 1).bfloat16().view(2, 5, 7, 1).to(memory_format=torch.channels_last).to(device)
    transposed = draw(35, 2).view(5, 7).to(device).t()
    shifted = draw(101, 3).half().to(device)[1:]
    scalar = torch.tensor(0.3, device=device)
    assert shifted.data_ptr() % 16
    gradients = [convolution, transposed, shifted, scalar]
    starts, end = laid_out([g.numel() for g in gradients])
    total = torch.zeros(end, device=device)
    for _ in range(2):
        accumulate(total, gradients, starts)
    orders = [convolution.permute(0, 2, 3, 1), transposed.t(), shifted, scalar]
    for gradient, start in zip(orders, starts, strict=True):
        assert torch.equal(total[start : start + gradient.numel()], 2 * gradient.float().flatten())
    assert int((total != 0).sum()) == sum(int((g != 0).sum()) for g in gradients)


def test_the_tensors_of_a_unet_take_eleven_launches_of_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *arguments, **options: launched.append((grid, arguments))

    monkeypatch.setattr(module, "_accumulate_kernel", Recorder())
    sizes = [1 + 97 * (i % 211) for i in range(686)]
    starts, end = laid_out(sizes)
    gradients = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    module._launch_accumulate(torch.zeros(end), gradients, starts)
    assert len(launched) == 11  # 64 at a time
    assert sum(grid[0] for grid, _ in launched) == sum(-(-size // module._BLOCK) for size in sizes)
    for _, (_, tensors, *numbers, _) in launched:
        assert [len(each) for each in (tensors, *numbers)] == [64] * 4
        # Triton makes a kernel of its own for numbers that are 1 or multiples of 16, and for addresses that are not.
        assert all(number != 1 and number % 16 and number < 2**31 for each in numbers for number in each)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_adds_what_the_gradients_are_at_each_replay() -> None:
    sizes = [5000, 3, 1280] * 30
    starts, end = laid_out(sizes)
    total, gradients = torch.zeros(end, device="cuda"), [draw(size, 1).bfloat16().cuda() for size in sizes]
    accumulate(total, gradients, starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate(total, gradients, starts)
    once = total.clone()
    for factor in (1, 2):
        for gradient in gradients:
            gradient.mul_(factor)
        graph.replay()
    torch.testing.assert_close(total, 4 * once, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("total", "dtype", "start"),
    [
        (torch.zeros(64, dtype=torch.bfloat16), torch.bfloat16, 0),
        (torch.zeros(8, 8), torch.bfloat16, 0),
        (torch.zeros(64), torch.float64, 0),
        (torch.zeros(64), torch.bfloat16, 16),
        (torch.zeros(64), torch.bfloat16, 64),
        (torch.zeros(64), torch.bfloat16, -32),
    ],
)
def test_what_does_not_fit_is_refused(total: Tensor, dtype: torch.dtype, start: int) -> None:
    with pytest.raises(ValueError, match=r"^accumulate: (total|a gradient) is torch\..*; accepted (is|are) "):
        accumulate(total, [torch.zeros(5, dtype=dtype)], [start])
