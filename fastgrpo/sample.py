"""`python -m fastgrpo.sample RUN`, and the same from Python: drawing with a run's models; run/sample.py does it."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.run.find import find_checkpoint, local_run, read_run
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.commands import Sample
from fastgrpo.settings.schema import DIFFUSION_STEPS
from fastgrpo.settings.toml import from_settings
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError, require, require_between
from fastgrpo.system.files import check_new_file, check_new_folder, check_writable

if TYPE_CHECKING:
    from torch import Tensor

PROGRAM = "python -m fastgrpo.sample"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Sample as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_flags(Sample, sys.argv[1:] if argv is None else argv, program)
        asked = replace(asked, run=local_run(asked.run))
        config = read_run(asked.run)
        _check(asked)
        _check_places(asked)
        folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
        from fastgrpo.run.sample import sample  # only now: it takes seconds

        sample(asked, config, folder, Console())

    return run_command(command, "no comparison was written")


def draw_images(
    run: str | Path, prompts: Sequence[str] = (), settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> "dict[str, Tensor]":
    """Draw prompts with a run's base model and with what it was trained to, from the same seeds; write nothing.

    run: its folder, or hf:OWNER/NAME. prompts: without any, the first of the run's own. settings: other flags of
    `fastgrpo sample`, as in {"images_per_prompt": 2, "seed": 3, "checkpoint": "best"}. quiet: without bars and notes.
    Returns {"base": images, "tuned": images}, both [N * images_per_prompt, 3, h, w] float32 in [0, 1] on the CPU, a
    prompt's in a row. Raises ConfigError for what cannot be, and BrokenPicture for an image that is not finite.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts = {prompts!r}: accepted is a list of texts, also of one.")
    asked = from_settings(Sample, settings, run=local_run(run), prompts=tuple(prompts), output=None, images=None)
    config = read_run(asked.run)
    _check(asked)
    folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
    from fastgrpo.run.sample import draw  # only now: it takes seconds
    from fastgrpo.system.workers import threads_kept

    with threads_kept():
        return draw(asked, config, folder, Console(quiet=quiet))[1]


def _check(command: Sample) -> None:
    """Refuse what cannot be drawn, before anything is loaded."""
    require_between(1, math.inf, "--images-per-prompt", command.images_per_prompt)
    require_between(1, math.inf, "--batch", command.batch)
    require_between(1, math.inf, "--guidance", command.guidance)
    require_between(1, DIFFUSION_STEPS, "--steps", command.steps)
    require_between(0, 2**63 - 1, "--seed", command.seed)
    require(command.eta is None or 0 < command.eta <= 1, "--eta", command.eta, "above 0 and at most 1")


def _check_places(command: Sample) -> None:
    """Refuse what could not be written, before anything is loaded."""
    output = command.comparison
    picture = output.suffix.lower() == ".png" and not output.is_dir()
    require(picture, "--output", output, "the name of a file that ends in .png")
    check_new_file("--output", output)
    made = command.output is None and not output.parent.exists()
    check_writable(f"--output {output}", command.run if made else output.parent)
    if command.images:
        check_new_folder("--images", command.images)
        exists = command.images.exists()
        check_writable(f"--images {command.images}", command.images if exists else command.images.absolute().parent)


if __name__ == "__main__":
    sys.exit(main())
