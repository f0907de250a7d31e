import ctypes
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgrpo.kernels import group_norm_silu_cuda, native
from fastgrpo.kernels.group_norm_silu import Backends, reference
from fastgrpo.kernels.specs.group_norm_silu import SPEC
from support.kernels import GROUP_CHANNELS, poisoned

HERE = Path(__file__).parent
EPS = 1e-5
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")
SHARED_SM80, SHARED_SM90 = 163 * 1024, 227 * 1024
DEVICE = 3


# ---------------------------------------------------------------------------------------------------------------------
# The kernels of csrc/, compiled as C++ and run thread by thread (see cuda_on_cpu.h)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ on the PATH")
    (source,) = (path for path in native.sources() if path.stem == "group_norm_silu")
    library = tmp_path_factory.mktemp("emulated") / "group_norm_silu.so"
    options = ["-x", "c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-DFASTGRPO_ON_CPU", f"-I{HERE}"]
    done = subprocess.run([compiler, *options, "-o", library, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture
def csrc(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """group_norm_silu's native functions call the emulated library."""

    def call(function: str, device: torch.device, *arguments: object) -> None:
        code = getattr(emulated, function)(*map(native.as_c, arguments), ctypes.c_int64(DEVICE), ctypes.c_void_p())
        assert emulated.current_device() == DEVICE
        if code != 0:
            raise native.LaunchError(f"{function}: {code}")

    monkeypatch.setattr(native, "call", call)
    return emulated


def make(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0, temb: bool = True) -> list[Tensor | None]:
    """x, weight, bias, temb, dy."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[1:2], shape[1:2], shape[:2], shape)
    x, weight, bias, shift, dy = (torch.randn(size, generator=generator) for size in sizes)
    x, dy = ((t + o).to(memory_format=torch.channels_last) for t, o in ((x, offset), (dy, 0)))
    return [x.to(dtype), weight.to(dtype), bias.to(dtype), shift.to(dtype) if temb else None, dy.to(dtype)]


def run(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor | None, dy: Tensor, groups: int, silu: bool) -> tuple:
    with poisoned():
        y, mean, rstd = group_norm_silu_cuda.launch_forward(x, weight, bias, groups, EPS, silu, temb)
        dx, vectors, dtemb = group_norm_silu_cuda.launch_backward(dy, x, weight, bias, mean, rstd, groups, silu, temb)
    return y, mean, rstd, dx, *vectors, dtemb


def exact(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor | None, dy: Tensor, groups: int, silu: bool) -> tuple:
    """The same in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, temb)]
    y = reference(*leaves[:3], groups, EPS, silu, leaves[3])
    gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.double())
    value = leaves[0] if temb is None else leaves[0] + leaves[3][:, :, None, None]
    grouped = value.detach().reshape(x.shape[0], groups, -1)
    rstd = (grouped.var(-1, correction=0) + EPS).rsqrt()
    return y.detach(), grouped.mean(-1), rstd, *gradients, *([torch.empty(0)] if temb is None else [])


def assert_near(actual: tuple, expected: tuple, dtype: torch.dtype) -> None:
    rtol, atol = SPEC.tolerance(dtype)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=rtol, atol=atol)


# [N, C, H, W], groups, and the largest cluster to expect on a device with clusters and few multiprocessors.
SHAPES = [
    ((2, 6, 1, 1), 3, 1),
    ((1, 120, 3, 3), 1, 1),
    ((2, 7, 5, 3), 7, 1),
    ((1, 40, 16, 16), 4, 1),
    ((2, 320, 5, 5), 32, 1),
    ((1, 80, 64, 64), 8, 8),
    ((1, 60, 33, 15), 1, 4),
]


@pytest.mark.parametrize(("shape", "groups", "cluster"), SHAPES)
@pytest.mark.parametrize(("major", "shared"), [(8, SHARED_SM80), (9, SHARED_SM90)])
def test_csrc_equals_the_float64_reference(
    csrc: ctypes.CDLL, shape: tuple[int, ...], groups: int, cluster: int, major: int, shared: int
) -> None:
    csrc.emulate(major, 1, shared)
    made = make(shape, torch.float32)
    assert_near(run(*made, groups, True), exact(*made, groups, True), torch.float32)
    assert csrc.largest_cluster() == (cluster if major == 9 else 1)


@pytest.mark.parametrize("channels", GROUP_CHANNELS)
def test_csrc_for_every_number_of_channels_a_group(csrc: ctypes.CDLL, channels: int) -> None:
    """With and without SiLU and time embedding, on both generations; twice, for the bits."""
    for major, silu, temb in ((8, True, True), (9, True, False), (9, False, True), (8, False, False)):
        csrc.emulate(major, 132, SHARED_SM80)
        made = make((2, 4 * channels, 3, 5), torch.float32, temb=temb)
        actual = run(*made, 4, silu)
        assert_near(actual, exact(*made, 4, silu), torch.float32)
        assert all(map(torch.equal, actual, run(*made, 4, silu)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 48, 6, 5), (1, 6, 5, 7), (1, 9, 4, 4)])
def test_csrc_in_half_precision(csrc: ctypes.CDLL, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """16, 4 and 2 bytes a thread."""
    csrc.emulate(9, 1, SHARED_SM90)
    made = make(shape, dtype)
    y, mean, rstd, *gradients = run(*made, 3, True)
    expected = exact(*made, 3, True)
    assert all(t.dtype == dtype for t in (y, *gradients))
    assert_near((y, *gradients), (expected[0], *expected[3:]), dtype)
    assert_near((mean, rstd), expected[1:3], torch.float32)
    # Weights in float32 beside it; their gradients have its precision.
    made[1:3] = made[1].float(), made[2].float()
    *_, dweight, dbias, _ = run(*made, 3, True)
    assert dweight.dtype == dbias.dtype == torch.float32
    assert_near((dweight, dbias), exact(*made, 3, True)[4:6], torch.float32)


@pytest.mark.parametrize("silu", [True, False])
def test_csrc_without_a_time_embedding(csrc: ctypes.CDLL, silu: bool) -> None:
    csrc.emulate(9, 132, SHARED_SM90)
    made = make((2, 24, 6, 6), torch.float32, temb=False)
    assert_near(run(*made, 3, silu), exact(*made, 3, silu), torch.float32)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_csrc_where_shared_memory_cannot_hold_the_slab(csrc: ctypes.CDLL, multiprocessors: int) -> None:
    """It is read twice then; with many multiprocessors, by the blocks of a cluster."""
    csrc.emulate(9 if multiprocessors > 1 else 8, multiprocessors, 24 * 1024)
    made = make((1, 32, 40, 40), torch.float32)
    assert_near(run(*made, 1, True), exact(*made, 1, True), torch.float32)
    assert csrc.largest_cluster() == (8 if multiprocessors > 1 else 1)
    assert csrc.largest_shared() <= 24 * 1024


@pytest.mark.parametrize("major", [8, 9])
def test_csrc_a_large_offset_costs_no_more_than_its_own_rounding(csrc: ctypes.CDLL, major: int) -> None:
    """As test_group_norm_silu.py derives it: half a bit of 1e4 is 2^-11."""
    csrc.emulate(major, 132, SHARED_SM80)
    made = make((1, 8, 32, 24), torch.float32, offset=1e4, temb=False)
    y, mean, rstd, *_ = run(*made, 2, False)
    expected = exact(*made, 2, False)
    torch.testing.assert_close(mean.double(), expected[1], rtol=0, atol=1.01 * 2**-11)
    torch.testing.assert_close(rstd.double(), expected[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-4, atol=3.5 * 2**-11)


def test_csrc_constant_groups_and_extreme_outputs_are_finite(csrc: ctypes.CDLL) -> None:
    csrc.emulate(9, 1, SHARED_SM90)
    made = make((1, 8, 4, 4), torch.float32, temb=False)
    made[0].fill_(7.25)
    assert all(torch.isfinite(t).all() for t in run(*made, 4, True))
    made = make((1, 8, 4, 4), torch.float32, temb=False)
    made[1].fill_(-1e4)
    assert all(torch.isfinite(t).all() for t in run(*made, 4, True))


def test_csrc_takes_memory_that_is_not_aligned(csrc: ctypes.CDLL) -> None:
    csrc.emulate(9, 1, SHARED_SM90)
    x, weight, bias, temb, dy = make((1, 16, 5, 3), torch.bfloat16)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    shifted = memory[1:].view(1, 5, 3, 16).permute(0, 3, 1, 2)
    shifted.copy_(x)
    assert shifted.data_ptr() % 16 == 2
    expected = run(x, weight, bias, temb, dy, 2, True)
    for a, e in zip(run(shifted, weight, bias, temb, dy, 2, True), expected, strict=True):
        # Only the order of sums differs: at most one unit in the last place of bfloat16.
        torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-5)


def test_a_call_says_which_device_and_stream_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    library = SimpleNamespace(function=lambda *arguments: given.extend(each.value for each in arguments) or 0)
    monkeypatch.setattr(native, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device.index))
    native.call("function", torch.device("cuda", 1), None, 5, 0.5)
    assert given == [None, 5, 0.5, 1, 71]


# ---------------------------------------------------------------------------------------------------------------------
# Building


def devices(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """As if there were CUDA devices of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


CALLS_IT = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.fastgrpo_error.restype = ctypes.c_char_p
null, one, eps = ctypes.c_void_p(), ctypes.c_int64(1), ctypes.c_float(0)
sizes, choices, device = [one] * 4, [one] * 3, ctypes.c_int64(99)
code = library.fastgrpo_group_norm_silu_forward(*[null] * 7, *sizes, eps, *choices, device, null)
print(library.fastgrpo_error(code).decode())
"""


@pytest.mark.slow(10)
@needs_nvcc
def test_the_library_holds_every_kernel_without_spills_and_needs_no_other(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices(monkeypatch, *(divmod(architecture, 10) for architecture in native.ARCHITECTURES))
    library = native.build()
    cuobjdump = pytest.importorskip("fastgrpo.kernels.compile")._CUOBJDUMP
    told = subprocess.run([cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    parts = re.split(r"^arch = sm_(\d+)$", told.stdout, flags=re.MULTILINE)[1:]
    found = dict.fromkeys(map(int, parts[::2]), "")
    for architecture, listed in zip(parts[::2], parts[1::2], strict=True):
        found[int(architecture)] += listed  # the linker's own part is empty
    assert found.keys() == {*native.ARCHITECTURES}
    for architecture, listed in found.items():
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listed)
        assert len(kernels) == 19  # 8 forward, 8 backward, 3 reductions
        with capsys.disabled():
            registers = [int(number) for _, number, *_ in kernels]
            print(f"\nsm_{architecture}: {min(registers)} to {max(registers)} registers")
        # What is spilled lies on the stack, which these kernels have no other use for.
        assert [kernel for kernel in kernels if kernel[2:] != ("0", "0")] == []
    # Without PyTorch in the process, whose runtime would be found by name; device 99 is nowhere.
    done = subprocess.run([sys.executable, "-I", "-c", CALLS_IT, library], capture_output=True, text=True, check=True)
    assert "device" in done.stdout or "driver" in done.stdout, done.stdout


def fake_nvcc(folder: Path, script: str) -> None:
    """An nvcc that says it is version 1 and otherwise does what the script says."""
    path = folder / "nvcc"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo version 1; exit; fi\n{script}\n')
    path.chmod(0o755)


# Writes its process number to the file after -o, in two halves.
WRITES = 'while [ "$1" != -o ]; do shift; done\nprintf half > "$2"; sleep 0.2; printf " $$" >> "$2"'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "cache"


def test_it_is_built_once_for_sources_and_compiler(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path, WRITES)
    first = native.build()
    content = first.read_text()
    assert first.parent == cache
    assert native.build() == first
    assert first.read_text() == content
    fake_nvcc(tmp_path, WRITES.replace("half", "other"))
    (tmp_path / "nvcc").write_text((tmp_path / "nvcc").read_text().replace("version 1", "version 2"))
    assert native.build() != first
    source = tmp_path / "changed.cu"
    source.write_text("// something else")
    monkeypatch.setattr(native, "sources", lambda: [source])
    assert native.build() not in {first}
    assert len(list(cache.iterdir())) == 3


def test_it_is_built_for_the_devices_at_hand(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, f'echo "$*" > {tmp_path}/told; {WRITES}')
    built = set()
    for capabilities, expected in (([], ["80", "90"]), ([(9, 0), (9, 0)], ["90"]), ([(8, 6)], ["86"])):
        devices(monkeypatch, *capabilities)
        built.add(native.build())
        assert re.findall(r"code=sm_(\d+)", (tmp_path / "told").read_text()) == expected
    devices(monkeypatch, (9, 0), (8, 0), (12, 0))
    assert native.architectures() == (80, 90)
    assert len(built) == 3
    monkeypatch.setattr(native, "options", lambda: [])
    assert native.build() not in built


def _build(file: Path) -> None:
    file.write_bytes(native.build().read_bytes())


def test_processes_that_build_at_once_leave_one_whole_file(tmp_path: Path, cache: Path) -> None:
    fake_nvcc(tmp_path, WRITES)
    fork = multiprocessing.get_context("fork")  # nothing but files and compilers is needed there
    files = [tmp_path / name for name in ("one", "two")]
    processes = [fork.Process(target=_build, args=(file,)) for file in files]
    for process in processes:
        process.start()
    for process, file in zip(processes, files, strict=True):
        process.join(120)
        assert process.exitcode == 0
        assert re.fullmatch(r"half \d+", file.read_text())
    assert len(list(cache.iterdir())) == 1


def test_why_it_cannot_be_built(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "echo 'a.cu(3): error: no such type' >&2; exit 2")
    with pytest.raises(native.BuildError, match=r"^nvcc failed: a\.cu\(3\): error: no such type$"):
        native.build()
    assert list(cache.iterdir()) == []
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(native.BuildError, match=r"^csrc could not be built in "):
        native.build()
    monkeypatch.setattr(native, "sources", list)
    with pytest.raises(native.BuildError, match=r"^csrc is not installed$"):
        native.build()
    for path in (str(cache), ""):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(native.BuildError, match=r"^nvcc is not on the PATH$"):
            native.build()


def test_without_nvcc_there_is_one_clear_line_and_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a device that csrc/ is for, with an empty PATH."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    fresh = Backends()
    native.available.cache_clear()
    native._library.cache_clear()
    try:
        for kind in ("forward 1x32x1x1", "backward 1x32x1x1"):
            assert fresh.choose(kind, {}) == "triton"
        with pytest.raises(ValueError, match=r"^the backend of group_norm_silu cannot be 'native': nvcc is not on the"):
            fresh.set("native")
    finally:
        native.available.cache_clear()
    line = "group_norm_silu: triton only, since native cannot be used: nvcc is not on the PATH"
    assert [record.getMessage() for record in caplog.records] == [line]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_not_available() -> None:
    assert native.available() == "there is no CUDA device"


def test_the_sources_of_a_checkout() -> None:
    assert [path.name for path in native.sources()] == ["group_norm_silu.cu"]
