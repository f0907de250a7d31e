"""`python -m fastgrpo.sample RUN`: the command line of drawing with a run's models; run/sample.py does it."""

import math
import sys
from collections.abc import Sequence

from fastgrpo.run.find import find_checkpoint, read_run
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.commands import Sample
from fastgrpo.settings.schema import DIFFUSION_STEPS
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import require, require_between
from fastgrpo.system.files import check_new_file, check_new_folder, check_writable

PROGRAM = "python -m fastgrpo.sample"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Sample as the command line says. program: what --help calls the command.

    Returns the exit code: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        asked = parse_flags(Sample, sys.argv[1:] if argv is None else argv, program)
        config = read_run(asked.run)
        _check(asked)
        folder = find_checkpoint(asked.run, asked.checkpoint, asked.weights)
        from fastgrpo.run.sample import sample  # only now: it takes seconds

        sample(asked, config, folder, Console())

    return run_command(command, "no comparison was written")


def _check(command: Sample) -> None:
    """Refuse what would come to nothing, before anything is loaded."""
    output = command.comparison
    require_between(1, math.inf, "--images-per-prompt", command.images_per_prompt)
    require_between(1, math.inf, "--batch", command.batch)
    require_between(1, math.inf, "--guidance", command.guidance)
    require_between(1, DIFFUSION_STEPS, "--steps", command.steps)
    require_between(0, 2**63 - 1, "--seed", command.seed)
    require(command.eta is None or 0 < command.eta <= 1, "--eta", command.eta, "above 0 and at most 1")
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
