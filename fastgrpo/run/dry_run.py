"""What `--dry-run` does: all that a training loads and checks before its first pass, what it would do, and no more."""

from dataclasses import replace
from pathlib import Path

from fastgrpo.assembly import Parts, load_parts
from fastgrpo.costs.estimate import Plan, make_plan
from fastgrpo.engine.batch_size import memory_room
from fastgrpo.engine.record import EngineRecord
from fastgrpo.run import checkpoint
from fastgrpo.run.checkpoint import checkpoint_folder
from fastgrpo.run.folder import check_claim
from fastgrpo.run.inputs import input_digests
from fastgrpo.run.introduction import differences, introduce
from fastgrpo.run.metrics import read_metrics
from fastgrpo.run.recovery import find_good
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console, warn
from fastgrpo.system.distributed import join
from fastgrpo.system.files import reading
from fastgrpo.system.watchdog import OthersEnded
from fastgrpo.types import NEGATIVE


def dry_run(config: TrainConfig, preset: str, resumed: Path | None) -> int:
    """Check all that `training.start` with the same arguments would, and say what it would do. Returns the exit code.

    Nothing is written but what the hub's client keeps of what it downloads. Raises ConfigError, and OSError where a
    checkpoint would not fit on the disk.
    """
    run = resumed or Path(config.run or f"runs/{preset}-DATE-TIME")
    try:
        with join(config.engine.device, config.engine.stuck_after) as ranks:
            if ranks.first:
                check_claim(run, resumed is not None)
            ranks.agree("the folder is free")
            console = Console(quiet=not ranks.first)
            with console.waiting("loading"):
                newest, damaged = find_good(run)
                if damaged and ranks.first:
                    warn(f"{damaged}: the run would set aside what is damaged and go on from {newest}")
                start = checkpoint.read_state(newest) if newest else checkpoint.beginning(config, ranks.count)
                threads = config.engine.threads or start.threads
                parts = load_parts(config, threads, ranks, EngineRecord(**start.engine), console.say)
                introduce(parts, run, start, console)
                console.say(*differences(config, start, input_digests(config, parts) if newest else {}, ranks))
                if newest:
                    checkpoint.load(newest, parts.trainable)
                    with reading(run / "metrics.jsonl"):
                        read_metrics(run / "metrics.jsonl")
            checkpoint.check_room(checkpoint_folder(run, config.iterations), parts.trainable)
            with console.bar("counting"):
                plan = _plan(parts)
            console.say("", *plan.memory_lines(str(parts.policy.device)))
            # On a CPU nothing is decided about memory; the rest was said while the parts were loaded.
            decided = plan.reasons[-1:] if parts.policy.device.type == "cuda" else ()
            console.say(*(f"  {line}" for line in (plan.sized, *decided)), *plan.left_out)
            console.say("", *_summary(parts, plan, run, start.iteration))
            return 0
    except OthersEnded:
        return 1


def _plan(parts: Parts) -> Plan:
    """What `estimate` would compute, for the device that there is."""
    device, engine = parts.policy.device, parts.config.engine
    here = replace(parts.config, engine=replace(engine, device="cuda" if device.type == "cuda" else "cpu"))
    room = memory_room(device, engine.memory) if device.type == "cuda" else 0
    return make_plan(here, parts.description, parts.policy.dtype, parts.ranks.count, room)


def _summary(parts: Parts, plan: Plan, run: Path, done: int) -> list[str]:
    """done: iterations before."""
    config = parts.config
    left, images = config.iterations - done, config.prompts_per_iteration * config.group_size
    negative = sum(prompt.label == NEGATIVE for prompt in parts.prompts)
    prompts = f"of {len(parts.prompts) - negative:,} positive and {negative:,} negative prompts"
    every = f"every {config.eval.every} iterations" if config.eval.every else "before and after"
    return [
        *plan.header(),
        f"drawn     {left:,} iterations, {left * images:,} images in {len(parts.schedule)} steps, {prompts}",
        f"learned   in {config.updates_per_iteration} optimizer steps an iteration, {plan.micro_batch} pairs at once",
        f"evaluated {every}; checkpoints every {config.checkpoint.every}, into {run}",
        "All is in order. Nothing was trained or written (--dry-run).",
    ]
