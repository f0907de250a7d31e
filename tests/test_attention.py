"""Attention backends: what the UNet asks for, who is chosen, and that every one of them computes the same."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from sd_pipelines import build_unet
from torch import Tensor

import fastgrpo
from fastgrpo.config import ModelConfig
from fastgrpo.engine import attention
from fastgrpo.engine.attention import (
    BACKENDS,
    AttentionPlan,
    AttentionProcessor,
    AttentionShape,
    Choice,
    attention_shapes,
    choose,
    cuda_milliseconds,
    deterministic,
    tolerance,
    use,
)
from fastgrpo.engine.patch import patch_unet
from fastgrpo.engine.workers import Workers
from fastgrpo.errors import ConfigError
from fastgrpo.lora import add_lora

CPU = torch.device("cpu")
REAL = Path(fastgrpo.__file__).parent / "models"
SMALL = AttentionShape(2, 3, 6, 5, 8, "cross", ("a", "b"))
LARGE = AttentionShape(3, 2, 16, 16, 8, "self", ("c",))


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
    return choose(wanted, attention_shapes(unet, rows, (4, 8, 8), tokens), CPU, torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("sd1", False), ("sd2", True)])
def test_a_unet_computes_the_same(name: str, lora: bool) -> None:
    unet = make_unet(name, lora)
    before = run(unet)
    keys = list(unet.state_dict())
    for wanted in ("auto", "flash"):
        use(unet, plan_for(unet, wanted))
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
    # float32, the same operations: rounding in another order at most, in some 20 sums of up to 128 products, each off by
    # sqrt(128) * 6e-8 = 7e-7.
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
    assert patch_unet(unet).resnets
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
    use(unet, plan_for(unet, "sdpa"))
    assert {name: module.processor for name, module in special.items()} == before


def test_a_plan_of_another_unet_is_refused() -> None:
    unet = make_unet("sd1")
    plan = plan_for(unet, "sdpa")
    with pytest.raises(ValueError, match=r"another UNet: only one of them has mid_block\.attentions"):
        use(unet, AttentionPlan("sdpa", tuple(c for c in plan.choices if "mid_block" not in c.shape.layers[0])))


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
    plan = choose("auto", (SMALL, LARGE), CPU, torch.float32, clock=timed.clock, backends=timed.backends)
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
    plan = choose("auto", (SMALL,), CPU, torch.float32, clock=lambda call: 1.0, backends=backends)
    assert plan.choices[0].backend == "sdpa"
    assert plan.choices[0].milliseconds == {"sdpa": 1.0}
    assert BROKEN[broken] in plan.choices[0].excluded["broken"]
    assert plan.lines()[1].startswith("  broken left out for 2 layers: ")
    if broken is wrong_gradient_of_the_key:  # which nobody sees who wants no gradients
        forward = choose("auto", (SMALL,), CPU, torch.float32, False, lambda call: 1.0, backends)
        assert forward.choices[0].excluded == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_right_backends_are_within_the_tolerance(backend: str, dtype: torch.dtype) -> None:
    shape = AttentionShape(3, 2, 64, 77, 40, "cross", ("a",))
    plan = choose("auto", (shape, LARGE), CPU, dtype, clock=lambda call: 1.0, backends={backend: BACKENDS[backend]})
    assert [choice.backend for choice in plan.choices] == [backend, backend]
    # Half a percent of error must not hide behind float32's rounding, nor ten percent behind bfloat16's.
    assert tolerance(dtype, 77) < (5e-3 if dtype == torch.float32 else 0.1)


def test_auto_and_sdpa_measure_nothing_on_the_cpu() -> None:
    huge = AttentionShape(10**6, 8, 4096, 4096, 40, "self", ("a",))  # 10 TB, if anybody tried
    for wanted in ("auto", "sdpa"):
        plan = choose(wanted, (huge,), CPU, torch.float32)
        assert plan.choices == (Choice(huge, "sdpa"),)
        assert plan.lines() == ("attention: sdpa for 1 layer",)


def test_a_named_backend_is_taken_where_it_can_be() -> None:
    def only_small(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[2] > 8:
            raise RuntimeError("more than 8 queries")
        return F.scaled_dot_product_attention(query, key, value)

    plan = choose("flash", (SMALL, LARGE), CPU, torch.float32, backends={"flash": only_small})
    assert [choice.backend for choice in plan.choices] == ["flash", "sdpa"]
    assert plan.lines() == (
        "attention: flash for 2 layers, sdpa for 1 layer",
        "  flash left out for 1 layer: more than 8 queries",
    )


@pytest.mark.parametrize("wanted", ["cudnn", "xformers"])
def test_a_named_backend_that_can_do_nothing_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose(wanted, (SMALL, LARGE), CPU, torch.float32)
    assert str(refused.value) == f"engine.attention = '{wanted}': it runs on CUDA only; accepted here is auto or sdpa."


def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine.attention = 'xformers': the library xformers is not installed;"):
        choose("xformers", (SMALL,), CPU, torch.float32)
    plan = choose("auto", (SMALL,), CPU, torch.float32, clock=lambda call: 1.0)
    assert plan.choices[0].excluded["xformers"] == "the library xformers is not installed"
    unet = make_unet("sd1")
    stored = tuple(Choice(choice.shape, "xformers") for choice in plan_for(unet, "sdpa").choices)
    with pytest.raises(ConfigError, match="'auto': the library xformers is not installed, which this run's plan needs"):
        use(unet, AttentionPlan("auto", stored))


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
    use(unet, AttentionPlan("xformers", partly))
    assert asked == [unet]
    for choice in partly:
        for layer in choice.shape.layers:
            processor = unet.get_submodule(layer).processor
            assert type(processor) is (XFormersAttnProcessor if choice.backend == "xformers" else AttentionProcessor)
    use(unet, AttentionPlan("auto", partly))
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


def test_a_plan_survives_its_way_through_a_file() -> None:
    backends = {"sdpa": BACKENDS["sdpa"], "failing": failing}
    plan = choose("auto", (SMALL, LARGE), CPU, torch.float32, False, lambda call: 0.25, backends)
    assert AttentionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.choices[0].excluded
    assert plan.lines()[0].endswith("; 0.75 ms forward (sdpa alone 0.75)")


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
        plan = choose("flash", (SMALL,), CPU, torch.float32)
    assert plan.choices[0].backend == "flash"
    assert torch.equal(torch.get_rng_state(), before)


# --- bit for bit -----------------------------------------------------------------------------------------------------


def test_deterministic_is_undone_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    def state() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = state()
    inside = []

    def fail() -> None:
        with deterministic():
            inside.append(state())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(True, False, False)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert state() == before


def test_a_reproducible_plan_leaves_out_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    calls = []

    def varying(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(query)
        return F.scaled_dot_product_attention(query, key, value) * (1 + 1e-7 * len(calls))

    backends = {"sdpa": BACKENDS["sdpa"], "varying": varying}
    options = {"clock": lambda call: 1.0 / (1 + len(calls)), "backends": backends}
    free = choose("auto", (SMALL,), CPU, torch.float32, **options)
    assert free.choices[0].excluded == {}
    plan = choose("auto", (SMALL,), CPU, torch.float32, reproducible=True, **options)
    assert plan.choices[0].excluded == {"varying": "its result is not the same every time"}
    assert plan.reproducible
    assert not free.reproducible


# --- on a GPU --------------------------------------------------------------------------------------------------------


def sd1_shapes(rows: int) -> list[AttentionShape]:
    dims = {64: 40, 32: 80, 16: 160, 8: 160}
    kinds = [(width, dim, keys) for width, dim in dims.items() for keys in (width * width, 77)]
    return [
        AttentionShape(rows, 8, width * width, keys, dim, "cross" if keys == 77 else "self", (f"{width} {keys}",))
        for width, dim, keys in kinds
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("shape", sd1_shapes(4), ids=lambda shape: shape.layers[0])
def test_available_backends_are_right_and_timed_on_cuda(shape: AttentionShape, reproducible: bool) -> None:
    """`choose` itself compares with float64 math; here nothing may be left out for being wrong, and not everything."""
    plan = choose("auto", (shape,), torch.device("cuda"), torch.bfloat16, reproducible=reproducible)
    choice = plan.choices[0]
    assert not [reason for reason in choice.excluded.values() if reason.startswith(("wrong", "its result"))]
    assert {"sdpa", "flash", "efficient"} <= choice.milliseconds.keys()
    assert choice.milliseconds.keys() | choice.excluded.keys() == BACKENDS.keys()
    assert all(milliseconds > 0 for milliseconds in choice.milliseconds.values())
    assert choice.backend == min(choice.milliseconds, key=choice.milliseconds.get)
    if reproducible:
        assert "cudnn" not in choice.milliseconds


@pytest.mark.gpu
def test_the_clock_reads_the_device_and_not_python() -> None:
    """Twice the work takes longer, although Python launches as much for it."""
    small, large = (torch.randn(size, size, device="cuda") for size in (1024, 4096))
    assert cuda_milliseconds(lambda: large @ large) > 4 * cuda_milliseconds(lambda: small @ small)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "cudnn", "flash", "xformers"])
def test_a_unet_computes_the_same_on_cuda(wanted: str) -> None:
    """Against the same UNet in float32 on the CPU. Its heads are 16 wide, which every backend can do."""
    unet = make_unet("sd2")
    right = run(unet)[0]
    shapes = attention_shapes(unet, 2, (4, 8, 8), 7)
    try:
        plan = choose(wanted, shapes, torch.device("cuda"), torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    unet.to("cuda", torch.bfloat16)
    use(unet, plan)
    latents = random(2, 4, 8, 8).to("cuda", torch.bfloat16)
    contexts = random(2, 7, unet.config.cross_attention_dim, seed=2).to("cuda", torch.bfloat16)
    output = unet(latents, torch.tensor([3, 700], device="cuda"), contexts, return_dict=False)[0]
    # Some 100 layers in a row round to bfloat16, 2^-8 each at most and independently: sqrt(100) * 2^-8.
    assert (output.cpu().float() - right).norm() <= 0.04 * right.norm()
