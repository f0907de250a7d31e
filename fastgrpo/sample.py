"""`python -m fastgrpo.sample RUN`: the command line of drawing with a run's models; commands/sample.py does it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgrpo.config import DIFFUSION_STEPS
from fastgrpo.console import Console, run_command
from fastgrpo.errors import ConfigError
from fastgrpo.runs import Weights, check_new_file, check_new_folder, check_writable, find_checkpoint, read_run
from fastgrpo.settings import parse_flags

PROGRAM = "python -m fastgrpo.sample"


@dataclass(frozen=True)
class Sample:
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
    """PNG of the comparison, a new file; None is RUN/samples/compare.png, or compare-2.png and so on after others."""
    images: Path | None = None
    """Folder for every image as a file of its own, base-0003-2.png and tuned-0003-2.png for the second of the third prompt, and prompts.txt; new or empty."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the UNet computes in. `auto`: bf16 on CUDA, fp32 on CPU."""

    @property
    def comparison(self) -> Path:
        """Where the comparison is to be written; by default where no other is by now."""
        folder = self.run / "samples"
        names = (folder / ("compare.png" if number == 1 else f"compare-{number}.png") for number in count(1))
        return self.output or next(path for path in names if not path.exists())


def main(argv: Sequence[str] | None = None) -> int:
    """Sample as the command line says. Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C."""

    def command() -> None:
        asked = parse_flags(Sample, sys.argv[1:] if argv is None else argv, PROGRAM)
        config = read_run(asked.run)
        _check(asked)
        folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
        from fastgrpo.commands.sample import sample  # only now: it takes seconds

        sample(asked, config, folder, Console())

    return run_command(command, "no comparison was written")


def _check(command: Sample) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    output = command.comparison
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
    check_new_file("--output", output)
    made = command.output is None and not output.parent.exists()
    check_writable(f"--output {output}", command.run if made else output.parent)
    if command.images:
        check_new_folder("--images", command.images)
        exists = command.images.exists()
        check_writable(f"--images {command.images}", command.images if exists else command.images.absolute().parent)


if __name__ == "__main__":
    sys.exit(main())
