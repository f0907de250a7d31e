"""AdamW with moments of 8 bits: against float64 and the format's definition, resumed, and in its memory."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgrpo.costs.held_memory import LiveBytes
from fastgrpo.costs.memory import memory_plan, peak
from fastgrpo.engine import adamw_8bit
from fastgrpo.engine.adamw_8bit import BLOCK, FlatAdamW8bit
from fastgrpo.engine.weights import FlatAdamW, FlatWeights
from fastgrpo.run import checkpoint
from fastgrpo.settings.schema import OptimConfig, TrainConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.validation import validate
from support.checkpoints import Training
from support.costs import ENCODERS, MODEL

LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.99, 1e-6, 0.1
U = 2.0**-24  # half an ulp of 1 in float32
LEAST_SCALE = 1e-12  # torchao's


def make_model() -> nn.Module:
    """Odd sizes, in channels_last and transposed; one parameter of more elements than a CPU steps at a time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1))
        model.register_parameter("large", nn.Parameter(torch.randn(300, 301).t()))
        model.register_parameter("gain", nn.Parameter(torch.randn(())))
    return model.to(memory_format=torch.channels_last)


def flat(kind: type[FlatAdamW] = FlatAdamW8bit, ema_decay: float = 0.0) -> FlatAdamW:
    weights = FlatWeights(dict(make_model().named_parameters()), ema=ema_decay > 0, alignment=BLOCK)
    return kind(weights, LR, (BETA1, BETA2), EPS, DECAY, ema_decay)


def give(optimizer: FlatAdamW, seed: int) -> None:
    """Gradients of sizes that differ by three orders within a parameter, and by one from each to the next."""
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(optimizer.weights.parameters.values()):
        sizes = 10.0 ** (-3 * torch.rand(parameter.shape, generator=generator) - index)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * sizes


def tensors(optimizer: FlatAdamW) -> dict[str, Tensor]:
    """Copies of all that a step changes."""
    held = {"values": optimizer.weights.values, "step": optimizer.step_count, **optimizer._shares()}
    if optimizer.weights.ema is not None:
        held["ema"] = optimizer.weights.ema
    return {name: tensor.clone() for name, tensor in held.items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def dynamic_map(signed: bool) -> Tensor:
    """[256] float64, the values of dynamic quantization by its definition (arXiv 1511.04561 and 2110.02861).

    For e from 0 to 6 the centres of 2^e equal parts of 0.1 to 1, without sign of 2^(e + 1), times 10^(e - 6); 0; and 1.
    """
    values = [0.0, 1.0]
    for e in range(7):
        parts = 2**e if signed else 2 ** (e + 1)
        centres = [10.0 ** (e - 6) * (0.1 + 0.9 * (k + 0.5) / parts) for k in range(parts)]
        values += centres + ([-centre for centre in centres] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64)


def decoded(optimizer: FlatAdamW, key: str) -> tuple[Tensor, Tensor]:
    """A moment as a checkpoint's codes, scales and map define it, and the scales, both [size] float64."""
    shares, values = optimizer._shares(), optimizer.state_tensors()[f"{key}_map"].double()
    scales = shares[f"{key}_scale"].double().repeat_interleave(BLOCK)
    return values[shares[key].long()] * scales, scales


def half_step(shares: Tensor, signed: bool) -> Tensor:
    """How far rounding to the map may move each of the [size] shares: half the way between its neighbours there."""
    values = dynamic_map(signed)
    above = torch.searchsorted(values, shares).clamp(1, len(values) - 1)
    # The signed map begins at -0.993, to which all that lies below is rounded.
    return torch.maximum((values[above] - values[above - 1]) / 2, values[0] - shares)


def test_the_maps_are_those_of_the_format() -> None:
    saved = flat().state_tensors()
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        ours, defined = saved[f"{key}_map"].double(), dynamic_map(signed)
        assert len(defined) == 256
        # Computed in float32: two limits, each a product and a sum, their mean, its product and what is stored.
        assert ((ours - defined).abs() <= 16 * U * defined.abs()).all()


def test_each_step_is_that_of_float64_from_the_state_that_the_codes_say() -> None:
    """Weights but for float32's rounding; moments but for half a step of the map, beside scales that are the largest.

    The moments before a step are read here from codes and scales by the format's definition, not by the library.
    """
    optimizer = flat()
    for t in range(1, 13):
        give(optimizer, t)
        p = optimizer.weights.values.double()
        (m, _), (v, _) = decoded(optimizer, "exp_avg"), decoded(optimizer, "exp_avg_sq")
        optimizer.step()
        g = optimizer.weights.gradient.double()
        size = BETA1 * m.abs() + (1 - BETA1) * g.abs()
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        factor = LR / (1 - BETA1**t) / ((v / (1 - BETA2**t)).sqrt() + EPS)
        p = p * (1 - LR * DECAY) - factor * m
        # As the kernel's own tests count: at most 18 roundings of the update; the moments that are read have one more
        # each, of which the root halves the second's. Of the weight its decay, the product and the sum.
        bound = 20 * U * factor * size + 3 * U * (p.abs() + factor * size)
        assert ((optimizer.weights.values.double() - p).abs() <= bound).all()
        for key, exact, rough in (("exp_avg", m, size), ("exp_avg_sq", v, v)):
            found, scales = decoded(optimizer, key)
            largest = exact.abs().view(-1, BLOCK).amax(1).clamp(min=LEAST_SCALE).repeat_interleave(BLOCK)
            rough = rough.view(-1, BLOCK).amax(1).clamp(min=LEAST_SCALE).repeat_interleave(BLOCK)
            assert ((scales - largest).abs() <= 8 * U * rough).all(), key
            bound = half_step(exact / scales, signed=key == "exp_avg") * scales + 16 * U * rough
            assert ((found - exact).abs() <= bound).all(), key
    moved = (decoded(optimizer, "exp_avg")[0] - m).abs().max()
    assert 0 < moved < 0.02 * m.abs().max(), "it is rounded, and not to much"


def test_a_first_step_gives_the_bits_of_moments_in_float32() -> None:
    """It begins with no moment that could have been rounded; with average, working copy and clipping."""
    found = []
    for kind in (FlatAdamW, FlatAdamW8bit):
        optimizer = flat(kind, ema_decay=0.9)
        working = optimizer.weights.working_copy(torch.bfloat16)
        give(optimizer, 1)
        norm = optimizer.step(max_grad_norm=0.1)
        assert norm > 0.1
        found.append({"values": optimizer.weights.values, "ema": optimizer.weights.ema, "norm": norm} | working)
    assert_same(*found)


def test_how_many_elements_are_stepped_at_a_time_changes_no_bit() -> None:
    found = []
    for piece in (16 * BLOCK, adamw_8bit._CPU_PIECE, 1 << 30):
        optimizer = flat(ema_decay=0.9)
        optimizer._piece = piece
        for seed in (1, 2):
            give(optimizer, seed)
            optimizer.step(max_grad_norm=1.0)
        found.append(tensors(optimizer))
    assert len(optimizer.weights.values) > adamw_8bit._CPU_PIECE
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_no_block_is_of_two_parameters_and_what_lies_between_stays_0() -> None:
    optimizer = flat()
    for seed in (1, 2, 3):
        give(optimizer, seed)
        optimizer.step()
    whole = optimizer.weights.values
    for view in optimizer.weights.views(whole).values():
        assert (view.data_ptr() - whole.data_ptr()) % (4 * BLOCK) == 0
    for buffer in (whole, decoded(optimizer, "exp_avg")[0], decoded(optimizer, "exp_avg_sq")[0]):
        assert buffer.count_nonzero() == sum(v.count_nonzero() for v in optimizer.weights.views(buffer).values())


def test_a_step_without_finite_gradient_changes_nothing() -> None:
    """Not even by being read and rounded again: a block whose largest element is negative would shrink."""
    optimizer = flat(ema_decay=0.9)
    give(optimizer, 1)
    optimizer.step()
    before = tensors(optimizer)
    for bad in (math.nan, math.inf):
        give(optimizer, 2)
        optimizer.weights.collect_gradients()[5] = bad
        optimizer.step()
        assert_same(tensors(optimizer), before)
    again, left = optimizer.quantized["exp_avg"], torch.zeros(1)
    read, write = adamw_8bit.functions()
    write(again.codes, again.scales, again.map, read(again.codes, again.scales, again.map), left)
    assert not torch.equal(again.scales, before["exp_avg_scale"])
    give(optimizer, 2)
    optimizer.step()
    assert optimizer.step_count.item() == 2


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_goes_on_from_a_checkpoint_gives_the_same_bits(
    lora_rank: int, tiny_pipeline: Path, tmp_path: Path
) -> None:
    training = Training(tiny_pipeline, lora_rank, "8bit")
    for seed in (1, 2):
        training.step(seed)
    folder = training.save(tmp_path, 2)
    stored = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert checkpoint.tensor_bytes(training.trainable) == pytest.approx(sum(t.nbytes for t in stored), abs=2000)
    training.step(3)
    resumed = Training(tiny_pipeline, lora_rank, "8bit")
    checkpoint.load(folder, resumed.trainable)
    resumed.step(3)
    assert_same(resumed.tensors(), training.tensors())
    forgetful = Training(tiny_pipeline, lora_rank, "8bit")
    checkpoint.load(folder, forgetful.trainable)
    forgetful.optimizer.load_state_tensors({})
    forgetful.step(3)
    assert not torch.equal(forgetful.optimizer.weights.values, training.optimizer.weights.values)


def test_a_checkpoint_of_the_other_moments_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    for saved, asked in (("8bit", "fp32"), ("fp32", "8bit")):
        folder = Training(tiny_pipeline, moments=saved).save(tmp_path / saved, 1)
        expected = f"optim.moments = '{asked}': the checkpoint's moments are held in {saved}; accepted is {saved}"
        with pytest.raises(ConfigError, match=expected):
            checkpoint.load(folder, Training(tiny_pipeline, moments=asked).trainable)


def test_codes_of_another_map_are_refused() -> None:
    optimizer = flat()
    saved = optimizer.state_tensors()
    saved["exp_avg_map"] = saved["exp_avg_map"].roll(1)
    with pytest.raises(ConfigError, match="another torchao's map"):
        optimizer.load_state_tensors(saved)


def test_without_the_library_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = TrainConfig(optim=OptimConfig(moments="8bit"))
    expected = r"^optim.moments = '8bit': accepted is fp32 .*pip install 'fastgrpo\[8bit\]'"
    with pytest.raises(ConfigError, match=expected):
        validate(config)
    validate(TrainConfig())


def test_a_step_holds_no_more_than_the_plan_says() -> None:
    """Beside weights, gradient, codes and scales, which are counted elsewhere; on pieces as a GPU's, uncompiled."""
    weights = FlatWeights({"all": nn.Parameter(torch.ones(2 * adamw_8bit._PIECE))}, alignment=BLOCK)
    optimizer = FlatAdamW8bit(weights, LR)
    optimizer._piece = adamw_8bit._PIECE
    weights.zero_gradient()
    with LiveBytes() as live:
        optimizer.step()
    config = TrainConfig(optim=OptimConfig(moments="8bit"))
    large = type(MODEL)(**(vars(MODEL) | {"unet": 10**9, "trained": 10**9}))
    plan = memory_plan(config, large, ENCODERS, torch.bfloat16, 1, 1)
    (planned,) = (part.size for part in plan if part.stage == "step" and not part.name.startswith("CUDA graphs"))
    assert 0.95 * planned <= live.most <= planned


def test_the_plan_counts_codes_scales_and_the_piece_beside_graphs() -> None:
    plans = {
        moments: memory_plan(TrainConfig(optim=OptimConfig(moments=moments)), MODEL, ENCODERS, torch.bfloat16, 1, 4)
        for moments in ("fp32", "8bit")
    }
    by_name = {part.name: part.size for part in plans["8bit"]}
    assert by_name["Adam's two moments, 8 bits"] == 2 * 10007 + 2 * 4 * (10007 // BLOCK)
    assert [part.stage for part in plans["fp32"] if part.stage == "step"] == []
    graphs = [part.size for part in plans["8bit"] if part.name.startswith("CUDA graphs")]
    assert len(graphs) == 3
    assert len(set(graphs)) == 1
    assert peak(plans["8bit"])[1] > 0


@pytest.mark.slow
@pytest.mark.gpu
def test_what_is_compiled_computes_the_same_on_a_gpu() -> None:
    assert adamw_8bit.compiles(torch.device("cuda"))
