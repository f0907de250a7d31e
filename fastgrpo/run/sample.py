"""What `python -m fastgrpo.sample` does: draw the same prompts and seeds with a run's base and its trained model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from fastgrpo import rollout
from fastgrpo.models.check import describe
from fastgrpo.policy import Policy, load_policy
from fastgrpo.prompts import embed, load_prompts, truncation_lines
from fastgrpo.prompts.files import TABLE_SUFFIXES, one_line, read_lines
from fastgrpo.run.checkpoint import load_unet
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.commands import Sample
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.devices import choose_device, choose_dtype
from fastgrpo.system.errors import ConfigError, blaming
from fastgrpo.system.files import write_atomically
from fastgrpo.system.finite import PictureSource
from fastgrpo.system.pictures import grid, side_by_side, write_image, write_png
from fastgrpo.system.workers import available_cores
from fastgrpo.types import POSITIVE, Prompt

PROMPTS_PER_LABEL = 4  # of the run's own
HEADINGS = "base", "tuned"


def sample(command: Sample, config: TrainConfig, folder: Path, console: Console) -> None:
    """Draw with both models, write the comparison and, where asked for, the images, and say where they are.

    Arguments and exceptions are those of `draw`; raises OSError too, where they cannot be written.
    """
    prompts, drawn = draw(command, config, folder, console)
    output = command.comparison  # only now: another comparison may have been written meanwhile
    output.parent.mkdir(exist_ok=True)
    base, tuned = drawn.values()
    write_png(output, side_by_side(grid(base, prompts), grid(tuned, prompts), HEADINGS))
    console.say(f"weights   {folder}, {command.weights}", f"pictures  {output}")
    if command.images:
        command.images.mkdir(exist_ok=True)
        count = command.images_per_prompt
        for name, images in drawn.items():
            for index, image in enumerate(images):  # NAME-PROMPT-IMAGE.png, both numbered from 1
                write_image(command.images / f"{name}-{index // count + 1:04d}-{index % count + 1}.png", image)
        texts = "".join(f"{prompt.text}\n" for prompt in prompts)
        write_atomically(command.images / "prompts.txt", texts.encode())
        console.say(f"images    {command.images}, {count * len(prompts)} of each")


def draw(
    command: Sample, config: TrainConfig, folder: Path, console: Console
) -> tuple[list[Prompt], dict[str, Tensor]]:
    """Draw with both models. Returns the R prompts, and K images of each: one of HEADINGS -> [R * K, 3, h, w] float32.

    config: of the run. folder: of the checkpoint to draw with.
    Raises ConfigError before anything is loaded where that is possible, and BrokenPicture for what is not finite.
    """
    prompts = _prompts(command, config)
    device = choose_device(command.device)
    with blaming(command.run / "config.toml"):
        description = describe(config.model)
    console.say(*description.notes)
    steps = config.eval.steps or config.rollout.steps if command.steps is None else command.steps
    eta = config.rollout.eta if command.eta is None else command.eta
    rescale = config.rollout.guidance_rescale
    schedule = make_schedule(description.scheduler, steps, eta, device, "--steps", guidance_rescale=rescale)

    disable_progress_bar()  # one per file read, gone in a blink
    torch.set_num_threads(1)  # each of the policy's workers is a thread already
    workers = available_cores() if device.type == "cpu" else 1
    with console.waiting("loading"), blaming(command.run / "config.toml"):
        policy = load_policy(config.model, device, choose_dtype(command.dtype, device), workers)
    console.say(*truncation_lines([prompt.text for prompt in prompts], policy.tokenizer))
    guidance = config.rollout.guidance if command.guidance is None else command.guidance
    base, tuned = HEADINGS
    drawn = {base: _draw(base, policy.rounded(), prompts, schedule, guidance, command, console)}
    with blaming(command.run / "config.toml"):
        load_unet(policy.unet, folder, command.weights, config.model)
    return prompts, drawn | {tuned: _draw(tuned, policy.rounded(), prompts, schedule, guidance, command, console)}


def _prompts(command: Sample, config: TrainConfig) -> list[Prompt]:
    """What to draw, in order. Raises ConfigError."""
    prompts = [Prompt(one_line(text), POSITIVE) for text in command.prompts]
    if command.prompt_file:
        if command.prompt_file.suffix.lower() in TABLE_SUFFIXES:
            why = "this is a table; accepted is a text file with one prompt per line"
            raise ConfigError.of("--prompt-file", command.prompt_file, why)
        prompts += read_lines(command.prompt_file, POSITIVE, "--prompt-file")
    if prompts:
        return prompts
    with blaming(command.run / "config.toml"):
        positives, negatives = load_prompts(config.prompts)
    return [*positives[:PROMPTS_PER_LABEL], *negatives[:PROMPTS_PER_LABEL]]


def _draw(
    label: str,
    policy: Policy,
    prompts: Sequence[Prompt],
    schedule: Schedule,
    guidance: float,
    command: Sample,
    console: Console,
) -> Tensor:
    """Draw K images of each of R prompts: [R * K, 3, h, w] float32 in [0, 1] on the CPU, a prompt's in a row."""
    count, batch = command.images_per_prompt, command.batch
    embeds = embed(policy, prompts, {}).embeds.repeat_interleave(count, dim=0)
    seeds = [command.seed + k for _ in prompts for k in range(count)]
    requests = [
        PictureSource(f"the {label} model's image {k + 1}", prompt.text) for prompt in prompts for k in range(count)
    ]
    drawn = []
    with console.bar(label, len(seeds)) as bar:
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            images = rollout.draw_images(
                policy, embeds[part], schedule, guidance, seeds[part], batch, batch, requests=requests[part]
            )
            drawn.append(images.cpu())
            bar.advance(len(images))
    return torch.cat(drawn)
