"""Blocks that keep their inputs only: the same bits, what is kept counted on real tensors, no random state touched."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils import checkpoint as library

from fastgrpo.costs.held_memory import recompute_with_fused_attention, saved_bytes
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.gradient_checkpointing import checkpoint_blocks
from fastgrpo.unet.lora import add_lora

Inputs = tuple[Tensor, Tensor, Tensor]


def load_unet(pipeline: Path, lora: bool = False, kernels: bool = False) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", dtype=torch.float32).eval()
    if lora:
        add_lora(unet, ModelConfig(lora_rank=2), seed=1, frozen_dtype=torch.float32)
    if kernels:
        patch_unet(unet)
    return unet.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    latents, contexts = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 32, generator=generator)
    return latents.to(memory_format=torch.channels_last), torch.tensor([1, 700]), contexts


def learned(unet: UNet2DConditionModel, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output and every trained parameter's gradient."""
    output = unet(*inputs, return_dict=False)[0]
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    return output.detach(), *torch.autograd.grad(output, trained, torch.ones_like(output))


def kept(unet: UNet2DConditionModel, inputs: Inputs) -> int:
    """Bytes of the real tensors that a forward pass leaves for the backward pass, weights aside."""
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = unet(*inputs, return_dict=False)[0]  # keeps the graph alive, so that no address is used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    size = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)
    del output
    return size


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_outputs_and_gradients_are_the_same_bits(
    tiny_pipeline: Path, inputs: Inputs, lora: bool, kernels: bool
) -> None:
    unet = load_unet(tiny_pipeline, lora, kernels)
    expected = learned(unet, inputs)
    assert not unet.is_gradient_checkpointing
    checkpoint_blocks(unet)
    assert unet.is_gradient_checkpointing
    assert all(torch.equal(*pair) for pair in zip(learned(unet, inputs), expected, strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_kept_is_what_is_counted(tiny_pipeline: Path, inputs: Inputs, lora: bool) -> None:
    """Without and with it, to 5%: attention saves one number per head and query, which some kernels pad."""
    unet = load_unet(tiny_pipeline, lora)
    plain, counted = kept(unet, inputs), copy.deepcopy(unet).to("meta")
    on_meta = tuple(tensor.to("meta") for tensor in inputs)
    assert saved_bytes(counted, on_meta) == pytest.approx(plain, rel=0.05)
    checkpoint_blocks(unet)
    recompute_with_fused_attention(counted)
    assert saved_bytes(counted, on_meta) == pytest.approx(kept(unet, inputs), rel=0.05)
    assert kept(unet, inputs) < plain / 3


def test_blocks_are_computed_twice_where_there_are_gradients(tiny_pipeline: Path, inputs: Inputs) -> None:
    """Every transformer block, and every ResNet block but the middle's first."""
    unet, calls = load_unet(tiny_pipeline), []
    checkpoint_blocks(unet)
    blocks = [m for m in unet.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    with torch.no_grad():
        unet(*inputs)
    assert calls == [*dict.fromkeys(calls)]
    assert set(calls) == set(blocks)
    calls.clear()
    learned(unet, inputs)
    expected = dict.fromkeys(blocks, 2) | {unet.mid_block.resnets[0]: 1}
    assert {block: calls.count(block) for block in blocks} == expected


def test_the_random_state_is_neither_asked_for_nor_moved(
    tiny_pipeline: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA to ask for it is to wait for the device, which no captured graph may."""
    unet = load_unet(tiny_pipeline)
    checkpoint_blocks(unet)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        for owner, name in ((torch, "get_rng_state"), (torch, "set_rng_state"), (library, "get_device_states")):
            patch.setattr(owner, name, lambda *_: pytest.fail("asked for the random state"))
        learned(unet, inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_has_it_too_and_its_weights_are_its_own(tiny_pipeline: Path, inputs: Inputs) -> None:
    """The exact results that compiled code is compared with are a copy's, in float64."""
    unet = load_unet(tiny_pipeline)
    checkpoint_blocks(unet)
    other = copy.deepcopy(unet).double()
    wider = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    assert other.is_gradient_checkpointing
    assert all(tensor.dtype == torch.float64 for tensor in learned(other, wider))
    assert all(tensor.dtype == torch.float32 for tensor in learned(unet, inputs))


def test_compiled_as_one_graph_it_keeps_little_and_learns_the_same(inputs: Inputs) -> None:
    """Traced as for inductor, with the operators' own gradients, but not turned into code."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()
    patch_unet(unet)
    expected, plain = learned(unet, inputs), kept(unet, inputs)
    checkpoint_blocks(unet)
    unet.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    for given, wanted in zip(learned(unet, inputs), expected, strict=True):
        # Sums of float32 in another order at most, through some ten layers.
        assert (given - wanted).norm() <= 1e-5 * wanted.norm()
    assert kept(unet, inputs) < plain / 2
    torch._dynamo.reset()
