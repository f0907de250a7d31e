"""Weights that are away while unused: the same bits and objects, and one copy on the device while it is wanted."""

import threading

import pytest
import torch
from torch import nn

from fastgrpo.system import offload as offload_module
from fastgrpo.system.offload import offload, resident


def make_module() -> nn.Sequential:
    """Convolutions in channels_last, of two dtypes, a buffer, a scalar, and a matrix stored transposed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1))
        module.register_parameter("matrix", nn.Parameter(torch.randn(7, 5).t()))
    module.register_buffer("numbers", torch.arange(3, dtype=torch.bfloat16))
    return module.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Offloaded from a device that is the CPU all the same: a copy in other memory is made as on CUDA."""
    made = make_module()
    tensors = [*made.parameters(), *made.buffers()]
    monkeypatch.setitem(offload_module._OFFLOADED, made, offload_module._Offloaded(tensors, torch.device("cpu")))
    return made


def places(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}


def test_the_same_weights_are_there_and_away(module: nn.Sequential) -> None:
    plain, images = make_module(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    objects, away = [*module.parameters(), *module.buffers()], places(module)
    assert len(away) == 1
    with resident(module):
        there = places(module)
        assert len(there) == 1
        assert there != away
        assert torch.equal(module(images), plain(images))
        for mine, its in zip(objects, [*plain.parameters(), *plain.buffers()], strict=True):
            assert torch.equal(mine, its)
            assert (mine.dtype, mine.stride(), mine.requires_grad) == (its.dtype, its.stride(), its.requires_grad)
    assert places(module) == away
    assert all(mine is other for mine, other in zip(objects, [*module.parameters(), *module.buffers()], strict=True))
    assert torch.equal(module(images), plain(images))


def test_blocks_share_one_copy_until_the_last_ends(module: nn.Sequential) -> None:
    away, entered, leave = places(module), threading.Event(), threading.Event()

    def other() -> None:
        with resident(module):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    there = places(module)
    with resident(module), resident(module):
        assert places(module) == there
    with pytest.raises(RuntimeError, match="Expected"), resident(module):  # as where memory runs out
        module(torch.zeros(3))
    assert places(module) == there != away
    leave.set()
    thread.join()
    assert places(module) == away


def test_on_a_cpu_nothing_is_moved() -> None:
    module = make_module()
    before = places(module)
    offload(module.parameters(), module, torch.device("cpu"))
    with resident(module):
        assert places(module) == before


@pytest.mark.gpu
def test_device_memory_is_free_while_the_weights_are_away() -> None:
    device = torch.device("cuda")
    module = nn.Linear(2048, 2048).to(device).requires_grad_(False)
    x = torch.randn(4, 2048, device=device)
    expected, before = module(x), torch.cuda.memory_allocated(device)
    offload([*module.parameters(), *module.buffers()], module, device)
    assert module.weight.is_pinned()
    assert torch.cuda.memory_allocated(device) <= before - 4 * 2048**2
    for _ in range(2):
        with resident(module):
            assert module.weight.is_cuda
            assert torch.equal(module(x), expected)
        assert not module.weight.is_cuda
    assert torch.cuda.memory_allocated(device) <= before - 4 * 2048**2
