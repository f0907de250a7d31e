"""Attention backends: what the UNet asks for, who is chosen, and that every one of them computes the same."""

import copy
import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgrpo
from fastgrpo.kernels.timing import device_milliseconds
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.workers import Workers
from fastgrpo.unet import attention, attention_choice
from fastgrpo.unet.attention import (
    BACKENDS,
    AttentionPlan,
    AttentionProcessor,
    AttentionShape,
    Choice,
    apply_plan,
    attention_shapes,
)
from fastgrpo.unet.attention_choice import choose_backends, tolerance
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.lora import add_lora
from support.sd_pipelines import build_unet

CPU = torch.device("cpu")
REAL = Path(fastgrpo.__file__).parent / "models"
SMALL = AttentionShape(2, 3, 6, 5, 8, "cross", ("a", "b"))
LARGE = AttentionShape(3, 2, 16, 16, 8, "self", ("c",))


def sd1_shapes(rows: int) -> list[AttentionShape]:
    dims = {64: 40, 32: 80, 16: 160, 8: 160}
    kinds = [(width, dim, keys) for width, dim in dims.items() for keys in (width * width, 77)]
    return [
        AttentionShape(rows, 8, width * width, keys, dim, "cross" if keys == 77 else "self", (f"{width} {keys}",))
        for width, dim, keys in kinds
    ]


# --- the processor ---------------------------------------------------------------------------------------------------


def make_attention(seed: int = 0, **options) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Attention(**{"query_dim": 48, "heads": 2, "dim_head": 24} | options).double()


def outcome(module: Attention, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs and parameters."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    output = module(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), [*inputs, *module.parameters()])]


def random(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(ours: list[Tensor], theirs: list[Tensor], error: float) -> None:
    """error: of the norm of each tensor's difference, relative to the tensor's norm."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= error * other.norm()


# Head dims of SD 1.x; 77 tokens of text; what image attention in other UNets has.
MODULES = {
    "self 40": ({"query_dim": 80, "dim_head": 40}, [(2, 10, 80)]),
    "cross 40": ({"query_dim": 80, "dim_head": 40, "cross_attention_dim": 24}, [(2, 10, 80), (2, 77, 24)]),
    "cross 80": ({"query_dim": 160, "dim_head": 80, "cross_attention_dim": 24}, [(2, 10, 160), (2, 77, 24)]),
    "cross 160": ({"query_dim": 320, "dim_head": 160, "cross_attention_dim": 24}, [(2, 10, 320), (2, 77, 24)]),
    "residual": ({"residual_connection": True, "rescale_output_factor": 1.7}, [(2, 10, 48)]),
    "image": ({"norm_num_groups": 6, "residual_connection": True}, [(2, 48, 3, 5)]),
}


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("name", MODULES)
def test_processor_equals_the_plain_math_of_diffusers(name: str, backend: str) -> None:
    options, sizes = MODULES[name]
    module = make_attention(**options)
    inputs = [random(*size, seed=seed) for seed, size in enumerate(sizes)]
    module.set_processor(AttnProcessor())
    plain = outcome(module, *inputs)
    module.set_processor(AttentionProcessor(backend))
    # float64: sums of at most 320 products, a few in a row, each off by less than 320 roundoffs of 1.1e-16.
    assert_near(outcome(module, *inputs), plain, 1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_processor_has_the_bits_of_diffusers_own(name: str) -> None:
    options, sizes = MODULES[name]
    module = make_attention(**options).float()
    inputs = [random(*size, seed=seed).float() for seed, size in enumerate(sizes)]
    assert isinstance(module.processor, AttnProcessor2_0)
    before = outcome(module, *inputs)
    module.set_processor(AttentionProcessor("sdpa"))
    assert all(map(torch.equal, outcome(module, *inputs), before))


def test_a_mask_is_refused() -> None:
    module = make_attention()
    module.set_processor(AttentionProcessor("sdpa"))
    with pytest.raises(ValueError, match="no attention mask"):
        module(random(2, 10, 48), attention_mask=torch.zeros(2, 1, 10))


# --- a whole UNet ----------------------------------------------------------------------------------------------------


def make_unet(name: str, lora: bool = False) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build_unet(name)
    if lora:
        add_lora(unet, ModelConfig(lora_rank=2), seed=0, frozen_dtype=torch.float32)
        with torch.no_grad():  # B is 0 at first
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
    return unet


def run(unet: UNet2DConditionModel) -> list[Tensor]:
    latents = random(2, 4, 8, 8).float()
    contexts = random(2, 7, unet.config.cross_attention_dim, seed=2).float()
    output = unet(latents, torch.tensor([3, 700]), contexts, return_dict=False)[0]
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), learning)]


def plan_for(unet: UNet2DConditionModel, wanted: str, rows: int = 2, tokens: int = 7, **options) -> AttentionPlan:
    return choose_backends(wanted, attention_shapes(unet, rows, (4, 8, 8), tokens), CPU, torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("sd1", False), ("sd2", True)])
def test_a_unet_computes_the_same(name: str, lora: bool) -> None:
    unet = make_unet(name, lora)
    before = run(unet)
    keys = list(unet.state_dict())
    for wanted in ("auto", "flash"):
        apply_plan(unet, plan_for(unet, wanted))
        processors = {processor.backend for processor in unet.attn_processors.values()}
        assert processors == {"flash" if wanted == "flash" else "sdpa"}
        # On the CPU PyTorch's own choice is its flash kernel too, so that all have the same bits.
        assert all(map(torch.equal, run(unet), before))
    assert list(unet.state_dict()) == keys
    assert all(map(torch.equal, run(copy.deepcopy(unet)), before))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_transformer_is_one_graph_and_computes_the_same(compiler: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)
    block.attn1.set_processor(AttentionProcessor("sdpa"))
    block.attn2.set_processor(AttentionProcessor("flash"))

    def outcome_of(call: Callable[..., Tensor]) -> list[Tensor]:
        output = call(random(2, 10, 32).float(), encoder_hidden_states=random(2, 77, 24, seed=2).float())
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad((output * weights).sum(), list(block.parameters()))]

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=False)
    # float32, the same operations: rounding in another order at most, in some 20 sums of up to 128 products, each off
    # by sqrt(128) * 6e-8 = 7e-7.
    assert_near(outcome_of(compiled), outcome_of(block), 1.5e-5)
    torch._dynamo.reset()


# How many transformers SD 1.x and 2.x have at each width: two down and three up at three widths, one in the middle.
AT_WIDTH = {64: 5, 32: 5, 16: 5, 8: 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "heads"),
    [("sd1", {64: (8, 40), 32: (8, 80), 16: (8, 160), 8: (8, 160)}),
     ("sd2", {64: (5, 64), 32: (10, 64), 16: (20, 64), 8: (20, 64)})],
)  # fmt: skip
def test_shapes_of_the_real_models(name: str, heads: dict[int, tuple[int, int]]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(REAL / name / "unet"))
    processors = dict(unet.attn_processors)
    shapes = attention_shapes(unet, 8, (4, 64, 64), 77)
    assert unet.attn_processors == processors
    counts = {(s.heads, s.head_dim, s.queries, s.keys, s.kind): len(s.layers) for s in shapes}
    wanted = {
        (*heads[w], w * w, keys, kind): n
        for w, n in AT_WIDTH.items()
        for keys, kind in ((w * w, "self"), (77, "cross"))
    }
    assert counts == wanted
    assert {shape.rows for shape in shapes} == {8}
    layers = [layer for shape in shapes for layer in shape.layers]
    assert sorted(f"{layer}.processor" for layer in layers) == sorted(processors)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in layers


@pytest.mark.slow
def test_shapes_are_the_same_with_adapters_and_patches_and_need_no_weights() -> None:
    plain = attention_shapes(make_unet("sd1"), 2, (4, 8, 8), 7)
    unet = make_unet("sd1", lora=True)
    assert attention_shapes(unet, 2, (4, 8, 8), 7) == plain
    unet.to(torch.bfloat16)
    patch_unet(unet)
    for parameter in unet.parameters():
        parameter.data.fill_(float("nan"))
    processors = dict(unet.attn_processors)
    assert attention_shapes(unet, 2, (4, 8, 8), 7) == plain
    assert unet.attn_processors == processors
    assert {parameter.device.type for parameter in unet.parameters()} == {"cpu"}


@pytest.mark.slow
def test_shapes_follow_the_latent_and_the_text() -> None:
    unet = make_unet("sd1")
    wide = attention_shapes(unet, 3, (4, 8, 16), 5)
    assert (wide[0].rows, wide[0].queries, wide[0].keys, wide[0].kind) == (3, 128, 128, "self")
    assert (wide[1].rows, wide[1].queries, wide[1].keys, wide[1].kind) == (3, 128, 5, "cross")


def test_attention_that_does_more_is_left_alone() -> None:
    unet = make_unet("sd1")
    special = {
        "norm of queries": make_attention(qk_norm="layer_norm"),
        "norm of the context": make_attention(cross_attention_norm="layer_norm"),
        "no scale": make_attention(scale_qk=False),
        "added keys": make_attention(added_kv_proj_dim=8),
    }
    unet.special = torch.nn.ModuleDict(special)
    before = {name: module.processor for name, module in special.items()}
    apply_plan(unet, plan_for(unet, "sdpa"))
    assert {name: module.processor for name, module in special.items()} == before


def test_a_plan_of_another_unet_is_refused() -> None:
    unet = make_unet("sd1")
    plan = plan_for(unet, "sdpa")
    with pytest.raises(ValueError, match=r"another UNet: only one of them has mid_block\.attentions"):
        apply_plan(unet, AttentionPlan("sdpa", tuple(c for c in plan.choices if "mid_block" not in c.shape.layers[0])))


# --- the choice ------------------------------------------------------------------------------------------------------


class Timed:
    """Backends that compute rightly, and a clock that says how long each takes for how many queries."""

    def __init__(self, milliseconds: dict[tuple[str, int], float]):
        self.milliseconds = milliseconds
        self.called: tuple[str, int] = ("", 0)
        self.backends = {name: self._backend(name) for name, _ in milliseconds}

    def _backend(self, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.called = (name, query.shape[2])
            return F.scaled_dot_product_attention(query, key, value)

        return attend

    def clock(self, call: Callable[[], object]) -> float:
        self.called = ("", 0)
        call()
        return self.milliseconds[self.called]


def test_auto_takes_the_fastest_for_each_shape() -> None:
    timed = Timed({("sdpa", 6): 3.0, ("x", 6): 2.0, ("y", 6): 4.0, ("sdpa", 16): 9.0, ("x", 16): 8.0, ("y", 16): 5.0})
    plan = choose_backends("auto", (SMALL, LARGE), CPU, torch.float32, clock=timed.clock, backends=timed.backends)
    assert [choice.backend for choice in plan.choices] == ["x", "y"]
    assert plan.choices[0].milliseconds == {"sdpa": 3.0, "x": 2.0, "y": 4.0}
    assert plan.shapes == (SMALL, LARGE)
    # Two layers like SMALL, one like LARGE: 2 * 2 + 5.
    assert plan.lines() == (
        "attention: x for 2 layers, y for 1 layer; 9.00 ms forward and backward "
        "(x alone 12.00, y alone 13.00, sdpa alone 15.00)",
    )


def scaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return 1.01 * F.scaled_dot_product_attention(query, key, value)


def wrong_gradient_of_the_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, 2 * key - key.detach(), value)


def not_a_number(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value) * float("nan")


def last_row_forgotten(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output = F.scaled_dot_product_attention(query, key, value)
    return torch.cat([output[:-1], 0 * output[-1:]])


def failing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError("No operator found\n `op` is not supported because:\n    head_dim is odd")


def too_large(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 68 GiB")


BROKEN = {
    scaled: "its output is off by 1.0e-02",
    wrong_gradient_of_the_key: "key's gradient is off by 1.0e+00",
    not_a_number: "its output is off by nan",
    last_row_forgotten: "its output is off by",
    failing: "head_dim is odd",
    too_large: "out of memory",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_a_wrong_or_failing_backend_is_left_out_with_its_reason(broken: attention.Attend) -> None:
    backends = {"sdpa": BACKENDS["sdpa"], "broken": broken}
    plan = choose_backends("auto", (SMALL,), CPU, torch.float32, clock=lambda call: 1.0, backends=backends)
    assert plan.choices[0].backend == "sdpa"
    assert plan.choices[0].milliseconds == {"sdpa": 1.0}
    assert BROKEN[broken] in plan.choices[0].excluded["broken"]
    assert plan.lines()[1].startswith("  broken left out for 2 layers: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_right_backends_are_within_the_tolerance(backend: str, dtype: torch.dtype) -> None:
    shape = AttentionShape(3, 2, 64, 77, 40, "cross", ("a",))
    plan = choose_backends(
        "auto", (shape, LARGE), CPU, dtype, clock=lambda call: 1.0, backends={backend: BACKENDS[backend]}
    )
    assert [choice.backend for choice in plan.choices] == [backend, backend]
    # Half a percent of error must not hide behind float32's rounding, nor ten percent behind bfloat16's.
    assert tolerance(dtype, 77) < (5e-3 if dtype == torch.float32 else 0.1)


def test_auto_and_sdpa_measure_nothing_on_the_cpu() -> None:
    huge = AttentionShape(10**6, 8, 4096, 4096, 40, "self", ("a",))  # 10 TB, if anybody tried
    for wanted in ("auto", "sdpa"):
        plan = choose_backends(wanted, (huge,), CPU, torch.float32)
        assert plan.choices == (Choice(huge, "sdpa"),)
        assert plan.lines() == ("attention: sdpa for 1 layer",)


def test_a_named_backend_is_taken_where_it_can_be() -> None:
    def only_small(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[2] > 8:
            raise RuntimeError("more than 8 queries")
        return F.scaled_dot_product_attention(query, key, value)

    plan = choose_backends("flash", (SMALL, LARGE), CPU, torch.float32, backends={"flash": only_small})
    assert [choice.backend for choice in plan.choices] == ["flash", "sdpa"]
    assert plan.lines() == (
        "attention: flash for 2 layers, sdpa for 1 layer",
        "  flash left out for 1 layer: more than 8 queries",
    )


@pytest.mark.parametrize("wanted", ["cudnn", "xformers"])
def test_a_named_backend_that_can_do_nothing_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_backends(wanted, (SMALL, LARGE), CPU, torch.float32)
    assert str(refused.value) == f"engine.attention = '{wanted}': it runs on CUDA only; accepted here is auto or sdpa."


def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine.attention = 'xformers': the library xformers is not installed;"):
        choose_backends("xformers", (SMALL,), CPU, torch.float32)
    plan = choose_backends("auto", (SMALL,), CPU, torch.float32, clock=lambda call: 1.0)
    assert plan.choices[0].excluded["xformers"] == "the library xformers is not installed"
    unet = make_unet("sd1")
    stored = tuple(Choice(choice.shape, "xformers") for choice in plan_for(unet, "sdpa").choices)
    with pytest.raises(ConfigError, match="'auto': the library xformers is not installed, which this run's plan needs"):
        apply_plan(unet, AttentionPlan("auto", stored))


def test_xformers_asked_for_by_name_comes_through_diffusers_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA the hook refuses, so it is replaced by what it does there."""
    asked = []

    def hook(unet: UNet2DConditionModel) -> None:
        asked.append(unet)
        unet.set_attn_processor(XFormersAttnProcessor())

    monkeypatch.setattr(UNet2DConditionModel, "enable_xformers_memory_efficient_attention", hook)
    unet = make_unet("sd1")
    choices = plan_for(unet, "sdpa").choices
    partly = (*(Choice(choice.shape, "xformers") for choice in choices[:-1]), choices[-1])
    apply_plan(unet, AttentionPlan("xformers", partly))
    assert asked == [unet]
    for choice in partly:
        for layer in choice.shape.layers:
            processor = unet.get_submodule(layer).processor
            assert type(processor) is (XFormersAttnProcessor if choice.backend == "xformers" else AttentionProcessor)
    apply_plan(unet, AttentionPlan("auto", partly))
    assert asked == [unet]
    backends = {processor.backend for processor in unet.attn_processors.values()}
    assert backends == {"xformers", "sdpa"}


def test_xformers_gets_and_gives_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own documentation: [B, M, H, K] in and out, softmax(Q K^T / sqrt(K)) V."""

    def documented(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert all(tensor.is_contiguous() for tensor in (query, key, value))  # nothing to copy
        scores = torch.einsum("bmhk,bnhk->bhmn", query, key) * query.shape[-1] ** -0.5
        return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), value)

    import xformers.ops

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", documented)
    module = make_attention(cross_attention_dim=24)
    inputs = random(2, 10, 48), random(2, 7, 24)
    plain = outcome(module, *inputs)
    module.set_processor(AttentionProcessor("xformers"))
    assert_near(outcome(module, *inputs), plain, 1e-12)  # as above


# --- xformers, whichever version of PyTorch it was built for ----------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What xformers asks of PyTorch, as beside a CUDA build and an H200; and a library of its own that did not load."""
    common = importlib.import_module("xformers.ops.fmha.common")
    monkeypatch.setattr(common, "_built_with_cuda", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


def on_a_gpu(shape: AttentionShape, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values without memory, laid out as the projections leave them."""
    with FakeTensorMode():
        return [
            torch.empty(shape.rows, tokens, shape.heads, shape.head_dim, device="cuda", dtype=dtype).transpose(1, 2)
            for tokens in (shape.queries, shape.keys, shape.keys)
        ]


@pytest.mark.parametrize("shape", sd1_shapes(2), ids=lambda shape: shape.layers[0])
def test_xformers_has_pytorchs_kernels_where_its_own_library_does_not_load(
    shape: AttentionShape, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = on_a_gpu(shape, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="wasn't build with CUDA support"):
        attention_choice._xformers_operators(*inputs)
    assert attention.xformers_missing() == ""
    flash = torch.backends.cuda.is_flash_attention_available()  # not in PyTorch's CPU builds
    kind, name = ("flash", "fa2") if flash else ("memory-efficient", "cutlass")
    runs = [operator.NAME for operator in attention_choice._xformers_operators(*inputs)]
    assert [run.removesuffix("-pt").partition("@")[0] for run in runs] == [f"{name}F", f"{name}B"]
    assert attention_choice._in_words(runs) == f"{runs[0]} and {runs[1]}, PyTorch's {kind} kernels"
    # Flash has no float32.
    single = attention_choice._xformers_operators(*on_a_gpu(shape, torch.float32))
    assert [operator.NAME for operator in single] == ["cutlassF-pt", "cutlassB-pt"]
    monkeypatch.setattr(torch.version, "cuda", None)  # then there are none, and nothing is told otherwise
    monkeypatch.setattr(importlib.import_module("xformers.ops.fmha.common"), "_built_with_cuda", False)
    assert attention.xformers_missing() == ""
    with pytest.raises(NotImplementedError):
        attention_choice._xformers_operators(*inputs)


def test_kernels_of_xformers_own_are_named_as_they_are() -> None:
    assert attention_choice._in_words(["fa3F@2.8.3", "fa3B@2.8.3"]) == "fa3F@2.8.3 and fa3B@2.8.3"
    mixed = attention_choice._in_words(["fa2F@2.5.7-pt", "cutlassB-pt"])
    assert mixed == "fa2F@2.5.7-pt and cutlassB-pt, PyTorch's flash and memory-efficient kernels"


# --- what a GPU is offered --------------------------------------------------------------------------------------------


class Hopper:
    """PyTorch on an H200, played by the CPU: its words against cuDNN there, cuDNN's operators, and xformers with flash.

    The rules are those of PyTorch 2.14 with cuDNN 9.24 for float32 in place of bfloat16.
    widths, strides: of what cuDNN got.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.widths: set[int] = set()
        self.strides: set[tuple[int, ...]] = set()
        self._plain = F.scaled_dot_product_attention
        self._library = torch.library.Library("aten", "IMPL")
        operator = "_scaled_dot_product_cudnn_attention"
        self._library.impl(operator, self._forward, "CPU")
        self._library.impl(f"{operator}_backward", self._backward, "CPU")
        self.release = self._library._destroy
        monkeypatch.setattr(attention_choice, "_GPU", "cpu")
        monkeypatch.setattr(F, "scaled_dot_product_attention", self._asked)
        monkeypatch.setattr("xformers.ops.memory_efficient_attention", self._xformers)
        operators = [SimpleNamespace(NAME=name) for name in ("fa2F@2.5.7-pt", "fa2B@2.5.7-pt")]
        monkeypatch.setattr(attention_choice, "_xformers_operators", lambda *inputs: operators)

    def _asked(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        if torch.backends.cuda.math_sdp_enabled():  # not asked for one kernel
            return self._plain(query, key, value, scale=scale)
        width = query.shape[-1]
        if torch.backends.cuda.cudnn_sdp_enabled() and (width % 8 or (width > 128 and query.requires_grad)):
            warnings.warn("cuDNN attention kernel not used because: (Triggered internally at a.cpp:1.)", stacklevel=1)
            warnings.warn(f"cuDNN SDPA on SM 9.0/10.x does not support d_qk: {width}", stacklevel=1)
            warnings.warn("Flash attention has been runtime disabled.", stacklevel=1)
            raise RuntimeError("No available kernel. Aborting execution.")
        with sdpa_kernel(SDPBackend.MATH):
            return self._plain(query, key, value, scale=scale)

    def _xformers(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._plain(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)

    def _forward(self, query: Tensor, key: Tensor, value: Tensor, bias: None, lse: bool, *, scale: float | None = None):
        self.widths.add(query.shape[-1])
        self.strides |= {tensor.stride()[1:] for tensor in (query, key, value)}
        output = torch.empty_like(query).copy_(self._probabilities(query, key, scale) @ value)
        empty = torch.empty(0)
        return output, empty, empty, empty, query.shape[2], key.shape[2], empty, empty, empty

    def _backward(self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, *rest, scale=None):
        assert gradient.stride() == output.stride()  # or cuDNN's caller would copy it
        probabilities = self._probabilities(query, key, scale)
        scores = probabilities * (gradient @ value.mT - (gradient * output).sum(-1, keepdim=True))
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        gradients = scores @ key, scores.mT @ query, probabilities.mT @ gradient
        return tuple(torch.empty_like(of).copy_(one) for of, one in zip((query, key, value), gradients, strict=True))

    @staticmethod
    def _probabilities(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        return torch.softmax(query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale), -1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hopper]:
    played = Hopper(monkeypatch)
    yield played
    played.release()


def small(width: int, kind: str) -> AttentionShape:
    return AttentionShape(2, 2, 20, 20 if kind == "self" else 7, width, kind, (f"{width} {kind}",))


def test_what_hopper_is_offered_and_why_not_the_rest(gpu: Hopper) -> None:
    shapes = [small(width, kind) for width in (40, 80, 160) for kind in ("self", "cross")]
    backends = {name: attend for name, attend in BACKENDS.items() if name != "efficient"}
    plan = choose_backends("auto", shapes, CPU, torch.float32, clock=lambda call: call() and 1.0, backends=backends)
    always = {"sdpa", "flash", "xformers"}
    for choice in plan.choices:
        more = {40: {"cudnn", "cudnn_padded"}, 80: {"cudnn"}, 160: set()}[choice.shape.head_dim]
        assert choice.milliseconds.keys() == always | more
        assert choice.kernels["xformers"] == "fa2F@2.5.7-pt and fa2B@2.5.7-pt, PyTorch's flash kernels"
    assert gpu.widths == {40, 64, 80}
    assert plan.lines()[1:] == (
        "  cudnn_padded left out for 4 layers: the width of its heads is a multiple of 16 as it is",
        "  cudnn left out for 2 layers: cuDNN SDPA on SM 9.0/10.x does not support d_qk: 160",
    )


def test_the_plan_says_which_kernels_a_choice_runs(gpu: Hopper) -> None:
    plan = choose_backends("xformers", [small(40, "self")], CPU, torch.float32)
    assert plan.lines() == (
        "attention: xformers (fa2F@2.5.7-pt and fa2B@2.5.7-pt, PyTorch's flash kernels) for 1 layer",
    )
    assert AttentionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan = choose_backends(
        "auto", [small(40, "self")], CPU, torch.float32, lambda call: 1.0, {"sdpa": BACKENDS["sdpa"]}
    )
    assert plan.lines() == ("attention: sdpa (flash) for 1 layer; 1.00 ms forward and backward (sdpa alone 1.00)",)
    assert plan.choices[0].milliseconds == {"sdpa": 1.0}


def test_auto_leaves_xformers_out_where_it_could_not_be_compiled(gpu: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = [SimpleNamespace(NAME=name) for name in ("cutlassF-pt", "cutlassB-pt")]
    monkeypatch.setattr(attention_choice, "_xformers_operators", lambda *inputs: operators)
    backends = {name: BACKENDS[name] for name in ("sdpa", "xformers")}
    plan = choose_backends("auto", [small(40, "self")], CPU, torch.float32, clock=lambda call: 1.0, backends=backends)
    assert plan.choices[0].milliseconds == {"sdpa": 1.0}
    assert plan.choices[0].excluded["xformers"].startswith("torch.compile cannot trace cutlassF-pt and cutlassB-pt")
    assert choose_backends("xformers", [small(40, "self")], CPU, torch.float32).choices[0].backend == "xformers"


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("self 40", False), ("cross 40", False), pytest.param("cross 40", True, marks=pytest.mark.slow)],
)
def test_padded_heads_compute_the_same(name: str, compiled: bool, gpu: Hopper) -> None:
    options, sizes = MODULES[name]
    module = make_attention(**options)
    inputs = [random(*size, seed=seed) for seed, size in enumerate(sizes)]
    module.set_processor(AttnProcessor())
    plain = outcome(module, *inputs)
    module.set_processor(AttentionProcessor("cudnn_padded"))
    if compiled:
        torch._dynamo.reset()
        module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_near(outcome(module, *inputs), plain, 1e-12)  # as above
    assert gpu.widths == {64}
    assert gpu.strides == {(64, 2 * 64, 1)}  # heads last in memory, as cuDNN and the projections have them


def test_a_plan_survives_its_way_through_a_file() -> None:
    backends = {"sdpa": BACKENDS["sdpa"], "failing": failing}
    plan = choose_backends("auto", (SMALL, LARGE), CPU, torch.float32, lambda call: 0.25, backends)
    assert AttentionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    older = json.loads(json.dumps(plan.to_json() | {"backward": True, "reproducible": False}))
    older["choices"][0]["shape"]["token_strides"] = []
    assert AttentionPlan.from_json(older) == plan, "as earlier versions stored it"
    assert plan.choices[0].excluded
    assert plan.lines()[0].endswith("; 0.75 ms forward and backward (sdpa alone 0.75)")


def test_threads_do_not_disturb_each_other_nor_pytorchs_switches() -> None:
    switches = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled)
    inputs = [tuple(random(1, 2, 33, 8, seed=seed + i) for i in range(3)) for seed in range(0, 120, 3)]
    alone = [BACKENDS["flash"](*three) for three in inputs]
    together = Workers(3).map(lambda three: BACKENDS["flash"](*three), inputs)
    assert all(map(torch.equal, together, alone))
    assert all(switch() for switch in switches)


def test_choosing_leaves_random_numbers_and_gradients_alone() -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        plan = choose_backends("flash", (SMALL,), CPU, torch.float32)
    assert plan.choices[0].backend == "flash"
    assert torch.equal(torch.get_rng_state(), before)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", sd1_shapes(4), ids=lambda shape: shape.layers[0])
def test_available_backends_are_right_and_timed_on_cuda(shape: AttentionShape) -> None:
    """`choose_backends` itself compares with float64 math: nothing may be left out for being wrong."""
    plan = choose_backends("auto", (shape,), torch.device("cuda"), torch.bfloat16)
    choice = plan.choices[0]
    assert not [reason for reason in choice.excluded.values() if reason.startswith("wrong")]
    assert {"sdpa", "flash", "efficient"} <= choice.milliseconds.keys()
    assert choice.milliseconds.keys() | choice.excluded.keys() == BACKENDS.keys()
    assert all(milliseconds > 0 for milliseconds in choice.milliseconds.values())
    assert choice.backend == min(choice.milliseconds, key=choice.milliseconds.get)


@pytest.mark.gpu
def test_the_clock_reads_the_device_and_not_python() -> None:
    """Twice the work takes longer, although Python launches as much for it."""
    small, large = (torch.randn(size, size, device="cuda") for size in (1024, 4096))
    assert device_milliseconds(lambda: large @ large) > 4 * device_milliseconds(lambda: small @ small)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "cudnn", "flash", "xformers"])
def test_a_unet_computes_the_same_on_cuda(wanted: str) -> None:
    """Against the same UNet in float32 on the CPU. Its heads are 16 wide, which every backend can do."""
    unet = make_unet("sd2")
    right = run(unet)[0]
    shapes = attention_shapes(unet, 2, (4, 8, 8), 7)
    try:
        plan = choose_backends(wanted, shapes, torch.device("cuda"), torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    unet.to("cuda", torch.bfloat16)
    apply_plan(unet, plan)
    latents = random(2, 4, 8, 8).to("cuda", torch.bfloat16)
    contexts = random(2, 7, unet.config.cross_attention_dim, seed=2).to("cuda", torch.bfloat16)
    output = unet(latents, torch.tensor([3, 700], device="cuda"), contexts, return_dict=False)[0]
    # Some 100 layers in a row round to bfloat16, 2^-8 each at most and independently: sqrt(100) * 2^-8.
    assert (output.cpu().float() - right).norm() <= 0.04 * right.norm()
