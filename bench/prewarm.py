"""`python bench/prewarm.py` fills Triton's cache, on all cores, with the kernels of an iteration of the paper's shapes.

What is launched is recorded here and now, from the engine's own passes over tensors without memory: a second for each
size of micro-batch, no device, and never out of date. `--architecture 90` is for compute capability 9.0.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is forked below must not have met a device

import fastgrpo  # noqa: F401  (prepares the imports below)

# isort: split
import torch
from kernel_launches import KernelLaunch, compile_launches, recording
from workload import GIVEN, altered, paper, random_policy

from fastgrpo.costs.counting import sd1_architecture
from fastgrpo.costs.memory import candidates, iteration_of
from fastgrpo.engine.sampler import Sampler
from fastgrpo.engine.setup import decoded_at_once
from fastgrpo.engine.trainable import make_trainable
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.grpo.micro_batch import blank_batch
from fastgrpo.grpo.steps import pairs_per_iteration
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.unet.fused import patch_unet

META = torch.device("meta")
DTYPE = torch.bfloat16
LEAST = 8
"""Pairs: smaller micro-batches are not tried where larger ones fit."""


def sizes() -> list[int]:
    """The micro-batches that the search may try, and the one that is given to an iteration that is not to search."""
    config = paper()
    schedule = _schedule(config)
    work = iteration_of(config, len(schedule), pairs_per_iteration(config, schedule), processes=1)
    found = {GIVEN, *(size for size in candidates(work) if size >= LEAST)}
    return sorted(found, key=lambda size: abs(size - GIVEN))


def launches_of(size: int, say: Callable[[str], object]) -> dict[tuple, KernelLaunch]:
    """Of a denoising step, decoding, a micro-batch of `size` pairs with its backward pass, and an optimizer step."""
    config, about = altered(paper(), micro_batch=size), sd1_architecture()
    policy = random_policy(about, META, DTYPE)
    trainable = make_trainable(policy.unet, config, META, DTYPE)
    patch_unet(trainable.network)
    patch_unet(policy.vae.to(memory_format=torch.channels_last).decoder)
    policy = replace(policy, network=trainable.network)
    schedule = _on_meta(_schedule(config))
    loss = PolicyLoss(policy, schedule, config, trainable.trained)
    batch = blank_batch(policy, config, size)
    sampler = Sampler(policy, schedule, config.rollout.guidance)
    contexts = policy.contexts(batch.embeds, sampler.guidance)

    samples = config.prompts_per_iteration * config.group_size
    latents = torch.empty(samples, *policy.latent_shape, device=META)

    def decode() -> None:
        for count in decoded_at_once(samples, size, config):
            policy.decode(latents[:count])

    def learn() -> None:
        """Beside the policy as it is, and beside the one that drew the rollout."""
        for old in (None, torch.zeros(size, device=META)):
            loss.learn(replace(batch, old_log_prob=old), trainable.optimizer.weights.accumulate)

    parts = {
        "learn": learn,
        "step": lambda: sampler.step(batch.latents, batch.latents, batch.step[:1], contexts),
        "decode": decode,
        "recompute": lambda: loss.recompute(batch),
        "optimizer": lambda: trainable.step(config.optim.max_grad_norm),
    }
    with recording() as found:
        for name, call in parts.items():
            try:
                call()
            except Exception as error:  # the others' kernels are worth having
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                say(f"{name} of {size} pairs is not recorded: {reason}")
    return found


def _schedule(config: TrainConfig) -> Schedule:
    return make_schedule(sd1_architecture().scheduler, config.rollout.steps, config.rollout.eta, torch.device("cpu"))


def _on_meta(schedule: Schedule) -> Schedule:
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    return replace(schedule, **{name: t.to(META) for name, t in values.items() if isinstance(t, torch.Tensor)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--processes", type=int, default=0, help="cores to use (default: all)")
    options = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    launches: dict[tuple, KernelLaunch] = {}
    for size in sizes():
        launches |= launches_of(size, say)
        say(f"micro-batches of {size} pairs: {len(launches)} launches so far")
    failures = list(_failures(compile_launches(list(launches.values()), options.architecture, options.processes), say))
    say(f"{len(launches) - len(failures)} of {len(launches)} kernels are in Triton's cache")


def _failures(done: Iterator[tuple[KernelLaunch, str]], say: Callable[[str], object]) -> Iterator[KernelLaunch]:
    for launch, reason in done:
        if reason:
            say(f"{launch.name} of {launch.module}: {reason}")
            yield launch


if __name__ == "__main__":
    main()
