import pickle
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgrpo.shapes
from fastgrpo.kernels import geglu, group_norm_silu, layer_norm
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.unet import fused
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.lora import add_lora
from support.sd_pipelines import build_pipeline, build_unet

SHAPES = Path(fastgrpo.shapes.__file__).parent / "weights" / "pipeline" / "unet"
REAL = Path(fastgrpo.__file__).parent / "models"
UNETS = ("sd1", "sd2", "shapes")


def make_unet(name: str, **changes) -> UNet2DConditionModel:
    """Every weight random, so that no norm has ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "shapes":
            unet = UNet2DConditionModel.from_pretrained(SHAPES, torch_dtype=torch.float32)
        else:
            unet = build_unet(name, **changes)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return unet.train()


def inputs(unet: UNet2DConditionModel) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype), torch.tensor([3, 700]), text.to(unet.dtype)


def run(unet: UNet2DConditionModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of every parameter that learns; dropout is the same every time."""
    unet.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        output = unet(*inputs(unet)).sample
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert gradients
    return output.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


def assert_near(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], error: float) -> None:
    """error: of the norm of each tensor's difference, relative to the tensor's norm."""
    pairs = {"output": (one[0], other[0])} | {name: (one[1][name], other[1][name]) for name in other[1]}
    # Some gradients are 0 but for rounding: of keys' and norms' biases that softmax or a later norm takes out.
    floor = 1e-3 * max(b.norm() for a, b in pairs.values())
    wrong = {
        name: ((a - b).norm() / b.norm()).item()
        for name, (a, b) in pairs.items()
        if (a - b).norm() > error * max(b.norm(), floor)
    }
    assert wrong == {}


class Patched(NamedTuple):
    """How many modules of each kind use the operators; a ResnetBlock2D counts as one."""

    resnets: int
    transformers: int
    transformer_norms: int
    output_norms: int
    layer_norms: int
    transformer_blocks: int
    geglus: int


def patched(model: nn.Module) -> Patched:
    """Patches a UNet or a decoder, and counts what is patched."""
    patch_unet(model)
    kinds = Counter(type(module) for module in model.modules())
    return Patched(
        kinds[fused.FusedResnetBlock2D], kinds[fused.FusedTransformer2DModel], kinds[fused.FusedGroupNorm],
        kinds[fused.FusedGroupNormSiLU], kinds[fused.FusedLayerNorm], kinds[fused.FusedBasicTransformerBlock],
        kinds[fused.FusedGEGLU],
    )  # fmt: skip


def counts(config: dict) -> Patched:
    """From a UNet's config alone: a resnet a layer of each down block, one more of each up block, two in the middle; a
    transformer after each in a block with attention, one in the middle, three LayerNorms and a GEGLU in each."""
    layers = config["layers_per_block"]
    resnets = len(config["down_block_types"]) * layers + 2 + len(config["up_block_types"]) * (layers + 1)
    transformers = 1 + layers * sum("CrossAttn" in name for name in config["down_block_types"])
    transformers += (layers + 1) * sum("CrossAttn" in name for name in config["up_block_types"])
    return Patched(resnets, transformers, transformers, 1, 3 * transformers, transformers, transformers)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators by their definitions, which know float64."""
    for kernel in (group_norm_silu, layer_norm, geglu):
        monkeypatch.setattr(fused, kernel.__name__.rpartition(".")[2], kernel.reference)


# float64's 1e-16 after some 200 layers of sums over a few hundred terms, in another order, and norms over two values
# that may be nearly the same, which magnify it ten thousand times. A bias that is left out or added twice is off by
# 1e-2.
EXACTLY = 1e-9


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", UNETS)
def test_outputs_and_gradients_stay_the_same(name: str) -> None:
    unet = make_unet(name).double()
    before = run(unet)
    assert patched(unet) == counts(unet.config)
    after = run(unet)
    assert not torch.equal(after[0], before[0])  # it computes otherwise
    assert_near(after, before, EXACTLY)


@pytest.mark.parametrize("folder", ["sd1", "sd2"])
def test_counts_of_the_real_models(folder: str) -> None:
    config = UNet2DConditionModel.load_config(REAL / folder / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    wanted = Patched(
        resnets=22, transformers=16, transformer_norms=16, output_norms=1, layer_norms=48, transformer_blocks=16,
        geglus=16,
    )  # fmt: skip
    assert patched(unet) == wanted == counts(config)
    left = Counter(type(module) for module in unet.modules())
    assert left[nn.LayerNorm] == 0
    assert left[nn.GroupNorm] == 2 * 22  # within the resnets, which read their weights


def test_a_vaes_decoder_is_patched_too() -> None:
    """Its blocks have no time embedding. Every block's output stays channels_last, through attention and upsampling."""
    with torch.device("meta"):
        real = AutoencoderKL.from_config(AutoencoderKL.load_config(REAL / "sd1" / "vae")).decoder
    found = patched(real)
    assert (found.resnets, found.output_norms) == (2 + 4 * 3, 1)
    left = [name for name, module in real.named_modules() if type(module) is nn.GroupNorm and ".resnets." not in name]
    assert left == ["mid_block.attentions.0.group_norm"]

    vae = build_pipeline("sd1").vae.eval()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.decode(latents).sample
        assert patched(vae.decoder).resnets == 14
        vae.to(memory_format=torch.channels_last)
        outputs = []
        for module in vae.decoder.modules():
            if isinstance(module, ResnetBlock2D | Attention | Upsample2D):
                module.register_forward_hook(lambda module, given, output: outputs.append(output))
        after = vae.decode(latents).sample
    assert len(outputs) == 14 + 1 + 3
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)
    assert (after - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("name", UNETS)
def test_keys_parameters_and_attributes_are_what_they_were(name: str) -> None:
    unet = make_unet(name)
    parameters = dict(unet.named_parameters())
    modules = {name: (module, type(module), dict(vars(module))) for name, module in unet.named_modules()}
    keys = list(unet.state_dict())
    for _ in range(2):  # a second time changes nothing
        assert patched(unet) == counts(unet.config)
        assert list(unet.state_dict()) == keys
        now = dict(unet.named_parameters())
        assert list(now) == list(parameters)
        assert all(now[key] is parameters[key] for key in parameters)
        assert dict(unet.named_modules()) == {key: module for key, (module, _, _) in modules.items()}
        assert all(isinstance(module, kind) for module, kind, _ in modules.values())
    for module, _, attributes in modules.values():
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())


@pytest.mark.parametrize("name", UNETS)
def test_every_patched_module_calls_the_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing calls PyTorch's norms and activations: only the SiLUs of time embeddings are left."""
    unet = make_unet(name)
    seen: Counter = Counter()

    def counting(name: str, function):
        def wrapped(*args, **kwargs):
            if name == "group_norm_silu":
                silu, temb = args[5:7]
                seen[name, silu, temb is not None] += 1
            elif name == "layer_norm":
                seen[name, args[4] is not None] += 1
            else:
                seen[name, args[1] is not None] += 1
            return function(*args, **kwargs)

        return wrapped

    for operator in ("group_norm_silu", "layer_norm", "geglu"):
        monkeypatch.setattr(fused, operator, counting(operator, getattr(fused, operator)))
    with torch.no_grad():
        unet(*inputs(unet))
        assert not seen
        found = patched(unet)
        unet(*inputs(unet))
    assert seen == {
        ("group_norm_silu", True, False): found.resnets + found.output_norms,
        ("group_norm_silu", True, True): found.resnets,
        ("group_norm_silu", False, False): found.transformer_norms,
        ("layer_norm", False): found.transformer_blocks,
        ("layer_norm", True): 2 * found.transformer_blocks,
        ("geglu", True): found.geglus,
    }


class Passes(TorchDispatchMode):
    """Counts the operations, views aside, that read or write a whole image or its tokens, of which it knows the size.

    A convolution with a bias is one of its own kind: on CUDA that bias and its gradient are further passes.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.seen = size, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        if not function.is_view and any(tensor.numel() >= self.size for tensor in tensors):
            name = function.overloadpacket.__name__
            biased = {"convolution": lambda: args[2] is not None, "convolution_backward": lambda: args[-1][2]}
            self.seen[f"{name} with bias" if name in biased and biased[name]() else name] += 1
        return result


def passes_over_images(block: nn.Module, *others: Tensor) -> Counter:
    """Of a forward and a backward pass of a block on 2 x 64 x 16 x 16 in channels_last memory, on the meta device."""
    block = block.to("meta").to(memory_format=torch.channels_last)
    image = torch.empty(2, 64, 16, 16, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    towards = torch.empty_like(image)
    with Passes(image.numel()) as passes:
        output = block(image, *others)
        output = output if isinstance(output, Tensor) else output.sample
        gradient, *_ = torch.autograd.grad(output, [image, *block.parameters()], towards)
    for tensor in (output, gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    return passes.seen


def test_passes_over_images_in_a_resnet() -> None:
    unet = make_unet("sd1")
    patch_unet(unet)
    assert passes_over_images(unet.mid_block.resnets[0], torch.empty(2, 128, device="meta")) == {
        "group_norm_silu": 2,
        "group_norm_silu_backward": 2,
        "convolution": 1,
        "convolution_backward": 1,
        "convolution with bias": 1,
        "convolution_backward with bias": 1,
        "add": 2,  # of the input, and of its gradients
    }


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_passes_over_images_around_the_blocks_of_a_transformer(name: str) -> None:
    """Images and tokens are the same memory: nothing is copied. A layer is a product, with two in its backward pass."""
    unet = make_unet(name)
    patch_unet(unet)
    transformer = unet.mid_block.attentions[0]
    transformer.transformer_blocks = nn.ModuleList()
    assert passes_over_images(transformer) == {
        "group_norm_silu": 1,
        "group_norm_silu_backward": 1,
        "addmm": 2,
        "mm": 4,
        "sum": 2,  # for the biases' gradients
        "add": 2,
    }


def test_passes_over_tokens_in_a_transformer_block() -> None:
    """Of three additions one is apart, and none of their gradients'. The widest tokens are read by nothing else."""
    unet = make_unet("sd1")
    patch_unet(unet)
    block = unet.mid_block.attentions[0].transformer_blocks[0].to("meta")
    block.attn1 = block.attn2 = nn.Linear(64, 64, device="meta")  # for attention
    block.attn1.forward = lambda tokens, **others: tokens * 1
    tokens = torch.empty(2, 256, 64, device="meta", requires_grad=True)
    towards = torch.empty_like(tokens)
    seen = []
    for size in (tokens.numel(), 8 * tokens.numel()):
        with Passes(size) as passes:
            gradients = torch.autograd.grad(block(tokens), [tokens, *block.ff.parameters()], towards)
        del passes.seen["_unsafe_view"]  # of a product's rows as tokens
        seen.append(passes.seen)
    assert [gradient.shape for gradient in gradients] == [tokens.shape, *(p.shape for p in block.ff.parameters())]
    assert seen[0] == {
        "layer_norm": 3,
        "layer_norm_backward": 3,
        "mul": 4,
        "geglu": 1,
        "geglu_backward": 1,
        "addmm": 1,
        "mm": 5,
        "sum": 1,  # for the last bias's gradient
        "add": 1,
    }
    assert seen[1] == {"geglu": 1, "geglu_backward": 1, "mm": 3}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("first", ["adapters", "patch"])
def test_adapters_in_every_kind_of_patched_module(first: str) -> None:
    """LoRA on linear layers and convolutions of patched modules, put in before or after."""
    targets = ("to_q", "to_out.0", "proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in")
    config = ModelConfig(lora_rank=2, lora_targets=targets)
    plain, unet = make_unet("sd1").double(), make_unet("sd1").double()
    if first == "patch":
        patch_unet(unet)
    for model in (plain, unet):
        add_lora(model, config, seed=0, frozen_dtype=torch.float64)
        model.double()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:  # B is zero at first, and A then gets no gradient
                    generator = torch.Generator().manual_seed(index)
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    keys = list(plain.state_dict())
    if first == "adapters":
        patch_unet(unet)
    assert patched(unet) == counts(unet.config)
    assert list(unet.state_dict()) == keys
    assert_near(run(unet), run(plain), EXACTLY)


@pytest.mark.usefixtures("exact")
def test_what_the_subclasses_do_not_do_is_left_alone() -> None:
    scaled = make_unet("sd1", resnet_time_scale_shift="scale_shift").double()
    before = run(scaled)
    assert patched(scaled) == Patched(0, 16, 16, 1, 48, 16, 16)
    assert_near(run(scaled), before, EXACTLY)

    other = make_unet("sd1", act_fn="gelu").double()
    before = run(other)
    assert patched(other) == Patched(0, 16, 16, 0, 48, 16, 16)
    assert_near(run(other), before, EXACTLY)

    sampling = make_unet(
        "sd1",
        down_block_types=("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    ).double()
    inside = [block for block in sampling.modules() if isinstance(block, ResnetBlock2D) and (block.up or block.down)]
    before = run(sampling)
    assert len(inside) == 2
    assert patched(sampling).resnets == 22  # as many as ever; these two came in place of plain resampling
    assert {type(block) for block in inside} == {ResnetBlock2D}
    assert_near(run(sampling), before, EXACTLY)

    frozen = make_unet("sd1")
    block = frozen.mid_block.attentions[0].transformer_blocks[0]
    block.norm1 = nn.LayerNorm(64, elementwise_affine=False)
    block.norm2 = nn.LayerNorm(64, bias=False)
    frozen.mid_block.resnets[0].norm2 = nn.GroupNorm(32, 64, affine=False)
    frozen.mid_block.resnets[1].conv1 = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular")
    frozen.up_blocks[0].resnets[0].conv1 = nn.Conv2d(128, 64, 3, padding=1, bias=False)
    frozen.mid_block.attentions[0].proj_in = nn.Conv2d(64, 64, 3, padding=1)
    frozen.double()
    before = run(frozen)
    assert patched(frozen) == Patched(21, 16, 16, 1, 46, 15, 16)
    assert_near(run(frozen), before, EXACTLY)


@pytest.mark.usefixtures("exact")
def test_dropout_scale_and_unactivated_time_embeddings() -> None:
    unet = make_unet(
        "sd1", dropout=0.3, resnet_out_scale_factor=1.5, mid_block_scale_factor=1.2, resnet_skip_time_act=True
    ).double()
    before = run(unet)
    assert patched(unet) == counts(unet.config)
    assert_near(run(unet), before, EXACTLY)


def test_feed_forward_in_chunks_and_arguments_of_attention() -> None:
    """Set or given after patching, they take diffusers' own way."""
    unet = make_unet("shapes")
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    hidden, text = torch.randn(2, 16, 64), torch.randn(2, 5, 128)
    calls = []
    block.attn1.register_forward_hook(lambda *given: calls.append(given[2]), with_kwargs=True)
    block.ff.register_forward_hook(lambda *given: calls.append(given[1][0].shape[1]))
    for chunk, others, called in ((None, {"scale_of": 1}, [16]), (4, None, [4] * 4)):
        calls.clear()
        block.set_chunk_feed_forward(chunk, dim=1)
        patch_unet(unet)
        block(hidden, None, text, None, None, others)
        assert calls[0].get("scale_of") == (others or {}).get("scale_of")
        assert calls[1:] == called


def test_gradient_checkpointing() -> None:
    unet = make_unet("sd2")
    patch_unet(unet)
    before = run(unet)
    unet.enable_gradient_checkpointing()
    assert_same(run(unet), before)


def test_copies_are_patched_and_independent() -> None:
    unet = make_unet("sd2")
    patch_unet(unet)
    before = run(unet)
    for copy in (deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert_same(run(copy), before)
        assert patched(copy) == counts(unet.config)
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.zero_()
        assert_same(run(unet), before)


def test_saved_and_loaded_it_is_a_plain_unet(tmp_path: Path) -> None:
    unet = make_unet("sd1")
    patch_unet(unet)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert list(state) == list(unet.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in unet.state_dict().items())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in build_unet("sd1").modules()]
    assert patched(loaded) == counts(unet.config)


def test_channels_last() -> None:
    """The layouts of activations may differ, and with them the order in which convolutions add up.

    What is left of float32's 6e-8 after some 200 layers of sums over a few hundred terms is far below 1e-4.
    """
    unet = make_unet("shapes").to(memory_format=torch.channels_last)
    before = run(unet)
    patch_unet(unet)
    assert_near(run(unet), before, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_with_float32_weights(dtype: torch.dtype) -> None:
    """As training computes in half precision: inputs of norms are bfloat16 then, their weights float32.

    Both are as good as bfloat16 computes: as far from float32 as each other, to a factor of 1.5.
    """
    unet = make_unet("shapes").eval()
    with torch.no_grad():
        exact = unet(*inputs(unet)).sample
        with torch.autocast("cpu", dtype):
            plain = unet(*inputs(unet)).sample
            patch_unet(unet)
            after = unet(*inputs(unet)).sample
    assert 0 < (after - exact).norm() < 1.5 * (plain - exact).norm()
    with torch.autocast("cpu", dtype):
        loss = unet(*inputs(unet)).sample.float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters())


def test_a_graph_without_breaks() -> None:
    """torch.compile sees the operators as they are: forward and backward in one graph each, the same to the last bit.

    The middle block has one of everything, and the whole UNet would take half a minute to trace.
    """
    unet = make_unet("shapes")
    block = unet.mid_block
    generator = torch.Generator().manual_seed(1)
    hidden, temb, text = (torch.randn(2, *shape, generator=generator) for shape in ((64, 4, 4), (128,), (5, 128)))

    def run_block(call) -> list[Tensor]:
        block.zero_grad()
        output = call(hidden, temb, encoder_hidden_states=text)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in block.parameters())]

    assert patched(unet).resnets > 0
    before = run_block(block)
    compiled = run_block(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, compiled, before))
