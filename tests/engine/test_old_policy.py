"""Until the policy moves its ratio is 1 on every CPU: by the rollout's numbers where they do, else by the update's."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastgrpo.assembly import Training, load_training
from fastgrpo.engine.old_policy import OldPolicy
from fastgrpo.engine.record import EngineRecord
from fastgrpo.engine.setup import CPU_AGREEMENT
from fastgrpo.grpo.loss import PairResults, PolicyLoss
from fastgrpo.grpo.micro_batch import Experience, MicroBatch
from fastgrpo.policy import Policy
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import TrainerState
from fastgrpo.run.recovery import recover
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks
from fastgrpo.training import iterate as run_iteration
from fastgrpo.types import Trajectory
from fastgrpo.unet.copies import Network
from support.sd_pipelines import KINDS, build_pipeline, build_unet, save_folder
from support.training import altered

SENTENCE = "rollout and update differ by up to "


@pytest.fixture(scope="module")
def base(config_file: Path) -> TrainConfig:
    """Two prompts of two images, three steps of which two are learned from: 8 pairs for two optimizer steps."""
    changes = {"group_size": 2, "grpo.std_floor": 1e-9, "grpo.kl": 0.0, "optim.lr": 1e-2, "engine.threads": 1}
    return altered(load_toml(config_file), changes)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a folder: the whole structure, with one layer a level."""
    root, folders = tmp_path_factory.mktemp("pipelines"), {}
    for kind in KINDS:
        pipeline = build_pipeline(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline.unet = build_unet(kind, layers_per_block=1).eval()
        folders[kind] = save_folder(pipeline, root / kind)
    return folders


def load(
    config: TrainConfig, said: list[str] | None = None, threads: int = 1, record: EngineRecord | None = None
) -> Training:
    return load_training(config, threads, record=record, say=(said if said is not None else []).append)


def iterate(training: Training, iteration: int) -> float:
    """How far a ratio was from 1 before the policy moved."""
    return run_iteration(training, iteration, Console())["ratio/max_abs_dev_first"]


def weights(training: Training) -> torch.Tensor:
    return training.trainable.optimizer.weights.values.clone()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank", "workers"), [("sd1", 0, 1), ("sd1", 2, 2), ("sd2", 0, 2), ("sd2", 2, 1)])
def test_a_ratio_is_1_until_the_policy_moves(
    base: TrainConfig, pipelines: dict[str, Path], kind: str, rank: int, workers: int
) -> None:
    """Each iteration begins with the rollout's numbers. In the first one adapters change nothing yet.

    8 pairs are learned from together, in fours, as 3 + 3 + 2 and one by one; 4 samples are drawn together or in twos.
    """
    model = {"model.path": str(pipelines[kind]), "model.lora_rank": rank, "model.lora_alpha": 4.0 * rank}
    config = altered(base, model | {"iterations": 5, "updates_per_iteration": 1, "micro_batch": 32})
    training = load(config, threads=workers)
    for iteration, micro_batch in enumerate((32, 4, 3, 1, 32), start=1):
        before = weights(training)
        training.engine.micro_batch, training.engine.old_log_prob = micro_batch, "rollout"
        assert iterate(training, iteration) <= 1e-6, micro_batch
        # AdamW moves what has a gradient by about lr.
        assert (weights(training) - before).abs().max() > 1e-3


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A UNet whose output is off by `by` for each row: passes of another size see another policy. `by` may be set."""
    forward, error = Policy.forward, {"by": 1e-5}

    def by_rows(self: Policy) -> Network:
        network = forward.fget(self)
        return lambda latents, *rest, **options: (
            network(latents, *rest, **options)[0] * (1 + error["by"] * len(latents)),
        )

    monkeypatch.setattr(Policy, "forward", property(by_rows))
    return error


FIXED = {"engine.graphs": "on", "rollout.batch": 2, "micro_batch": 3}


@pytest.mark.parametrize("changes", [{"micro_batch": 3}, FIXED, {"micro_batch": 3, "grpo.ratio_norm": True}], ids=str)
def test_where_the_rollouts_numbers_are_not_the_updates_it_goes_on_with_its_own(
    base: TrainConfig, changes: dict[str, object], rounding: dict[str, float]
) -> None:
    """To the very bit as if `replay` had been asked for, from this update on."""
    said: list[str] = []
    config = altered(base, changes)
    training, asked = load(config, said), load(altered(config, {"grpo.old_log_prob": "replay"}))
    assert training.record.old_log_prob == "rollout"
    for iteration in (1, 2):
        assert iterate(training, iteration) == 0.0
        assert training.engine.old_log_prob == training.record.old_log_prob == "replay"
        assert iterate(asked, iteration) == 0.0
        assert torch.equal(weights(training), weights(asked))
    (line,) = [line for line in said if line.startswith(SENTENCE)]
    apart = float(line.removeprefix(SENTENCE).split()[0])
    assert apart > CPU_AGREEMENT
    assert "at most 1e-06 is allowed" in line


def test_numbers_that_agree_well_enough_are_kept(base: TrainConfig, rounding: dict[str, float]) -> None:
    """As they were drawn, and so the ratio before the first step is not 1 by definition."""
    rounding["by"] = 0.0
    config, said = altered(base, {"micro_batch": 2}), []
    training = load(config, said)
    training.engine.allowed = 1e-2
    rounding["by"] = 1e-5
    assert 0.0 < iterate(training, 1) <= 1e-2
    assert training.engine.old_log_prob == "rollout"
    assert not any(line.startswith(SENTENCE) for line in said)


@pytest.mark.parametrize("after", [1, 2], ids=["before the switch", "after it"])
def test_a_run_resumed_on_either_side_of_the_switch_goes_on_bit_for_bit(
    base: TrainConfig, after: int, rounding: dict[str, float], tmp_path: Path
) -> None:
    """Passes begin to differ in iteration 2 of 3, by more than any CPU's rounding, which is allowed."""
    config = altered(base, {"iterations": 3, "micro_batch": 3, "optim.ema": 0.5})

    def run(training: Training, iterations: range) -> None:
        training.engine.allowed = 1e-3
        for iteration in iterations:
            rounding["by"] = 1e-2 if iteration > 1 else 0.0
            iterate(training, iteration)

    whole, cut = load(config), load(config)
    run(whole, range(1, 4))
    run(cut, range(1, after + 1))
    assert cut.record.old_log_prob == ("rollout" if after == 1 else "replay")
    state = TrainerState(after, config.seed, 0.0, 1, {}, processes=1, engine=cut.record.to_json())
    checkpoint.save(tmp_path, cut.trainable, state, keep=1)
    said: list[str] = []
    kept = checkpoint.read_state(recover(tmp_path))
    resumed = load(config, said, record=EngineRecord(**kept.engine))
    checkpoint.load(recover(tmp_path), resumed.trainable)
    run(resumed, range(after + 1, 4))
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.trainable.optimizer.weights.ema, whole.trainable.optimizer.weights.ema)
    assert resumed.record.old_log_prob == whole.record.old_log_prob == "replay"
    assert sum(line.startswith(SENTENCE) for line in said) == (1 if after == 1 else 0)


@pytest.mark.parametrize(("updates", "recomputed"), [(1, 0), (2, 4), (4, 6)])
def test_a_replay_recomputes_no_pair_of_the_first_step(
    base: TrainConfig, updates: int, recomputed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recompute, seen = PolicyLoss.recompute, []

    def counted(self: PolicyLoss, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(batch))
        return recompute(self, batch)

    monkeypatch.setattr(PolicyLoss, "recompute", counted)
    config = altered(base, {"grpo.old_log_prob": "replay", "updates_per_iteration": updates})
    training = load(config)
    assert iterate(training, 1) == 0.0
    assert sum(seen) == recomputed, "of 8 pairs"


@dataclass(frozen=True)
class _BesideAnother(Ranks):
    """Another process, whose ratios are off by `apart`, and which halved a size."""

    apart: float = 0.0
    resized: bool = False

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.full_like(tensor, self.apart)])

    def any(self, flag: bool) -> bool:
        return flag or self.resized


@pytest.mark.parametrize(
    ("ratios", "other", "resized", "mistaken", "mode"),
    [
        ([1.0, 1.0], 0.0, False, False, "rollout"),
        ([1.0, 1.0 - 9e-7], 0.0, False, False, "rollout"),
        ([1.0, 1.0 - 2e-6], 0.0, False, True, "replay"),
        ([1.0], 1e-3, False, True, "replay"),
        ([], 1e-3, False, True, "replay"),
        ([], 0.0, False, False, "rollout"),
        ([1.1], 0.0, True, True, "rollout"),
        ([float("inf")], 0.0, False, True, "replay"),
        ([float("nan")], 0.0, False, False, "rollout"),
    ],
)
def test_all_processes_decide_alike(
    base: TrainConfig, ratios: list[float], other: float, resized: bool, mistaken: bool, mode: str
) -> None:
    """One process is enough.

    Where one halved a size this update alone is a replay: the engine's own way is as it was.
    """
    engine = load(base).engine
    ones = torch.ones(len(ratios))
    outcomes = [PairResults(torch.tensor(ratios), ones, ones, None)] if ratios else []
    trajectory = Trajectory(torch.zeros(4, 4, 4, 8, 8), torch.zeros(3, 4), images=torch.zeros(4, 3, 16, 16))
    engine.ranks = _BesideAnother(apart=other, resized=resized)
    old = OldPolicy(engine, Experience(None, trajectory, None, None, None, None))
    assert old.mistaken(outcomes) == mistaken
    assert engine.old_log_prob == mode
    assert (old.remembered is None) == mistaken
    old.moved = True
    assert not old.mistaken(outcomes), "afterwards a ratio says what was learned"
