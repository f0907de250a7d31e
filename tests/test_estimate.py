"""`python -m fastgrpo.estimate`: counts against known values and closed forms, sums against arithmetic done here."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastgrpo import estimate
from fastgrpo.costs import counting
from fastgrpo.costs.counting import (
    EncoderCost,
    Held,
    ModelCost,
    count_encoder,
    count_model,
    saved_bytes,
    sd1_architecture,
)
from fastgrpo.costs.estimate import compute_dtype, iteration_work
from fastgrpo.costs.memory import candidates, iteration_of, memory_plan, peak
from fastgrpo.grpo.steps import pairs_per_iteration
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.command_line import find_preset, load_toml
from fastgrpo.settings.schema import ModelConfig, RewardConfig, TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.validation import validate
from support import ROOT

SD15 = 859_520_964  # the UNet's published parameter count
HPSV2 = 986_109_441  # open_clip's ViT-H-14
R1 = load_toml(find_preset("safediffusion-r1"))

# A model whose FLOPs are primes, so that no two different sums of them agree by accident.
MODEL = ModelCost(
    unet=10007,
    trained=10007,
    frozen=5003,
    latent_shape=(4, 64, 64),
    image_shape=(3, 512, 512),
    forward=101,
    forward_backward=307,
    decode=503,
    activations=1009,
    saving=1013,
    learning=Held(((0, 1019),)),
    passing=211,
    decoding=401,
)
ENCODERS = {"hpsv2": EncoderCost(parameters=3001, image=701, encoding=601)}


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
    """Two products, of a thousand numbers with a thousand by ten, and back; their gradients come one after the other."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.empty(1000, 10, device="meta"))
            self.second = nn.Parameter(torch.empty(10, 1000, device="meta"))

        def forward(self, x, return_dict):
            return ((x @ self.first) @ self.second,)

    inputs = [(torch.empty(samples, 1000, device="meta"),) for samples in (2, 4)]
    saving, learning = counting.held_bytes(Twice(), inputs)
    assert saving == 4 * (10 + 1000)  # the hidden row and the output's, for one sample; the input is not computed
    # First the second weight's gradient, while the hidden and the output's rows and their gradients are there; then also
    # the first one's, when the hidden rows themselves have gone.
    first, second = (80_000, 4 * (1000 + 1000 + 10)), (40_000, 4 * (1000 + 1000 + 10 + 10))
    assert learning == Held((first, second))
    assert learning.bytes(1) == 80_000 + 8040
    assert learning.bytes(2000) == 40_000 + 2000 * 8080


def test_only_lines_that_are_ever_on_top_are_kept():
    generator = torch.Generator().manual_seed(0)
    lines = {tuple(line) for line in torch.randint(0, 1000, (200, 2), generator=generator).tolist()}
    kept = counting._upper(lines)
    for samples in (*range(50), 1000, 10**6):
        assert Held(kept).bytes(samples) == Held(tuple(lines)).bytes(samples)
    assert len(kept) < 20


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
    with counting._LiveBytes() as live:
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
    assert shapes.parameters == 627_745
    assert count_encoder(counting.SHAPES_ENCODER) == shapes
    assert count_encoder("ViT-B/32:not-a-file.pt").parameters == 151_277_313  # CLIP's published count
    assert not caplog.records
    for spec in ("hf-hub:someone/encoder", "ViT-Q-3:openai"):
        with pytest.raises(ConfigError, match=f"'{spec}' cannot be counted: "):
            count_encoder(spec)


# ---------------------------------------------------------------------------------------------------------------------
# Sums.


def grpo(**fields) -> TrainConfig:
    return replace(R1, grpo=replace(R1.grpo, **fields))


def pairs_of(config: TrainConfig) -> int:
    rollout = config.rollout
    return pairs_per_iteration(
        config, make_schedule(sd1_architecture().scheduler, rollout.steps, rollout.eta, torch.device("cpu"))
    )


def work_of(config: TrainConfig) -> dict[str, int]:
    """Stage and name -> FLOP of one iteration."""
    work = iteration_work(config, MODEL, ENCODERS, pairs_of(config))
    return {f"{part.stage}: {part.name}": part.total for part in work}


@pytest.mark.parametrize(
    ("fields", "pairs"),
    [
        ({}, 25_088),
        ({"epochs": 2}, 2 * 25_088),
        ({"drop_last_steps": 10}, 512 * 40),
        ({"step_fraction": 0.5}, 512 * 24),  # 24.5 of 49, rounded to even
        ({"window": 7}, 512 * 7),
        ({"trim": 3}, 32 * 10 * 49),
        ({"best_of": 4, "trim": 2}, 32 * 4 * 49),
    ],
)
def test_pairs(fields, pairs):
    config = grpo(**fields)
    assert pairs_of(config) == pairs
    # Training, which counts them on its own, accepts as many optimizer steps as there are pairs and not more.
    validate(replace(config, updates_per_iteration=pairs))
    with pytest.raises(ConfigError, match="updates_per_iteration"):
        validate(replace(config, updates_per_iteration=pairs + config.grpo.epochs))


def test_a_step_without_noise_is_no_pair():
    """A scheduler that ends at alpha 1 takes its last step without noise: there is nothing to learn from."""
    scheduler = {**sd1_architecture().scheduler, "set_alpha_to_one": True}
    schedule = make_schedule(scheduler, 50, 1.0, torch.device("cpu"))
    assert pairs_per_iteration(grpo(drop_last_steps=0), schedule) == 512 * 49


def test_work_of_the_paper_closed_form():
    assert R1.updates_per_iteration == 16
    assert work_of(R1) == {
        "rollout: UNet forward": 512 * 50 * 2 * 101,
        "decode: VAE decode": 512 * 503,
        "reward: image tower, hpsv2": 512 * 701,
        "update: UNet forward + backward": 512 * 49 * 2 * 307,
    }


def test_without_guidance_half():
    plain = work_of(replace(R1, rollout=replace(R1.rollout, guidance=1.0)))
    for name in ("rollout: UNet forward", "update: UNet forward + backward"):
        assert 2 * plain[name] == work_of(R1)[name]


def test_half_the_steps_halve_the_update():
    config = grpo(drop_last_steps=2)  # 48 steps, so that a half is whole
    half = replace(config, grpo=replace(config.grpo, step_fraction=0.5))
    name = "update: UNet forward + backward"
    assert 2 * work_of(half)[name] == work_of(config)[name]
    assert work_of(half)["rollout: UNet forward"] == work_of(config)["rollout: UNet forward"]


def test_kl_adds_a_forward_pass_of_every_pair():
    assert work_of(grpo(kl=0.1)) == {**work_of(R1), "update: UNet forward, KL's base": 512 * 49 * 2 * 101}


@pytest.mark.parametrize(("updates", "pairs"), [(16, 512 * 49 * 15 // 16), (1, 0), (3, 512 * 49 - 8363)])
def test_replay_adds_a_forward_pass_of_every_pair_that_the_first_step_does_not_have(updates, pairs):
    config = replace(R1, updates_per_iteration=updates)
    replayed = replace(config, grpo=replace(config.grpo, old_log_prob="replay"))
    assert work_of(replayed) == {**work_of(config), "update: UNet forward, replay": pairs * 2 * 101}


def test_encoders_of_terms_count_once():
    def specs(*terms, **fields):
        return counting.encoder_specs(RewardConfig(terms=terms, **fields))

    assert specs("steering", "clip=0.5") == ("hpsv2",)
    assert specs("steering", "clip", "hpsv2", encoder="shapes", clip_encoder="ViT-L-14:openai") == (
        "shapes",
        "ViT-L-14:openai",
        "hpsv2",
    )
    assert specs("compressibility") == ()


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("auto", "auto", "bfloat16"), ("cpu", "auto", "float32"), ("cpu", "fp16", "float16"), ("auto", "fp32", "float32")],
)
def test_compute_dtype(device, dtype, expected):
    config = replace(R1, engine=replace(R1.engine, device=device, dtype=dtype))
    assert str(compute_dtype(config)) == f"torch.{expected}"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def without_progress(output: str) -> list[str]:
    """Its lines from the first of the answer on: a machine that takes long to count says so before."""
    lines = output.splitlines()
    return lines[lines.index("Computed from the configs, not measured.") :]


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> list[str]:
    assert estimate.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = without_progress(out)
    assert max(len(line) for line in lines if not line.startswith("Left out: ")) <= 99
    return lines


def numbers(lines: list[str], beginning: str) -> list[float]:
    """Those at the end of the line that begins so."""
    line = next(line for line in lines if line.strip().startswith(beginning))
    return [float(number.replace(",", "")) for number in re.findall(r"(?<=\s)[\d,.]+(?=%?(?:\s|$))", line)]


def test_the_papers_recipe(capsys):
    lines = shown(capsys, "safediffusion-r1", "--processes", "8", "--tflops", "200", "--micro-batch", "4")
    assert "          counted as SD 1.x: its configs are not in the hub's cache" in lines
    assert "trained   all of the UNet's 859,520,964, in bf16" in lines
    assert "25,088 (sample, step) pairs" in "\n".join(lines)
    # From the known values: 0.803, 2.515, 0.335 and 2.407 TFLOP.
    rollout, decode, reward, learning = 51_200 * 0.803, 512 * 2.515, 512 * 0.335, 50_176 * 2.407
    total = rollout + decode + reward + learning
    assert numbers(lines, "rollout  UNet forward") == pytest.approx(
        [0.803, 51_200, rollout, 100 * rollout / total], rel=0.01
    )
    assert numbers(lines, "update   UNet forward + backward")[2] == pytest.approx(learning, rel=0.01)
    assert numbers(lines, "in all") == pytest.approx([total], rel=0.01)
    seconds, hours = (
        float(n) for n in re.search(r"([\d.]+) s an iteration, ([\d.]+) hours", "\n".join(lines)).groups()
    )
    assert seconds == pytest.approx(total / (8 * 200), rel=0.01)
    assert hours == pytest.approx(300 * seconds / 3600, rel=0.001)  # both printed to four digits
    assert numbers(lines, "always   Adam's two moments")[-1] == pytest.approx(8 * SD15 / 1e9, abs=0.005)
    assert numbers(lines, "always   encoder hpsv2")[-1] == pytest.approx(4 * HPSV2 / 1e9, abs=0.005)
    wanted = ("  always", "  decode   16 images", "  decode   CUDA graphs")
    parts = [numbers(lines, line.strip())[-1] for line in lines if line.startswith(wanted)]
    # Parts are rounded to 0.005 each; ten of them.
    assert numbers(lines, "at most, during the decode")[-1] == pytest.approx(sum(parts), abs=0.05)


def test_a_small_card(capsys):
    lines = shown(capsys, "lora-small")
    assert any("adapters of rank 16, 3,188,736 parameters beside the UNet's 859,520,964, in bf16" in n for n in lines)
    assert "at 100 TFLOP/s on 1 GPU (--tflops): " in "\n".join(lines)
    assert numbers(lines, "at most, during the decode")[-1] < 12 - 1.5  # what the preset is made for; room for CUDA


@pytest.mark.slow
def test_micro_batch_0_fills_the_gpu(capsys):
    """With the largest candidate that keeps the peak within the share; the next one would not."""
    model = count_model(sd1_architecture(), ModelConfig(), torch.bfloat16, kernels=True)
    encoders = {"hpsv2": count_encoder("hpsv2")}
    sizes = candidates(iteration_of(R1, steps=50, pairs=512 * 49, processes=8))
    for gigabytes, share in ((141, 0.92), (80, 0.92), (80, 0.5)):
        arguments = ("--micro-batch", "0", "--gpu-gb", str(gigabytes), "--engine.memory", str(share))
        lines = shown(capsys, "safediffusion-r1", "--processes", "8", *arguments)
        pattern = rf"  micro_batch = 0: (\d+) pairs, the most that {gigabytes * share:.1f} GB should hold"
        size = next(int(found[1]) for line in lines if (found := re.match(pattern, line)))
        peaks = [
            peak(memory_plan(R1, model, encoders, torch.bfloat16, 8, pairs))[1] / 1e9
            for pairs in sizes[sizes.index(size) : sizes.index(size) + 2]
        ]
        assert peaks[0] <= gigabytes * share < peaks[1]
    assert "  micro_batch = 0: 32 pairs on a CPU" in shown(
        capsys, "shapes", "--micro-batch", "0", "--engine.device", "cpu"
    )


def test_what_cannot_be_counted_is_left_out_in_a_line(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def score(images, prompts): ...", encoding="utf-8")
    term = f"{tmp_path}/mine.py:score"
    lines = shown(capsys, "shapes", "--reward.terms", "clip", term, "--reward.clip-encoder", "hf-hub:someone/encoder")
    assert any(line.startswith("Left out: the reward's encoder 'hf-hub:someone/encoder' cannot") for line in lines)
    assert f"Left out: the reward's term {term}" in lines
    assert not any(line.startswith("  reward ") for line in lines)


@pytest.mark.slow
def test_as_a_program_of_its_own(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo.estimate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = without_progress(done.stdout)
    assert lines[:3] == ["Computed from the configs, not measured.", "", "model     shapes"]
    assert not any("counted as SD 1.x" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["safediffusion-r1", "--processes", "5"],
            "prompts_per_iteration = 32: accepted is a multiple of the 5 processes",
        ),
        (["shapes", "--processes", "0"], "--processes 0: accepted is 1 or more"),
        (["shapes", "--tflops", "-1"], "--tflops -1.0: accepted is a number above 0, or 0"),
        (["shapes", "--tflops", "nan"], "--tflops nan: accepted"),
        (["shapes", "--gpu-gb", "0"], "--gpu-gb 0.0: accepted is a number above 0"),
        (["shapes", "--tflop", "1"], "--tflop: no such flag (did you mean --tflops?)"),
        (["shapes", "--grpo.trim", "4"], "grpo.trim = 4"),
        (["shapes", "--model.path", "nowhere"], "model.path is 'nowhere'"),
        (["shapes", "--model.lora-rank", "4", "--model.lora-targets", "to_x"], "to_x"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert estimate.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgrpo: ")
    assert message in err
    assert err.count("\n") == 1
