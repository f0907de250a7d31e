"""Counts of models against known values and closed forms."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import CLIPConfig

from fastgrpo.costs import counting
from fastgrpo.costs.counting import ModelCost, count_encoder, count_model, sd1_architecture
from fastgrpo.costs.held_memory import LiveBytes, held_bytes, saved_bytes
from fastgrpo.settings.schema import ModelConfig, RewardConfig
from fastgrpo.settings.suites import SafetyCheckerSettings
from fastgrpo.system.errors import ConfigError

SD15 = 859_520_964  # the UNet's published parameter count
HPSV2 = 986_109_441  # open_clip's ViT-H-14


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client without a network, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def sd15() -> ModelCost:
    return count_model(sd1_architecture(), ModelConfig(), torch.bfloat16)


@pytest.fixture(scope="module")
def sd15_lora() -> ModelCost:
    return count_model(sd1_architecture(), ModelConfig(lora_rank=16), torch.bfloat16, kernels=True)


# ---------------------------------------------------------------------------------------------------------------------
# Counting models. The known values are published or were counted once with another program and are given to three
# digits: 1% allows for that rounding and for what different versions of torch do with a bias.


def test_stable_diffusion_known_values(sd15):
    assert sd15.unet == sd15.trained == SD15
    assert sd15.latent_shape == (4, 64, 64)
    assert sd15.image_shape == (3, 512, 512)
    assert sd15.forward == pytest.approx(0.803e12, rel=0.01)
    assert sd15.forward_backward == pytest.approx(2.407e12, rel=0.01)
    assert sd15.decode == pytest.approx(2.515e12, rel=0.01)
    assert sd15.frozen == 83_653_863 + 123_060_480  # VAE and CLIP ViT-L/14's text tower


def test_hpsv2_known_values():
    encoder = count_encoder("hpsv2")
    assert encoder.parameters == HPSV2
    assert encoder.image == pytest.approx(0.335e12, rel=0.01)


def test_pickscores_model_counts_as_open_clips_of_the_same_size(tmp_path: Path) -> None:
    """ViT-H/14 in both formats: what the memory plan and the estimate reckon with."""
    sizes = {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096}
    vision = {"num_hidden_layers": 32, "num_attention_heads": 16, "hidden_size": 1280, "intermediate_size": 5120}
    config = CLIPConfig(text_config=sizes, vision_config=vision | {"patch_size": 14}, projection_dim=1024)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path)
    ours, theirs = count_encoder(f"transformers:{tmp_path}"), count_encoder("hpsv2")
    assert ours.parameters == theirs.parameters
    # open_clip counts the logit scale and the text's projection among either tower, and neither is large.
    assert ours.text == pytest.approx(theirs.text, rel=0.01)
    assert ours.image == pytest.approx(theirs.image, rel=0.01)


def test_activations_known_value(sd15):
    assert sd15.activations == pytest.approx(937e6, rel=0.001)  # three digits


def test_own_kernels_save_less(sd15):
    """GroupNorm + SiLU as one operator saves no result of the norm's alone, GEGLU none of the activated half."""
    fused = count_model(sd1_architecture(), ModelConfig(), torch.bfloat16, kernels=True)
    modules, spared = sd1_architecture().empty_components(), []
    unet = modules["unet"]
    for module in unet.modules():
        norms = [module.norm1, module.norm2] if isinstance(module, ResnetBlock2D) else []
        for one in (*norms, *([module] if isinstance(module, GEGLU) else [])):
            one.register_forward_hook(lambda one, inputs, output: spared.append(2 * output.numel()))
    unet.conv_norm_out.register_forward_hook(lambda one, inputs, output: spared.append(2 * output.numel()))
    with torch.no_grad():
        unet(*counting.unet_inputs(unet, modules["text_encoder"], 1, torch.float32))
    assert len(spared) == 2 * 22 + 16 + 1
    # Statistics are float32 then, two numbers a group: far below 1% of a map.
    assert sd15.activations - fused.activations == pytest.approx(sum(spared), rel=0.01)
    assert (fused.forward, fused.forward_backward) == (sd15.forward, sd15.forward_backward)


def test_whose_configs_are_counted(tmp_path):
    """A model's own where they are here; SD 1.x's where the hub would have to be asked for the pipeline."""
    bundled = sd1_architecture()
    assert counting.find_architecture(ModelConfig(path="someone/new", unet="someone/else")) == (bundled, False)
    description, known = counting.find_architecture(ModelConfig(path="shapes", unet="someone/else"))
    assert known
    assert description.unet["sample_size"] == 8
    with pytest.raises(ConfigError, match=r"model\.path is 'nowhere'"):
        counting.find_architecture(ModelConfig(path="nowhere"))


class Small(nn.Module):
    """Conv, norm, SiLU, conv, on [N, 8, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, latents, return_dict):
        return (self.second(F.silu(self.norm(self.first(latents)))),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_activations_closed_form(dtype):
    with torch.device("meta"):
        module, inputs = Small().to(dtype), (torch.empty(3, 8, 16, 16, dtype=dtype),)
    size, statistics = 3 * 8 * 16 * 16, 2 * 3 * 2  # a map; mean and rstd of 3 samples x 2 groups
    # Saved: input and SiLU's result for the convolutions, the norm's input and its result.
    assert saved_bytes(module, inputs) == (4 * size + statistics) * dtype.itemsize


def test_held_bytes_closed_form():
    """Two products, of a thousand by a thousand by ten, and back; their gradients come one after the other."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.empty(1000, 10, device="meta"))
            self.second = nn.Parameter(torch.empty(10, 1000, device="meta"))

        def forward(self, x, return_dict):
            return ((x @ self.first) @ self.second,)

    inputs = [(torch.empty(samples, 1000, device="meta"),) for samples in (2, 4)]
    saving, learning = held_bytes(Twice(), inputs)
    assert saving == 4 * (10 + 1000)  # the hidden row and the output's, for one sample; the input is not computed
    # First the second weight's gradient, while the hidden and the output's rows and their gradients are there; then
    # also the first one's, when the hidden rows themselves have gone.
    first, second = (80_000, 4 * (1000 + 1000 + 10)), (40_000, 4 * (1000 + 1000 + 10 + 10))
    assert {first, second} <= set(learning.moments)
    assert learning.bytes(1) == 80_000 + 8040
    assert learning.bytes(2000) == 40_000 + 2000 * 8080


def test_learning_of_stable_diffusion(sd15):
    """Few samples hold little beside the gradients; many, their activations and what one block's way back needs."""
    gradients = 2 * SD15
    assert gradients < sd15.learning.bytes(1) < gradients + sd15.activations
    assert 1 < sd15.learning.bytes(128) / (128 * sd15.activations) < 1.03
    assert 1 < sd15.saving / sd15.activations < 1.02


def test_saved_activations_are_what_a_real_unet_saves(tiny_pipeline):
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet").eval()
    saved: dict[int, int] = {}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 8, 32)

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = unet(*inputs)  # keeps the graph alive, so that no address is used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    real = sum(size for address, size in saved.items() if address not in weights)
    del output
    counted = saved_bytes(unet.to("meta"), tuple(tensor.to("meta") for tensor in inputs))
    # Attention saves one number per head and query beside its maps, which some kernels pad; here that is at most 2%.
    assert counted == pytest.approx(real, rel=0.02)


def test_live_bytes_closed_form():
    x = torch.empty(100, device="meta")
    with LiveBytes() as live:
        y = x + 1  # 400 bytes
        y.view(10, 10).mul_(2)  # a view, and in place: nothing new
        z = y + 1  # 800
        del y  # 400
        w = torch.cat([z, z])  # 1200
        del z, w
        x + 1  # 400 again
    assert live.most == 1200


def test_a_pass_without_gradients_holds_much_less(sd15):
    """At the worst moment it holds at least the last block's maps of 960 channels: the norm's input and result, in half
    precision; at most a tenth of what learning saves."""
    assert 2 * 960 * 64 * 64 * 2 < sd15.passing < sd15.activations / 10
    # The VAE's last block at full size: its input, the norm's result and SiLU's, 256 channels in bf16.
    assert sd15.decoding == pytest.approx(3 * 256 * 512 * 512 * 2, rel=0.001)  # and the norm's statistics


@pytest.mark.parametrize("rank", [0, 16])
def test_gradient_checkpointing_of_stable_diffusion(rank, sd15, sd15_lora):
    """A third of the memory at most and less than another forward pass; without gradients nothing changes."""
    plain = sd15_lora if rank else sd15
    again = count_model(sd1_architecture(), ModelConfig(lora_rank=rank), torch.bfloat16, bool(rank), True)
    assert (plain.gradient_checkpointing, again.gradient_checkpointing) == (False, True)
    assert again.activations < plain.activations / 4
    # The memory of many samples, and of one beside the gradients.
    assert again.learning.bytes(128) < plain.learning.bytes(128) / 3
    assert again.learning.bytes(1) < plain.learning.bytes(1)
    # All ResNet and transformer blocks are two thirds of the work at least: what is left are changes of size and
    # projections between blocks, and every block's last layer, whose result is not needed again.
    assert 0.66 < (again.forward_backward - plain.forward_backward) / plain.forward < 1
    assert (again.forward, again.decode) == (plain.forward, plain.decode)
    assert (again.passing, again.decoding, again.trained) == (plain.passing, plain.decoding, plain.trained)


def test_lora_parameters_and_passes(sd15, sd15_lora):
    unet = sd1_architecture().empty_components()["unet"]
    targets = ModelConfig().lora_targets
    layers = [m for name, m in unet.named_modules() if name.endswith(tuple(f".{target}" for target in targets))]
    assert len(layers) == 16 * 2 * 4  # transformers, attentions, projections
    assert sd15_lora.trained == sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    assert sd15_lora.unet == SD15
    # A gradient with respect to inputs costs as much as the forward pass. Of the weights only the adapters' is taken;
    # attention's backward pass, 16% of the forward's FLOPs, is twice its forward; the first block's is not needed.
    assert sd15.forward < sd15_lora.forward < 1.01 * sd15.forward
    assert 2 * sd15.forward < sd15_lora.forward_backward < 2.3 * sd15.forward


def test_every_encoder_notation_is_counted_without_weights(caplog):
    shapes = count_encoder("shapes")
    assert shapes.parameters == 628_993
    assert count_encoder(counting.SHIPPED_ENCODERS["shapes"]) == shapes
    assert count_encoder("ViT-B/32:not-a-file.pt").parameters == 151_277_313  # CLIP's published count
    assert not caplog.records
    for spec in ("hf-hub:someone/encoder", "ViT-Q-3:openai"):
        with pytest.raises(ConfigError, match=f"'{spec}' cannot be counted: "):
            count_encoder(spec)


def test_encoders_of_terms_count_once():
    def specs(*terms, **fields):
        return counting.encoder_specs(RewardConfig(terms=terms, **fields))

    assert specs("steering", "clip=0.5") == ("hpsv2",)
    assert specs("clip", encoder="shapes") == ("shapes",)
    assert specs("steering", "clip", "hpsv2", encoder="shapes", clip_encoder="ViT-L-14:openai") == (
        "shapes",
        "ViT-L-14:openai",
        "hpsv2",
    )
    assert specs("compressibility", "oracle", "safety:nudenet") == ()
    # Q16 and the aesthetic predictor are of the same encoder.
    assert specs("pickscore", "safety:q16", "aesthetic", "safety:open-clip", pickscore="mine") == (
        "transformers:mine",
        "ViT-L-14-quickgelu:openai",
    )
    _, lines = counting.count_encoders(RewardConfig(terms=("safety:nudenet", "safety:oracle", "compressibility")))
    assert lines == ["Left out: the reward's term safety:nudenet"]


def test_the_safety_checker_counts_as_clips_image_tower(tmp_path: Path) -> None:
    """As published it is CLIP ViT-L/14's, without a text tower."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    (tmp_path / "safety_checker").mkdir()
    CLIPConfig(vision_config=vision | {"patch_size": 14}, projection_dim=768).save_pretrained(
        tmp_path / "safety_checker"
    )
    terms, source = ("safety:safety-checker",), SafetyCheckerSettings(str(tmp_path))
    (ours,) = counting.count_encoders(RewardConfig(terms=terms, safety_checker=source))[0].values()
    theirs = count_encoder("ViT-L-14-quickgelu:openai")
    assert ours.text == 0
    assert ours.parameters == theirs.parameters - theirs.text
    assert ours.image == pytest.approx(theirs.image, rel=0.01)
