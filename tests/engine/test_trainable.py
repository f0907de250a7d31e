"""What learns: adapters that diffusers reads, the moving average, and fp16's loss scale."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.peft_utils import get_peft_kwargs
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from fastgrpo.engine.trainable import Trainable, make_trainable
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import TrainerState
from fastgrpo.settings.schema import ModelConfig, OptimConfig, TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet.lora import LORA_FILE, Adapters, save_lora

CPU = torch.device("cpu")
EPS32 = 2.0**-23
LORA = TrainConfig(model=ModelConfig(lora_rank=3, lora_alpha=6.0), optim=OptimConfig(lr=1e-2))


def load_unet(pipeline: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", dtype=torch.float32).eval()


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 8, 32, generator=generator),
    )


def descend(trainable: Trainable, steps: int) -> None:
    """Optimizer steps on something that depends on every weight."""
    for seed in range(steps):
        trainable.unet(*inputs(seed)).sample.square().mean().backward()
        trainable.step(max_grad_norm=1.0)
        trainable.optimizer.zero_grad()


def test_adapters_change_nothing_until_trained_and_are_all_that_is_trained(tiny_pipeline: Path) -> None:
    unet, plain = load_unet(tiny_pipeline), load_unet(tiny_pipeline)
    trainable = make_trainable(unet, LORA, CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(unet(*inputs()).sample, plain(*inputs()).sample)
    targets = {name.split(".lora_")[0].rpartition("attn")[2][2:] for name in trainable.parameters}
    assert targets == {"to_q", "to_k", "to_v", "to_out.0"}
    descend(trainable, 2)
    weights = dict(plain.named_parameters())
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, weights[name.replace(".base_layer", "")]), "frozen weights never move"
    with torch.no_grad():
        assert not torch.allclose(unet(*inputs()).sample, plain(*inputs()).sample, atol=1e-3)


def test_adapters_follow_the_seed(tiny_pipeline: Path) -> None:
    def drawn(seed: int) -> torch.Tensor:
        trainable = make_trainable(load_unet(tiny_pipeline), replace(LORA, seed=seed), CPU, torch.float32)
        return torch.cat([p.flatten() for name, p in trainable.parameters.items() if "lora_A" in name])

    torch.manual_seed(1)
    first = drawn(1)
    torch.manual_seed(2)
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)


def saved_adapters(pipeline: Path, run: Path, rank: int, alpha: float) -> tuple[UNet2DConditionModel, Path]:
    """A UNet whose adapters were trained, and the checkpoint of it."""
    unet = load_unet(pipeline)
    config = replace(LORA, model=replace(LORA.model, lora_rank=rank, lora_alpha=alpha))
    trainable = make_trainable(unet, config, CPU, torch.float32)
    descend(trainable, 3)
    return unet, checkpoint.save(run, trainable, TrainerState(1, 0, 0.0, 1, {}), keep=0)


def without_metadata(file: Path, copy: Path) -> Path:
    """What a program sees that reads no metadata."""
    save_file(load_file(file), copy)
    return copy


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 2.0), (3, 1.7)])
def test_saved_adapters_and_merged_weights_do_in_diffusers_what_the_policy_does(
    tiny_pipeline: Path, tmp_path: Path, rank: int, alpha: float
) -> None:
    """With the file's metadata and without. alpha is not the rank, so a scale that gets lost shows."""
    unet, folder = saved_adapters(tiny_pipeline, tmp_path, rank, alpha)
    merged = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    file = folder / "lora" / LORA_FILE
    with torch.no_grad():
        ours, base = unet(*inputs()).sample, load_unet(tiny_pipeline)(*inputs()).sample
        assert (ours - base).abs().max() > 0.01
        loaded = []
        for each in (file, without_metadata(file, tmp_path / "bare.safetensors")):
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
            pipeline.load_lora_weights(each)
            loaded.append(pipeline.unet(*inputs()).sample)
        assert torch.equal(*loaded)
        # (s B) (A x) against s (B (A x)), and (W + s B A) x: some dozen roundings in each of a dozen layers; exactly
        # the same where alpha / rank is a power of two.
        tolerance = 1e-4 if rank == 3 else 0.0
        torch.testing.assert_close(loaded[0], ours, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(merged(*inputs()).sample, ours, atol=1e-4, rtol=1e-4)


def test_saved_adapters_are_the_formula_for_programs_that_know_no_alpha(tiny_pipeline: Path, tmp_path: Path) -> None:
    """B A of the file is the change of the merged weights, in float64; there is no alpha in it to be read or missed."""
    _, folder = saved_adapters(tiny_pipeline, tmp_path, rank=3, alpha=1.7)
    file = load_file(folder / "lora" / LORA_FILE)
    merged = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_unet(tiny_pipeline).state_dict()
    modules = {name.removeprefix("unet.").partition(".lora_")[0] for name in file}
    assert {name.rpartition(".lora_")[2] for name in file} == {"A.weight", "B.weight"}
    for module in modules:
        a, b = (file[f"unet.{module}.lora_{letter}.weight"].double() for letter in "AB")
        w, change = (
            base[f"{module}.weight"].double(),
            merged[f"{module}.weight"].double() - base[f"{module}.weight"].double(),
        )
        # Three products and sums, the scale on either side, and the sum with W: each a rounding of at most the terms'
        # sizes.
        bound = 8 * EPS32 * (w.abs() + b.abs() @ a.abs())
        assert ((b @ a - change).abs() <= bound).all(), module
        assert change.abs().max() > 1e-4


def test_the_metadata_is_what_every_peft_knows(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The keys that diffusers itself derives of a file without metadata."""
    _, folder = saved_adapters(tiny_pipeline, tmp_path, rank=3, alpha=1.7)
    with safe_open(folder / "lora" / LORA_FILE, "pt") as file:
        metadata = file.metadata()
        names = list(file.keys())
    assert list(metadata) in (["format", "lora_adapter_metadata"], ["lora_adapter_metadata", "format"])
    described = json.loads(metadata["lora_adapter_metadata"])
    derived = get_peft_kwargs({name: 3 for name in names if "lora_B" in name}, None, dict.fromkeys(names))
    assert described.keys() == {f"unet.{key}" for key in derived}
    assert described["unet.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    plain = {key: value for key, value in described.items() if key != "unet.target_modules"}
    assert plain == {f"unet.{key}": value for key, value in derived.items() if key != "target_modules"}


def test_the_same_adapters_are_the_same_bytes(tmp_path: Path) -> None:
    """safetensors itself writes metadata in a random order, and a set's order depends on the process's hash seed."""
    names = [f"{name}.lora_{letter}.default.weight" for name in ("x.to_q", "y.to_k") for letter in "AB"]
    written = set()
    for number in range(16):
        order = names[:: (-1) ** number]
        targets = ("to_k", "to_q", "to_v")[:: (-1) ** number]
        save_lora(tmp_path / str(number), Adapters({name: torch.ones(2, 2) for name in order}, 2, 3.0, targets))
        written.add((tmp_path / str(number) / LORA_FILE).read_bytes())
    (data,) = written
    assert load(data)["unet.x.to_q.lora_B.weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert load(data)["unet.x.to_q.lora_A.weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_checkpoint_of_before_goes_on_as_it_was(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Then lora/ held the adapters as they are trained, and trainer/ none."""
    unet, folder = saved_adapters(tiny_pipeline, tmp_path, rank=3, alpha=1.7)
    raw = load_file(folder / "trainer" / "adapters.safetensors")
    (folder / "trainer" / "adapters.safetensors").unlink()
    old = {"unet." + name.replace(".default.", "."): tensor for name, tensor in raw.items()}
    save_file(old, folder / "lora" / LORA_FILE, metadata={"format": "pt"})
    config = replace(LORA, model=replace(LORA.model, lora_rank=3, lora_alpha=1.7))
    assert checkpoint.read_adapters(folder, "trained", config.model).tensors.keys() == raw.keys()
    resumed = load_unet(tiny_pipeline)
    checkpoint.load(folder, make_trainable(resumed, config, CPU, torch.float32))
    with torch.no_grad():
        assert torch.equal(resumed(*inputs()).sample, unet(*inputs()).sample)


def test_frozen_weights_are_held_in_what_the_unet_computes_in(tiny_pipeline: Path) -> None:
    trainable = make_trainable(load_unet(tiny_pipeline), LORA, CPU, torch.bfloat16)
    frozen = {p.dtype for p in trainable.unet.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in trainable.parameters.values()} == {torch.float32}


def test_targets_that_fit_nothing_are_refused(tiny_pipeline: Path) -> None:
    config = replace(LORA, model=replace(LORA.model, lora_targets=("to_x",)))
    with pytest.raises(ConfigError, match=r"model\.lora_targets = 'to_x': no such layers"):
        make_trainable(load_unet(tiny_pipeline), config, CPU, torch.float32)


def test_the_average_is_the_recursion_in_float64(tiny_pipeline: Path) -> None:
    decay, steps = 0.8, 5
    config = TrainConfig(optim=OptimConfig(lr=1e-2, ema=decay))
    trainable = make_trainable(load_unet(tiny_pipeline), config, CPU, torch.float32)
    expected = {name: p.detach().double() for name, p in trainable.parameters.items()}
    for _ in range(steps):
        descend(trainable, 1)
        expected = {n: decay * expected[n] + (1 - decay) * p.detach().double() for n, p in trainable.parameters.items()}
    for name, average in trainable.ema.average.items():
        # Two roundings a step of numbers no larger than the largest weight on the way.
        bound = 2 * steps * EPS32 * expected[name].abs().max().item()
        assert (average.double() - expected[name]).abs().max() <= bound + 1e-9


def test_the_average_takes_the_weights_place_and_gives_it_back(tiny_pipeline: Path) -> None:
    config = TrainConfig(optim=OptimConfig(lr=1e-2, ema=0.9))
    trainable = make_trainable(load_unet(tiny_pipeline), config, CPU, torch.float32)
    descend(trainable, 2)
    weights = {name: p.detach().clone() for name, p in trainable.parameters.items()}
    averages = {name: a.clone() for name, a in trainable.ema.average.items()}
    with torch.no_grad(), trainable.ema.in_place():
        averaged = trainable.unet(*inputs()).sample
        assert all(torch.equal(p, averages[name]) for name, p in trainable.parameters.items())
    with torch.no_grad():
        assert not torch.allclose(trainable.unet(*inputs()).sample, averaged)
    assert all(torch.equal(p, weights[name]) for name, p in trainable.parameters.items())
    descend(trainable, 1)  # and the optimizer still moves them
    assert not any(torch.equal(p, weights[name]) for name, p in trainable.parameters.items())


@pytest.fixture
def fp16(tiny_pipeline: Path) -> Trainable:
    return make_trainable(load_unet(tiny_pipeline), TrainConfig(optim=OptimConfig(ema=0.5)), CPU, torch.float16)


def set_gradients(trainable: Trainable, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for parameter in trainable.parameters.values():
        parameter.grad = make(parameter)


def test_fp16_unscales_before_the_norm(fp16: Trainable) -> None:
    scale = fp16.scaler.get_scale()
    assert scale > 1
    set_gradients(fp16, lambda p: torch.full_like(p, 0.5 * scale))
    norm, taken = fp16.step(max_grad_norm=1e9)
    count = sum(p.numel() for p in fp16.parameters.values())
    assert taken
    assert norm.item() == pytest.approx(0.5 * count**0.5, rel=1e-5)


def test_fp16_leaves_out_a_step_that_overflowed_and_halves_the_scale(fp16: Trainable) -> None:
    before = {name: p.detach().clone() for name, p in fp16.parameters.items()}
    scale = fp16.scaler.get_scale()
    set_gradients(fp16, lambda p: torch.full_like(p, torch.inf))
    _, taken = fp16.step(max_grad_norm=1.0)
    assert not taken
    assert fp16.scaler.get_scale() == scale / 2
    for name, parameter in fp16.parameters.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(fp16.ema.average[name], before[name])


def test_without_fp16_there_is_no_scale(tiny_pipeline: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not make_trainable(load_unet(tiny_pipeline), TrainConfig(), CPU, dtype).scaler.is_enabled()


def test_the_loss_scale_is_in_the_checkpoint(fp16: Trainable, tiny_pipeline: Path, tmp_path: Path) -> None:
    set_gradients(fp16, lambda p: torch.full_like(p, torch.nan))
    fp16.step(1.0)
    folder = checkpoint.save(tmp_path, fp16, TrainerState(1, 0, 0.0, 1, {}), keep=0)
    config = TrainConfig(optim=OptimConfig(ema=0.5))
    resumed = make_trainable(load_unet(tiny_pipeline), config, CPU, torch.float16)
    assert resumed.scaler.get_scale() != fp16.scaler.get_scale()
    checkpoint.load(folder, resumed)
    assert resumed.scaler.state_dict() == fp16.scaler.state_dict()
