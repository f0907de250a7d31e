"""What a training says before its first iteration: what is about to happen, and what is not as it was."""

from collections.abc import Mapping
from pathlib import Path

from fastgrpo.assembly import Parts
from fastgrpo.engine.trainable import learning_rate
from fastgrpo.grpo.steps import sampler_line
from fastgrpo.prompts import truncation_lines
from fastgrpo.rewards.axis.report import axis_report
from fastgrpo.run.checkpoint import TrainerState, library_versions
from fastgrpo.run.inputs import changed_inputs
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.distributed import Ranks


def introduce(training: Parts, run: Path, start: TrainerState, console: Console) -> None:
    """Say what is about to happen, and where steering leaves the prompts."""
    config, policy, trainable = training.config, training.policy, training.trainable
    weights = sum(parameter.numel() for parameter in policy.unet.parameters())
    trained = sum(parameter.numel() for parameter in trainable.parameters.values())
    where = f"{policy.workers.count} CPU threads" if policy.device.type == "cpu" else f"{policy.device}"
    console.say(
        f"run {run}",
        f"UNet of {weights:,} parameters, {trained:,} trained, on {where}, {policy.dtype}"
        + (f", {training.ranks.count} processes" if training.ranks.count > 1 else ""),
        f"{config.prompts_per_iteration} prompts x {config.group_size} images an iteration, seed {config.seed}",
        sampler_line(config),
    )
    if training.source.warning:
        console.say(f"warning: {training.source.warning}")
    steering = training.reward.steering
    texts = [prompt.text for prompt in training.prompts]
    console.say(*truncation_lines(texts, policy.tokenizer, steering.encoder.tokenizer if steering else None))
    if steering:
        report = axis_report(steering, training.prompts)
        console.say(*report.lines())
        if report.warning:
            console.say(f"warning: {report.warning}")
    if start.iteration:
        console.say(f"resuming after iteration {start.iteration} of {config.iterations}")


def differences(config: TrainConfig, start: TrainerState, inputs: Mapping[str, str], ranks: Ranks) -> list[str]:
    """Warnings of what is not as it was when the checkpoint was made. inputs: digests, as they are now."""
    lines = []
    if start.versions != library_versions(config.optim):
        lines.append(f"the checkpoint was made with {start.versions}; results will not be bit for bit the same")
    if start.processes != ranks.count:
        lines.append(f"the checkpoint is of {start.processes} processes; sums will be rounded otherwise")
    lines += [
        f"{name} is another than until iteration {start.iteration}, and so is what is learned from here on"
        for name in changed_inputs(start.inputs, inputs)
    ]
    if start.iterations not in (0, config.iterations) and config.optim.schedule != "constant":
        lines.append(
            f"with {config.iterations} iterations instead of {start.iterations}, optim.schedule "
            f"{config.optim.schedule} goes on at {learning_rate(config, start.iteration + 1):.3g}, as if there had "
            "been so many from the start; what was learned until here followed the shorter one"
        )
    return [f"warning: {line}" for line in lines]
