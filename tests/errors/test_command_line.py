"""Mistakes in the command line itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fastgrpo import __main__, sample
from support.mistakes import Mistake, mistakes

COMMAND_LINE = [
    Mistake("preset", "shaped", "shaped: no such preset (did you mean shapes?); there are ..., or give a FILE.toml."),
    Mistake("config file", "none.toml", "none.toml: there is no such file."),
    Mistake("preset after flags", "--seed 1 ddpo", "ddpo: a preset or FILE.toml comes before the flags."),
    Mistake("one word too many", "shapes more", "Unrecognized options: more; --help lists every flag."),
    Mistake(
        "flag", "--group-sise 4", "--group-sise: no such flag (did you mean --group-size?); --help lists them all."
    ),
    Mistake(
        "flag of a group",
        "--rolout.steps 4",
        "--rolout.steps: no such flag (did you mean --rollout.steps?); --help lists them all.",
    ),
    Mistake(
        "flag without value",
        "--seed",
        "Missing value for argument '--seed', expected 1 values; --help lists every flag.",
    ),
    Mistake("flag's type", "--seed abc", "--seed 'abc': accepted is a whole number; --help lists every flag."),
    Mistake("flag's number", "--optim.lr big", "--optim.lr 'big': accepted is a number; --help lists every flag."),
    Mistake(
        "flag's choice",
        "--reward.mode alway",
        "invalid choice 'alway' for argument '--reward.mode', expected one of ('always', 'unsafe_only', 'projection'); "
        "--help lists every flag.",
    ),
    Mistake(
        "two things instead of training",
        "shapes --dry-run --print-config",
        "--print-config: it does nothing else; accepted is it or --dry-run, one at a time.",
    ),
    Mistake("help that a command has not", "run --help-all", "--help-all: no such flag ...", command=sample.main),
]


THERE_ARE = "there are train, evaluate, sample, export, inspect, estimate, report; --help says what each does."
SUBCOMMANDS = [
    Mistake("no command", "", f"fastgrpo: a command is missing; {THERE_ARE}"),
    Mistake("command", "trian --seed 1", f"trian: no such command (did you mean train?); {THERE_ARE}"),
    Mistake("flag before the command", "--seed 1 train", f"--seed: a command comes before the flags; {THERE_ARE}"),
    Mistake(
        "flag of a command",
        "train --group-sise 4",
        "--group-sise: no such flag (did you mean --group-size?); --help lists them all.",
    ),
    Mistake("report without a run, by its command", "report", "Missing from fastgrpo report: RUN ...; --help ..."),
    Mistake(
        "completion of no shell",
        "--tyro-print-completion",
        "--tyro-print-completion: accepted is --tyro-print-completion SHELL, with bash, zsh, fish as SHELL.",
    ),
    Mistake(
        "completion of another shell",
        "--tyro-print-completion fsh",
        "--tyro-print-completion fsh: no such shell (did you mean fish?); accepted are bash, zsh, fish.",
    ),
    Mistake(
        "completion into no folder",
        "--tyro-write-completion bash none/fastgrpo",
        "none/fastgrpo: No such file or directory.",
        code=1,
    ),
]


SUBCOMMANDS = [replace(mistake, command=__main__.main) for mistake in SUBCOMMANDS]


@pytest.mark.slow
@mistakes(*COMMAND_LINE, *SUBCOMMANDS)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
