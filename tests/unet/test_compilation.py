"""The compiled UNet is trusted only where its output and every gradient are those of plain calls, up to rounding."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastgrpo.costs.counting import sd1_architecture
from fastgrpo.engine.graphs import StaticCall, no_host_sync
from fastgrpo.engine.sampler import Sampler
from fastgrpo.policy import Policy
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.unet import compilation
from fastgrpo.unet.compilation import (
    DoublingUpsample2D,
    GradientCheck,
    _weights,
    check_compiled,
    compare_gradients,
    compile_forward,
    make_example,
    relative_errors,
)
from fastgrpo.unet.copies import Network, computing_unet
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.lora import add_lora

ROWS = 5


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compilation"


def make_unet(channels: int = 16, **changes: Any) -> UNet2DConditionModel:
    """Two levels, a resnet in each, attention in the middle.

    Every norm has four channels in a group, so that every bias has a gradient.
    """
    config = {
        "sample_size": 8,
        "block_out_channels": (channels, channels),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config | changes)
    return unet.to(memory_format=torch.channels_last).eval()


def example_of(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return make_example(unet, (4, 8, 8), 5, dtype, torch.device(device))


def cutting(unet: UNet2DConditionModel, name: str) -> Network:
    """The network with the right output, but zero gradients for a module and wrong ones for what feeds it."""
    module = unet.get_submodule(name)

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach() + 0 * output

    def call(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
        handle = module.register_forward_hook(cut)
        try:
            return unet(*inputs, return_dict=return_dict)
        finally:
            handle.remove()

    return call


class Compiler:
    """In torch.compile's place: hands out what `make` makes of a network, and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[UNet2DConditionModel], Network]):
        self.calls = 0
        self._make = make
        monkeypatch.setattr(torch, "compile", self)

    def __call__(self, network: UNet2DConditionModel, dynamic: bool, fullgraph: bool, options: dict | None) -> Network:
        assert fullgraph
        assert not dynamic
        made = self._make(network)

        def call(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
            self.calls += 1
            return made(*inputs, return_dict=return_dict)

        return call


def start(
    unet: UNet2DConditionModel,
    operators: str = "",
    dtype: torch.dtype = torch.float32,
    rows: int = ROWS,
) -> tuple[Network | None, list[str]]:
    lines: list[str] = []
    network = computing_unet(unet, dtype)
    made = compile_forward(network, unet, example_of(unet, dtype), rows, operators, lines.append)
    return made, lines


# ---------------------------------------------------------------------------------------------------------------------
# What is accepted


def compare_tensors(exact: dict[str, Tensor], eager: dict[str, Tensor], compiled: dict[str, Tensor]) -> GradientCheck:
    return compare_gradients(tuple(exact), relative_errors(exact, eager), relative_errors(exact, compiled))


def compared_errors(eager: dict[str, float], compiled: dict[str, float]) -> GradientCheck:
    """Tensors of 100 ones; the arguments are the relative errors, spread alternately."""
    signs = torch.ones(100)
    signs[::2] = -1
    tensors = [
        {name: torch.ones(100) + error * signs for name, error in errors.items()} for errors in (eager, compiled)
    ]
    return compare_tensors({name: torch.ones(100, dtype=torch.float64) for name in eager}, *tensors)


# The bounds by the formula, with a median of 0.01.
@pytest.mark.parametrize(
    ("plain", "accepted", "refused"),
    [
        (0.01, 0.078, 0.082),  # 8 e = 0.08
        (0.0, 0.078, 0.082),  # 8 m = 0.08
        (0.05, 0.39, 0.41),  # 8 e = 0.4
        (0.2, 0.49, 0.51),  # 1/2
        (0.4, 0.79, 0.81),  # 2 e
    ],
)
def test_the_bound_is_that_of_the_formula(plain: float, accepted: float, refused: float) -> None:
    eager = {"output": 0.01, "a": 0.01, "b": plain, "c": 0.01, "d": 0.01}
    assert compared_errors(eager, eager | {"b": accepted}).matches
    found = compared_errors(eager, eager | {"b": refused})
    assert not found.matches
    assert found.worst == "b"
    assert found.error == pytest.approx(refused, rel=1e-4)
    assert accepted < found.bound < refused


@pytest.mark.parametrize("what", ["output", "a"])
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 2.0, float("nan"), float("inf")])
def test_zeros_halves_and_what_is_not_finite_are_refused(what: str, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = {name: torch.randn(50, generator=generator, dtype=torch.float64) for name in ("output", "a", "b")}
    eager = {name: value + 0.05 * torch.randn(50, generator=generator) for name, value in exact.items()}
    found = compare_tensors(exact, eager, eager | {what: factor * eager[what]})
    assert (found.matches, found.worst) == (False, what)


def test_gradients_that_are_zero_stay_zero() -> None:
    exact = {"output": torch.ones(3), "a": torch.ones(3), "b": torch.zeros(3)}
    assert compare_tensors(exact, exact, exact) == GradientCheck(True, "output", 0.0, 0.0)
    assert compare_tensors(exact, exact, exact | {"b": torch.full((3,), 1e-20)}).worst == "b"
    noise = exact | {"b": torch.full((3,), 1e-9)}
    assert compare_tensors(exact, noise, noise).matches, "as wrong as plain calls"


def test_rounding_in_another_order_is_accepted() -> None:
    """1,000 parameters of 4 to 400 elements, with errors of the same size but independent."""
    generator = torch.Generator().manual_seed(3)
    exact, eager, compiled = {}, {}, {}
    for index in range(1000):
        size = 4 + index % 397
        exact[str(index)] = value = torch.randn(size, generator=generator, dtype=torch.float64)
        eager[str(index)] = value + 0.01 * torch.randn(size, generator=generator)
        compiled[str(index)] = value + 0.01 * torch.randn(size, generator=generator)
    assert compare_tensors(exact, eager, compiled).matches


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_matches_itself_and_not_one_whose_gradient_is_cut(dtype: torch.dtype) -> None:
    unet = make_unet()
    network, example = computing_unet(unet, dtype), example_of(unet, dtype)
    found = check_compiled(network, unet, network, example, ROWS)
    assert found.matches
    # Plain calls have that error themselves. float32 has 2^-24, bfloat16 2^-9; sums through some 30 layers leave 1 to
    # 100 of it.
    ulp = torch.finfo(dtype).eps / 2
    assert ulp < found.error < 100 * ulp
    wrong = check_compiled(network, unet, cutting(network, "mid_block.resnets.0.conv1"), example, ROWS)
    assert not wrong.matches
    assert wrong.error > 0.5
    assert all(parameter.grad is None for parameter in (*unet.parameters(), *network.parameters()))


@pytest.mark.parametrize("distinct", [1, 2])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 33, 66])
def test_copies_of_a_row_count_once_together_and_none_of_them_little(rows: int, distinct: int) -> None:
    weights = _weights(distinct, rows)
    assert all(weights[first::distinct].sum() == 1 for first in range(distinct))
    assert set(weights.abs().tolist()) <= {0.5, 1.0}
    assert torch.equal(weights, weights.bfloat16().float())


@pytest.mark.parametrize("rows", [1, 2, 9, 12])
def test_any_number_of_rows_is_compared_with_two(rows: int) -> None:
    """Plain calls match themselves, by the rounding of two rows: not by that of sums over more, relative to nothing."""
    unet = make_unet()
    network, example = computing_unet(unet, torch.float32), example_of(unet)
    seen: list[int] = []

    def counted(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append(len(inputs[0]))
        return network(*inputs, return_dict=return_dict)

    found = check_compiled(network, unet, counted, example, rows)
    assert seen == [rows]
    assert found.matches
    # 2^-24 a rounding, of which sums through some 30 layers leave 1 to 100.
    assert found.error < 100 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["output", "gradient", "size"])
def test_one_wrong_row_of_many_is_seen(kind: str, dtype: torch.dtype) -> None:
    """Off by a tenth, or left out of a gradient's sum; or code that is wrong for the run's number of rows alone."""
    unet = make_unet()
    network, example, rows = computing_unet(unet, dtype), example_of(unet, dtype), 33

    def wrong_at(row: int) -> Network:
        def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if kind == "size":
                return output if len(output) == 2 else output.detach() + 0 * output
            return torch.where(_only(row, output), output.detach(), output) if kind == "gradient" else output

        def call(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
            with network.get_submodule("mid_block.resnets.0.conv1").register_forward_hook(cut):
                (output,) = network(*inputs, return_dict=return_dict)
            return (output + 0.1 * _only(row, output) if kind == "output" else output,)

        return call

    for row in (0, 1, rows - 1) if kind != "size" else (0,):
        wrong = check_compiled(network, unet, wrong_at(row), example, rows)
        assert not wrong.matches
        assert wrong.error > (0.05 if kind == "output" else 0.3)
        assert (wrong.worst == "output") == (kind == "output")


def _only(row: int, tensor: Tensor) -> Tensor:
    """[R, 1, 1, 1] bool: which row it is."""
    return (torch.arange(len(tensor)) == row).view(-1, 1, 1, 1)


def test_adapters_are_compared_although_they_begin_with_zeros() -> None:
    """With B = 0 the gradient of A is 0 whatever the compiler does."""
    unet = make_unet()
    add_lora(unet, ModelConfig(lora_rank=2), seed=0, frozen_dtype=torch.bfloat16)
    network, example = computing_unet(unet, torch.bfloat16), example_of(unet, torch.bfloat16)
    before = copy.deepcopy(network.state_dict())
    assert check_compiled(network, unet, network, example, ROWS).matches
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default"
    wrong = check_compiled(network, unet, cutting(network, name), example, ROWS)
    assert not wrong.matches
    assert wrong.worst == f"{name}.weight"
    assert wrong.error == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# What is decided


def test_a_check_is_remembered_for_what_it_was_made_for(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    compiler, unet = Compiler(monkeypatch, lambda network: network), make_unet()

    def compared(*arguments: Any, **options: Any) -> bool:
        before = compiler.calls
        made, lines = start(*arguments, **options)
        assert made is not None
        assert not lines
        return compiler.calls > before

    assert compared(unet)
    assert not compared(unet)
    assert not compared(make_unet()), "another one of the same structure"
    assert compared(unet, operators="kernels on")
    assert compared(unet, dtype=torch.bfloat16)
    assert compared(unet, rows=ROWS + 1)
    assert compared(make_unet(cross_attention_dim=12))
    frozen = make_unet()
    frozen.conv_out.bias.requires_grad_(False)
    assert compared(frozen)
    for module, name in ((torch, "__version__"), (diffusers, "__version__"), (compilation, "VERSION")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0.0.1")
            assert compared(unet), module.__name__
    with monkeypatch.context() as patch:
        patch.setattr(compilation.platform, "node", lambda: "another")
        assert compared(unet)
    assert not compared(unet)
    assert len(list(cache.iterdir())) == 10


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"key": {}, "check": {}}', "another", "types"])
def test_a_damaged_memory_is_no_memory(content: bytes | str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    compiler, unet = Compiler(monkeypatch, lambda network: network), make_unet()
    start(unet)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    if content == "another":
        content = good.replace(b"torch.float32", b"torch.float16")
    elif content == "types":
        content = good.replace(b"true", b'"no"')
    file.write_bytes(content)
    assert start(unet)[0] is not None
    assert compiler.calls == 2
    assert file.read_bytes() == good


@pytest.mark.parametrize("where", ["file", "nowhere"])
def test_without_a_place_to_remember_it_is_compared_every_time(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setattr(compilation, "cache_folder", lambda: Path("~no such user").expanduser())  # RuntimeError
    compiler, unet = Compiler(monkeypatch, lambda network: network), make_unet()
    for count in (1, 2):
        made, lines = start(unet)
        assert made is not None
        assert not lines
        assert compiler.calls == count


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGRPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert compilation.cache_folder() == Path("/elsewhere/fastgrpo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert compilation.cache_folder() == Path("/home/someone/.cache/fastgrpo")


def test_a_wrong_gradient_turns_it_off_with_one_line_that_is_remembered(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    compiler = Compiler(monkeypatch, lambda network: cutting(network, "up_blocks.1.resnets.0.conv2"))
    names = dict(make_unet().named_parameters())
    for count, when in ((1, "compared now"), (1, "compared before on this machine")):
        made, lines = start(make_unet())
        assert made is None
        (line,) = lines
        pattern = r"torch\.compile is left out: its gradient of (\S+) is off by (\S+), of which .* \S+ \(when\)"
        worst, error = re.fullmatch(pattern, line.replace(when, "when")).group(1, 2)
        assert worst in names
        assert float(error) > 0.5
        assert compiler.calls == count
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["check"]["matches"] is False


@pytest.mark.parametrize("kind", ["output", "error"])
def test_a_wrong_output_or_a_failure_turns_it_off(kind: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def make(network: UNet2DConditionModel) -> Network:
        def call(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
            if kind == "error":
                raise OSError("no compiler\nanywhere")
            (output,) = network(*inputs, return_dict=return_dict)
            return (output + 0.1,)

        return call

    Compiler(monkeypatch, make)
    made, lines = start(make_unet())
    assert made is None
    (line,) = lines
    if kind == "error":
        assert line == "torch.compile is left out: it failed with OSError: no compiler anywhere"
        assert not cache.exists(), "tried again next time: what was missing may be there"
    else:
        assert line.startswith("torch.compile is left out: its output is off by ")


def test_failing_for_a_later_shape_it_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own errors only: others are the caller's."""

    def make(network: UNet2DConditionModel) -> Network:
        def call(*inputs: Tensor, return_dict: bool) -> tuple[Tensor]:
            rows = len(inputs[0])
            if rows == 3:
                raise torch._dynamo.exc.Unsupported("three rows")
            if rows == 5:
                raise torch.OutOfMemoryError("five rows")
            return network(*inputs, return_dict=return_dict)

        return call

    compiler, unet = Compiler(monkeypatch, make), make_unet()
    made, lines = start(unet, rows=2)
    inputs = [torch.cat([tensor, tensor, tensor[:1]]) for tensor in example_of(unet)]
    with pytest.raises(torch.OutOfMemoryError):
        made(*inputs, return_dict=False)
    assert not lines
    for _ in range(2):
        three = [tensor[:3] for tensor in inputs]
        assert torch.equal(made(*three, return_dict=False)[0], unet(*three, return_dict=False)[0])
    assert lines == ["torch.compile is left out from here on: it failed with Unsupported: three rows"]
    assert compiler.calls == 3


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


def test_doubling_is_nearest_neighbour_upsampling() -> None:
    """The same bits; in the gradient, sums of four, in which two orders differ by at most 3 roundings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Upsample2D(4, use_conv=True, out_channels=6)
    doubling = copy.deepcopy(plain)
    doubling.__class__ = DoublingUpsample2D
    compiled = torch.compile(doubling, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = plain(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for module in (doubling, compiled):
        output = module(x)
        assert torch.equal(output, expected)
        (given,) = torch.autograd.grad(output.square().sum(), x)
        assert (given - gradient).norm() < 3 * 2.0**-24 * gradient.abs().max() * gradient.numel() ** 0.5
    odd = x[:, :, :4, :6].detach()
    assert torch.equal(doubling(odd, (7, 11)), plain(odd, (7, 11)))


def test_it_is_compiled_once_for_all_that_a_run_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check, a denoising step and a micro-batch: Dynamo guards on shapes, strides, dtypes and gradient mode."""
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiler(network, backend=counter, dynamic=False))
    unet = make_unet(8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    pairs = 3
    made, _ = start(unet, dtype=torch.bfloat16, rows=2 * pairs)
    assert made is not None
    assert counter.frame_count == 1

    def passes(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        with torch.enable_grad():
            return made(*args, **kwargs)

    policy = Policy(unet, None, None, None, {}, torch.device("cpu"), torch.bfloat16, passes=passes)
    vars(policy)["unconditional"] = torch.zeros(1, 5, 8)
    schedule = make_schedule(sd1_architecture().scheduler, 4, 1.0, torch.device("cpu"))
    latents, embeds = torch.randn(pairs, 4, 8, 8), torch.randn(pairs, 5, 8)
    with torch.no_grad():
        denoise = Sampler(policy, schedule, 5.0).chunk(embeds)
        drawn, _ = denoise(0, latents, torch.randn_like(latents))
    rows = policy.rows(drawn, schedule.timesteps[torch.tensor([1, 0, 2])], embeds, 5.0)
    output = policy.forward(*rows, return_dict=False)[0]
    assert output.requires_grad
    assert counter.frame_count == 1


def test_upsamplers_are_replaced_in_what_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Compiler(monkeypatch, lambda network: network)
    unet = make_unet()
    network = computing_unet(unet, torch.float32)
    keys = list(network.state_dict())
    compile_forward(network, unet, example_of(unet), ROWS, "", print)
    kinds = {type(module) for module in network.modules()}
    assert DoublingUpsample2D in kinds
    assert Upsample2D not in kinds
    assert list(network.state_dict()) == keys
    assert not any(isinstance(module, DoublingUpsample2D) for module in unet.modules())


class Upper(nn.Module):
    """The part of a UNet that compilers have got wrong: a resnet below an upsampler. A whole one takes minutes."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.resnet = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=4)
        self.upsampler = Upsample2D(8, use_conv=True, out_channels=4)

    def forward(self, latents: Tensor, timesteps: Tensor, contexts: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.upsampler(self.resnet(self.conv_in(latents), None)),)


@pytest.mark.slow(10)
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU torch.compile needs g++")
def test_compiled_code_is_compared_and_used() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Upper().to(memory_format=torch.channels_last).eval()
    plain, example = copy.deepcopy(network), (torch.randn(2, 4, 8, 8), torch.zeros(2).long(), torch.zeros(2, 1, 1))
    lines: list[str] = []
    made = compile_forward(network, plain, example, ROWS, "", lines.append)
    assert not lines
    assert made is not None
    found = check_compiled(network, plain, made, example, ROWS)
    # float32 rounds by 6e-8; sums over at most 128 terms, through eight layers, leave less than 100 of it.
    assert 0 < found.error < 6e-6
    other = torch.randn(ROWS, 4, 8, 8), torch.zeros(ROWS).long(), torch.zeros(ROWS, 1, 1)  # what it was compiled for
    (output,) = made(*other, return_dict=False)
    gradients = torch.autograd.grad(output, list(network.parameters()), torch.ones_like(output))
    (expected,) = plain(*other, return_dict=False)
    wanted = torch.autograd.grad(expected, list(plain.parameters()), torch.ones_like(expected))
    for given, value in zip((output, *gradients), (expected, *wanted), strict=True):
        assert (given - value).norm() < 1e-5 * value.norm()
    cut = check_compiled(network, plain, cutting(network, "resnet"), example, ROWS)
    assert not cut.matches


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_it_is_right_and_can_be_captured(dtype: torch.dtype) -> None:
    unet = make_unet(32).cuda()
    network, example = computing_unet(unet, dtype), example_of(unet, dtype, "cuda")
    patch_unet(network)
    lines: list[str] = []
    made = compile_forward(network, unet, example, len(example[0]), "kernels on", lines.append)
    assert not lines
    assert made is not None
    parameters = list(network.parameters())

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        (output,) = made(*inputs, return_dict=False)
        return output.detach(), *torch.autograd.grad(output, parameters, torch.ones_like(output))

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        call = StaticCall(step, example, capture=True)
        inputs = example[0] + 1, example[1] - 20, example[2] * 2
        with no_host_sync():
            replayed = call(*inputs)
        for given, value in zip(replayed, step(*inputs), strict=True):
            assert (given - value).norm() <= 1e-2 * value.norm()  # attention's backward pass may add in any order
