"""Folders of runs that cannot be used, resumed or written, and trainings that cannot go on."""

from collections.abc import Callable

import pytest
import torch

from support.mistakes import (
    A_RUN,
    GO_ON_FROM,
    NO_MEMORY,
    TRAIN,
    WEIGHTS,
    Mistake,
    dry,
    edited,
    file_size_limit,
    finished_run,
    goes_on,
    in_use,
    linked,
    metrics_of,
    mistakes,
    raises,
    room_left,
    written,
)

NEW_OR_EMPTY = "accepted is a folder that is new or empty"
RESUMED = ("run/config.toml", "run/metrics.jsonl", "run/samples/*", "run/tensorboard/*")
RUNS = [
    Mistake(
        "run in use",
        TRAIN,
        "run = 'run': another process is training in this folder.",
        given=(in_use,),
    ),
    Mistake(
        "run not empty",
        TRAIN,
        f"run = 'run': {NEW_OR_EMPTY}; to go on with the run in it, say --resume run.",
        given=(finished_run,),
    ),
    Mistake("file for a run", TRAIN, f"run = 'run': this is a file; {NEW_OR_EMPTY}.", {"run": "mine"}),
    Mistake(
        "no permission",  # not even root's
        "tiny.toml --run /proc/nothing/run",
        f"run = '/proc/nothing/run': cannot be written (...); {NEW_OR_EMPTY}.",
    ),
    Mistake("resume without a run", "--resume", "Missing value for argument '--resume', ...; --help lists every flag."),
    Mistake(
        "resume of no run",
        "--resume run",
        "--resume run: there is no config.toml in it, so it is not a run that can go on.",
        {"run/metrics.jsonl": ""},
    ),
    Mistake(
        "resume with another flag",
        "--resume run --seed 3",
        "--seed: a resumed run keeps what decides its result; with --resume --iterations, ... and --log.* are "
        "accepted.",
        given=(finished_run,),
    ),
    Mistake(
        "resume with an unknown flag",
        "--resume run --micro-bach 3",
        "--micro-bach: no such flag (did you mean --micro-batch?); --help lists them all.",
        given=(finished_run,),
    ),
    Mistake(
        "config that extends itself",
        "a.toml",
        'a.toml: extends = "a.toml": a circle; accepted is a file that does not extend this one.',
        {"a.toml": 'extends = "a.toml"'},
    ),
    Mistake(
        "fewer iterations",
        "--resume run --iterations 1",
        "iterations = 1: a resumed run accepts 2, its own, or more.",
        given=(finished_run,),
    ),
    Mistake(
        "resume in use",
        "--resume run",
        "run = 'run': another process is training in this folder.",
        given=(finished_run, in_use),
    ),
    Mistake(
        "damaged checkpoint",
        "--resume run --iterations 3",
        f"run/checkpoints/iter-000002/{WEIGHTS} is damaged (its sha256 is not the manifest's); there is no earlier "
        "good checkpoint: to start from the beginning, remove run/checkpoints/iter-000002 and "
        "run/checkpoints/iter-000001.",
        given=(finished_run, *(written(f"run/checkpoints/iter-00000{n}/{WEIGHTS}", b"short") for n in (1, 2))),
    ),
    Mistake(
        "checkpoint of another model",
        "--resume run --iterations 3",
        "run/checkpoints/iter-000002 does not fit the model that the run's config.toml describes; accepted is the one "
        "it began with.",
        given=(finished_run, edited("run/config.toml", "lora_rank = 0", "lora_rank = 2")),
        loaded="model",
        leaves=("run/config.toml", "run/tensorboard/*"),
    ),
    Mistake(
        "resume with damaged metrics",
        "--resume run --iterations 3",
        "run/metrics.jsonl is damaged (JSONDecodeError: ...).",
        given=(finished_run, written("run/metrics.jsonl", b'{"iteration": 1,\n')),
        loaded="model",
        leaves=("run/config.toml",),
    ),
    Mistake(
        "disk full at the metrics",
        "--resume run --iterations 3",
        f"run/metrics.jsonl: File too large; {GO_ON_FROM}.",
        given=(finished_run, metrics_of(100_000), file_size_limit(100_100)),
        code=1,
        loaded="model",
        leaves=RESUMED,
        after=goes_on,
    ),
    Mistake(
        "disk full at a checkpoint",  # metrics and pictures are below 200 kB, the UNet is above
        "--resume run --iterations 3",
        f"run/checkpoints/iter-000003...: ...; {GO_ON_FROM}.",
        given=(finished_run, file_size_limit(200_000)),
        code=1,
        loaded="model",
        leaves=RESUMED,
        after=goes_on,
    ),
    Mistake(
        "no room for a checkpoint",
        "--resume run --iterations 3",
        f"run/checkpoints/iter-000003: No space left on device, ... MB are needed and 2.0 MB are free; {GO_ON_FROM}.",
        given=(finished_run, room_left(2_000_000)),
        code=1,
        loaded="model",
        leaves=RESUMED,
        after=goes_on,
    ),
    Mistake(
        "disk full at the start",
        TRAIN,
        "run/config.toml: No space left on device; there is no checkpoint yet.",
        given=(linked("run/config.toml.partial", "/dev/full"),),
        code=1,
        loaded="model",
    ),
    Mistake(
        "diverging",
        TRAIN + "--optim.lr 1e30",
        "iteration 1, optimizer step 2: the loss of sample ... of 3 of prompt ... at denoising step ... is not "
        "finite; what is known is in run/not_finite/iter-000001-step-02-loss.json and the .safetensors file "
        "beside it; there is no checkpoint yet.",
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/not_finite/*"),
    ),
    Mistake(
        "GPU's memory full",
        TRAIN,
        "the GPU's memory is full: lower micro_batch, rollout.batch, rollout.decode_batch or reward.batch; there is no "
        "checkpoint yet.",
        given=(raises("fastgrpo.training.rollout", torch.OutOfMemoryError("CUDA out of memory")),),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "memory full",
        TRAIN,
        "the memory is full: lower micro_batch, rollout.batch, rollout.decode_batch or reward.batch; there is no "
        "checkpoint yet.",
        given=(raises("fastgrpo.training.rollout", RuntimeError(NO_MEMORY)),),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "memory full while loading",
        TRAIN,
        "the memory is full: lower ...; there is no checkpoint yet.",
        given=(raises("fastgrpo.assembly.load_policy", MemoryError()),),
        code=1,
        loaded="encoder",
    ),
    Mistake(
        "Ctrl-C while loading",
        TRAIN,
        "stopped; no iteration was begun.",
        given=(raises("fastgrpo.assembly.load_policy", KeyboardInterrupt()),),
        code=130,
        loaded="encoder",
    ),
]


DRY_RUNS = [
    *dry(
        RUNS,
        *("run in use", "run not empty", "file for a run", "no permission", "damaged checkpoint"),
        *("checkpoint of another model", "resume with damaged metrics"),
    ),
    Mistake(
        "dry run: no room for a checkpoint",
        TRAIN + "--dry-run",
        "run/checkpoints/iter-000001: No space left on device, ... MB are needed and 2.0 MB are free; no iteration was "
        "begun.",
        given=(room_left(2_000_000),),
        code=1,
        loaded="model",
    ),
]


@pytest.mark.slow
@mistakes(*RUNS, *DRY_RUNS)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
