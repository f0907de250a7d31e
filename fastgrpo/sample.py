"""`python -m fastgrpo.sample RUN`: the same prompts and seeds, drawn by a run's base model and by what it became."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from fastgrpo import rollout
from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.console import Console, run_command
from fastgrpo.engine.workers import available_cores
from fastgrpo.files import write_atomically
from fastgrpo.finite import Request
from fastgrpo.models.check import describe
from fastgrpo.pictures import grid, side_by_side, write_image, write_png
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts import embed, load_prompts, truncation_lines
from fastgrpo.prompts.files import one_line, read_lines
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings import parse_flags
from fastgrpo.tuned import Weights, blaming_config, check_writable, find_checkpoint, load_unet, read_run
from fastgrpo.types import POSITIVE, Prompt
from fastgrpo.validation import DIFFUSION_STEPS

PROGRAM = "python -m fastgrpo.sample"
PROMPTS_PER_LABEL = 4  # of the run's own
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Sample:
    """Draw prompts with a run's base model and with what it was trained to, from the same seeds, side by side.

    Image i (1, 2, ...) of every prompt is drawn from the seed `--seed` + i - 1, so it depends on its own prompt and
    seed alone, whatever else is drawn.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, finished or not."""
    prompts: tuple[str, ...] = ()
    """What to draw; without this and --prompt-file, the first four of the run's own positive and negative prompts."""
    prompt_file: Path | None = None
    """Text file with one prompt per line, drawn after --prompts."""
    images_per_prompt: int = 4
    """Images of each prompt and model."""
    seed: int = 0
    """Seed of every prompt's first image."""
    checkpoint: int | None = None
    """Iteration of the checkpoint to draw with; None is the newest."""
    weights: Weights = "trained"
    """`trained`, or `ema`, the moving average that runs with optim.ema keep."""
    steps: int | None = None
    """DDIM steps; None is the number that the run's own pictures have."""
    guidance: float | None = None
    """Classifier-free guidance scale; None is the run's."""
    eta: float | None = None
    """DDIM eta, above 0 and at most 1; None is the run's."""
    batch: int = 16
    """Images drawn at once."""
    output: Path | None = None
    """PNG of the comparison; None is RUN/samples/compare.png."""
    images: Path | None = None
    """Folder for every image as a file of its own, base-0003-2.png and tuned-0003-2.png for the second of the third prompt, and prompts.txt; files of these names are replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the UNet computes in. `auto`: bf16 on CUDA, fp32 on CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Sample as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        sample(parse_flags(_Sample, sys.argv[1:] if argv is None else argv, PROGRAM), Console())

    return run_command(command, "no comparison was written")


def sample(command: _Sample, console: Console) -> None:
    """Draw with both models, write the comparison and, where asked for, the images, and say where they are.

    Raises ConfigError before anything is loaded where that is possible, and OSError where it cannot be written.
    """
    config = read_run(command.run)
    output = command.output or command.run / "samples" / "compare.png"
    _check(command, output)
    prompts = _prompts(command, config)
    device = _device(command.device)
    schedule = _schedule(command, config, device)
    folder = find_checkpoint(command.run, command.checkpoint, command.weights)

    disable_progress_bar()  # one per file read, gone in a blink
    torch.set_num_threads(1)  # each of the policy's workers is a thread already
    workers = available_cores() if device.type == "cpu" else 1
    with blaming_config(command.run):
        policy = load_policy(config.model, device, _dtype(command.dtype, device), workers)
    console.say(*truncation_lines([prompt.text for prompt in prompts], policy.tokenizer))
    guidance = config.rollout.guidance if command.guidance is None else command.guidance
    base = _draw("base", policy.rounded(), prompts, schedule, guidance, command, console)
    with blaming_config(command.run):
        load_unet(policy.unet, folder, command.weights, config.model)
    tuned = _draw("tuned", policy.rounded(), prompts, schedule, guidance, command, console)

    headings = "base", "tuned"
    output.parent.mkdir(exist_ok=True)
    write_png(output, side_by_side(grid(base, prompts), grid(tuned, prompts), headings))
    console.say(f"weights   {folder}, {command.weights}", f"pictures  {output}")
    if command.images:
        command.images.mkdir(exist_ok=True)
        for name, images in zip(headings, (base, tuned), strict=True):
            _write_images(command.images, name, images, command.images_per_prompt)
        texts = "".join(f"{prompt.text}\n" for prompt in prompts)
        write_atomically(command.images / "prompts.txt", texts.encode())
        console.say(f"images    {command.images}, {len(base)} of each")


def _check(command: _Sample, output: Path) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    for flag, value, low, high in (
        ("--images-per-prompt", command.images_per_prompt, 1, math.inf),
        ("--batch", command.batch, 1, math.inf),
        ("--guidance", command.guidance, 1, sys.float_info.max),
        ("--steps", command.steps, 1, DIFFUSION_STEPS),
        ("--seed", command.seed, 0, 2**63 - 1),
    ):
        if value is not None and not low <= value <= high:
            up_to = f"to {high}" if type(high) is int else "or more"
            raise ConfigError(f"{flag} {value}: accepted is {low} {up_to}.")
    if command.eta is not None and not 0 < command.eta <= 1:
        raise ConfigError(f"--eta {command.eta}: accepted is above 0 and at most 1.")
    if output.suffix.lower() != ".png" or output.is_dir():
        raise ConfigError(f"--output {output}: accepted is the name of a file that ends in .png.")
    made = command.output is None and not output.parent.exists()
    check_writable(f"--output {output}", command.run if made else output.parent)
    if command.images:
        exists = command.images.exists()
        check_writable(f"--images {command.images}", command.images if exists else command.images.absolute().parent)


def _prompts(command: _Sample, config: TrainConfig) -> list[Prompt]:
    """What to draw, in order. Raises ConfigError."""
    prompts = [Prompt(one_line(text), POSITIVE) for text in command.prompts]
    if command.prompt_file:
        try:
            prompts += read_lines(command.prompt_file, POSITIVE)
        except ConfigError as error:
            # Of the run's settings it is none.
            raise ConfigError(str(error).replace(f"prompts.{POSITIVE}", "--prompt-file", 1)) from error
    if prompts:
        return prompts
    with blaming_config(command.run):
        positives, negatives = load_prompts(config.prompts)
    return [*positives[:PROMPTS_PER_LABEL], *negatives[:PROMPTS_PER_LABEL]]


def _schedule(command: _Sample, config: TrainConfig, device: torch.device) -> Schedule:
    """The steps to take, from the base model's configs alone."""
    with blaming_config(command.run):
        scheduler = describe(config.model).scheduler
    steps = config.eval.steps or config.rollout.steps if command.steps is None else command.steps
    eta = config.rollout.eta if command.eta is None else command.eta
    return make_schedule(scheduler, steps, eta, device, "--steps")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device here; accepted are auto and cpu.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def _draw(
    label: str,
    policy: Policy,
    prompts: Sequence[Prompt],
    schedule: Schedule,
    guidance: float,
    command: _Sample,
    console: Console,
) -> Tensor:
    """[R * K, 3, h, w] float32 in [0, 1] on the CPU: of each prompt K images in a row."""
    count = command.images_per_prompt
    embeds = embed(policy, prompts, {}).embeds.repeat_interleave(count, dim=0)
    seeds = [command.seed + k for _ in prompts for k in range(count)]
    requests = [Request(f"the {label} model's image {k + 1}", prompt.text) for prompt in prompts for k in range(count)]
    drawn = []
    with console.bar(label, len(seeds)) as bar:
        for start in range(0, len(seeds), command.batch):
            part = slice(start, start + command.batch)
            images = rollout.sample(
                policy,
                embeds[part],
                schedule,
                guidance,
                seeds[part],
                command.batch,
                command.batch,
                requests=requests[part],
            )
            drawn.append(images.cpu())
            bar.advance(len(images))
    return torch.cat(drawn)


def _write_images(folder: Path, name: str, images: Tensor, count: int) -> None:
    """Every image as NAME-PROMPT-IMAGE.png, both numbered from 1; `count` of each prompt."""
    for index, image in enumerate(images):
        write_image(folder / f"{name}-{index // count + 1:04d}-{index % count + 1}.png", image)


if __name__ == "__main__":
    sys.exit(main())
