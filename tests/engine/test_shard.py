"""Several processes that own shares of the optimizer's state learn what one process learns, and save the same files."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.costs.counting import find_architecture
from fastgrpo.costs.memory import choose_shard, memory_plan
from fastgrpo.engine import batch_size
from fastgrpo.engine.batch_size import decide_shard
from fastgrpo.engine.record import EngineRecord
from fastgrpo.engine.trainable import make_trainable
from fastgrpo.kernels.accumulate import ALIGNMENT
from fastgrpo.run import checkpoint
from fastgrpo.settings.schema import EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.distributed import Ranks
from support.costs import ENCODERS, MODEL
from support.sharding import AFTER_TWO, CASES, COUNTS, OPTIM, SAVED, STEPS, eight_bits, make, run_processes, train

# A float32 gradient is within this of its float64 reference, in the 2-norm, whatever the order of its sums
# (support/update.py derives it). Each of the steps is linear in its gradient, whose own error grows with that of the
# weights by less than the gradient changes over all steps, which is less than itself.
TOLERANCE = 2 * STEPS * 1e-4


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all counts of processes have left their checkpoints, one process among them."""
    folder = tmp_path_factory.mktemp("shards")
    run_processes(tiny_pipeline, folder)
    torch.set_num_threads(1)
    for name in ("full", "lora"):
        train(tiny_pipeline, CASES[name], Ranks(), folder / f"{name}-1")
        after = checkpoint.checkpoint_folder(folder / f"{name}-2", SAVED)
        train(tiny_pipeline, CASES[name], Ranks(), folder / f"{name}-2-then-1", after)
    eight_bits(tiny_pipeline, Ranks(), folder / "8bit-1")
    eight_bits(tiny_pipeline, Ranks(), folder / "8bit-2-then-1", checkpoint.checkpoint_folder(folder / "8bit-2", SAVED))
    return folder


def found(folder: Path, count: int) -> list[dict]:
    return [json.loads((folder / f"found-{count}-{index}.json").read_text()) for index in range(count)]


@functools.cache
def state(run: Path, iteration: int = STEPS) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by file and name."""
    saved = checkpoint.checkpoint_folder(run, iteration)
    assert checkpoint.find_damage(saved) is None
    return {
        f"{file.name} {name}": tensor
        for file in sorted(saved.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def flat(tensors: dict[str, Tensor], part: str) -> Tensor:
    return torch.cat([tensor.double().flatten() for name, tensor in sorted(tensors.items()) if part in name])


def assert_equal_but_for_rounding(ours: Path, theirs: Path, start: Path) -> None:
    """Weights, average and moments, held against what training changed of them. start: an earlier checkpoint's run."""
    one, other, begun = state(ours), state(theirs), state(start, SAVED)
    assert one.keys() == other.keys()
    for part in ("diffusion_pytorch_model", "ema", "exp_avg.", "exp_avg_sq."):
        a, b, c = (flat(tensors, part) for tensors in (one, other, begun))
        assert torch.linalg.vector_norm(a - c) > 0, part
        assert torch.linalg.vector_norm(a - b) <= TOLERANCE * torch.linalg.vector_norm(a - c), part


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_learns_what_one_learns(folder: Path, name: str, count: int) -> None:
    """Full training and adapters; and without shares, so that the two are held against each other too."""
    alone = folder / f"{name.replace('none', 'full')}-1"
    assert_equal_but_for_rounding(folder / f"{name}-{count}", alone, alone)
    measured = found(folder, count)
    norms = {each[name]["norm"] for each in measured}
    assert len(norms) == 1, "the same norm on all processes, to the bit"
    assert norms.pop() > OPTIM.max_grad_norm, "or the norm decides nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("full", 1), ("lora", 1), *((name, n) for n, names in AFTER_TWO.items() for name in names)]
)
def test_what_two_have_saved_any_number_goes_on_from(folder: Path, name: str, count: int) -> None:
    went_on, undisturbed = folder / f"{name}-2-then-{count}", folder / f"{name}-2"
    if count == 2:
        one, other = state(went_on), state(undisturbed)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), "as many processes: the same bits"
    for theirs in (undisturbed, folder / f"{name}-2-then-1"):
        assert_equal_but_for_rounding(went_on, theirs, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_a_step_sends_each_process_what_the_formula_says(folder: Path, count: int) -> None:
    """And each holds its share of the state, whose sizes are closed forms of the parameters'."""
    unet = state(folder / "full-1")
    sizes = [t.numel() for name, t in unet.items() if name.startswith("diffusion_pytorch_model")]
    aligned = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    padded = math.ceil(aligned / (count * ALIGNMENT)) * count * ALIGNMENT
    for each in found(folder, count):
        assert {k: v for k, v in each["none"].items() if k.startswith("sent")} == {"sent.all_reduce": 4 * aligned}
        assert {k: v for k, v in each["full"].items() if k.startswith("sent")} == {
            "sent.reduce_scatter": 4 * padded,
            "sent.all_gather": 4 * padded + 8 * count,  # the weights, and the shares' squared norms in float64
        }
        assert [each["full"][f"held.{name}"] for name in ("exp_avg", "exp_avg_sq", "ema")] == [4 * padded // count] * 3
        assert [each["none"][f"held.{name}"] for name in ("exp_avg", "exp_avg_sq", "ema")] == [4 * aligned] * 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_moments_of_8_bits_do_not_depend_on_the_number_of_processes(folder: Path, count: int) -> None:
    """Nor does what was saved on 2 and goes on on `count`, or on one: all bits, where sums of gradients are exact."""
    alone = state(folder / "8bit-1")
    for run in (f"8bit-{count}", f"8bit-2-then-{count}", "8bit-2-then-1"):
        other = state(folder / run)
        assert other.keys() == alone.keys()
        assert all(torch.equal(other[name], alone[name]) for name in alone), run
    begun = state(folder / "8bit-1", SAVED)
    assert not all(torch.equal(begun[name], alone[name]) for name in alone)


@pytest.mark.slow
def test_half_precision_follows_and_overflows_on_all_alike(folder: Path) -> None:
    half = [each["half"] for each in found(folder, 2)]
    assert half[0] == half[1], "the same decision and the same scale, though one alone has seen the infinity"
    assert half[0]["follows"]
    assert half[0]["moved"]
    (overflowed, kept, scale), (finite, taken, after) = half[0]["scale"]
    assert (overflowed, kept, finite, taken, after) == (False, False, True, True, scale)
    assert (half[0]["kept inf"], half[0]["kept 1.0"]) == (True, False)
    assert scale == torch.amp.GradScaler("cpu")._init_scale / 2


def test_only_the_first_has_all_and_only_when_gathered(tiny_pipeline: Path) -> None:
    trainable = make(tiny_pipeline, CASES["full"], Ranks(1, 3))
    for ask in (trainable.optimizer.state_tensors, lambda: trainable.ema.average):
        with pytest.raises(RuntimeError, match=r"has a share of .* only: the first one has all after `gather`"):
            ask()


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("rank", [0, 16])
def test_what_stable_diffusion_holds_is_what_the_plan_says(rank: int, moments: str) -> None:
    """Counted from the buffers of process 3 of 8, on the meta device, in bf16 with a moving average."""
    config = TrainConfig(
        model=ModelConfig(lora_rank=rank),
        optim=OptimConfig(ema=0.9, moments=moments),
        engine=EngineConfig(shard="optimizer"),
    )
    architecture, _ = find_architecture(replace(config.model, path="stable-diffusion-v1-5/stable-diffusion-v1-5"))
    unet = architecture.empty_components()["unet"]
    trainable = make_trainable(unet, config, torch.device("meta"), torch.bfloat16, Ranks(3, 8))
    weights, optimizer = trainable.optimizer.weights, trainable.optimizer
    whole = sum(p.numel() for p in architecture.empty_components()["unet"].parameters())
    trained = sum(p.numel() for p in unet.parameters()) - whole if rank else whole
    model = replace(MODEL, unet=whole, trained=trained)
    plan = {part.name: part.size for part in memory_plan(config, model, {}, torch.bfloat16, 8, 4)}
    held = {
        "adapters, fp32" if rank else "UNet, fp32": [weights.values],
        "working copy of what is trained, bf16": [weights.working],
        f"Adam's two moments, {'8 bits' if moments == '8bit' else 'fp32'}, 1/8": optimizer._shares().values(),
        "gradient, fp32": [weights.gradient],
        "moving average (optim.ema), fp32, 1/8": [weights.ema],
    }
    for name, tensors in held.items():
        assert sum(t.untyped_storage().nbytes() for t in tensors) == pytest.approx(plan[name], rel=0.05), name


def test_auto_shares_where_the_plan_says_that_memory_is_short() -> None:
    def chosen(room: int | None, processes: int = 8, **engine: str) -> tuple[str, str]:
        config = TrainConfig(engine=EngineConfig(**engine))
        return choose_shard(config, lambda _: MODEL, ENCODERS, torch.float32, processes, room)

    assert chosen(None) == ("none", "sharded: none, as auto is on a CPU")
    assert chosen(10**12)[0] == "none"
    shard, why = chosen(1)
    assert shard == "optimizer"
    assert why.startswith("sharded over 8 processes: optimizer, of 0.00 GB 4 pairs need ")
    assert chosen(10**12, shard="optimizer")[0] == "optimizer"
    assert chosen(1, shard="none")[0] == "none"
    assert chosen(1, processes=1) == ("none", "")
    assert chosen(1, processes=1, shard="optimizer") == ("none", "nothing is sharded: there is one process")
    config = TrainConfig(engine=EngineConfig(shard="optimizer"))
    without = replace(config, engine=EngineConfig(shard="none"))
    both = [sum(p.size for p in memory_plan(c, MODEL, ENCODERS, torch.float32, 8, 4)) for c in (without, config)]
    assert both[0] - both[1] == 8 * MODEL.trained - 8 * -(-MODEL.trained // 8)


@pytest.mark.parametrize(("own_room", "others"), [(10**12, False), (10**12, True), (0, True)])
def test_one_process_that_is_short_of_memory_has_all_share(
    own_room: int, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a resumed run goes on as it was, unless it is on other devices or may fill another share of them."""

    class BesideAnother(Ranks):
        def any(self, flag: bool) -> bool:
            return flag or others

    monkeypatch.setattr(batch_size, "memory_room", lambda *_: own_room)
    monkeypatch.setattr(batch_size, "device_name", lambda device: f"a {device.type}")
    monkeypatch.setattr(batch_size, "count_model", lambda *_: MODEL)
    config, ranks, cuda = load_toml(find_preset("shapes")), BesideAnother(0, 2), torch.device("cuda")
    shard, why = decide_shard(config, cuda, torch.bfloat16, ranks, EngineRecord())
    assert shard == ("optimizer" if others else "none")
    assert ("as another process has less memory" in why) == (others and own_room > 0)

    before = EngineRecord("a cuda", settings={"engine.memory": config.engine.memory}, shard={"2": "optimizer"})
    for record, follows in (
        (before, True),
        (replace(before, device="another"), others),
        (replace(before, settings={"engine.memory": 0.5}), others),
        (replace(before, shard={"4": "optimizer"}), others),
    ):
        assert (decide_shard(config, cuda, torch.bfloat16, ranks, record)[0] == "optimizer") == follows
    on_cpu = decide_shard(config, torch.device("cpu"), torch.float32, ranks, before)
    assert on_cpu == ("none", "sharded: none, as auto is on a CPU")
