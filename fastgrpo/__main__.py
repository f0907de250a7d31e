"""`fastgrpo COMMAND ...`, also as `python -m fastgrpo`: the same commands as `python -m fastgrpo.COMMAND`."""

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from fastgrpo._version import __version__
from fastgrpo.system.console import run_command
from fastgrpo.system.errors import ConfigError, nearest

PROGRAM = "fastgrpo"
COMMANDS = {
    "train": "Train a Stable Diffusion, or go on with a run.",
    "evaluate": "Measure a run, before and after, or any model by any suite.",
    "sample": "Draw prompts with a run's base and tuned model, side by side.",
    "export": "Write what a run trained in a form that other programs load.",
    "inspect": "Show a reward's safety axis, before any image is drawn.",
    "estimate": "Compute what a training costs: FLOPs, hours and memory.",
    "report": "Write a run's results to a page that opens offline.",
}
"""Names of the modules that have them, each with the line that --help gives it."""
_COMPLETION = {"--tyro-print-completion": ("SHELL",), "--tyro-write-completion": ("SHELL", "FILE")}
_SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    """Do as the command line says. Returns the exit code: that of the command, or 2 refused, and 0 after --help."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return importlib.import_module(f"fastgrpo.{words[0]}").main(words[1:], f"{PROGRAM} {words[0]}")

    def command() -> None:
        _check(words)
        if words[0] == "--version":
            print(f"fastgrpo {__version__}")
        elif words[0].replace("_", "-") in _COMPLETION:
            _write_completion(*words[1:])
        else:
            _explain(["--help"])

    return run_command(command, "")


def _check(words: Sequence[str]) -> None:
    """Refuse what begins with no command, and asks for no help, version or completion."""
    there = f"there are {', '.join(COMMANDS)}; --help says what each does."
    if not words:
        raise ConfigError(f"{PROGRAM}: a command is missing; {there}")
    first, rest = words[0].replace("_", "-") if words[0].startswith("--") else words[0], words[1:]
    if first in _COMPLETION:
        wanted = _COMPLETION[first]
        if len(rest) != len(wanted):
            raise ConfigError(f"{first}: accepted is {first} {' '.join(wanted)}, with {', '.join(_SHELLS)} as SHELL.")
        if rest[0] not in _SHELLS:
            raise ConfigError(
                f"{first} {rest[0]}: no such shell{nearest(rest[0], _SHELLS)}; accepted are {', '.join(_SHELLS)}."
            )
    elif first not in ("-h", "--help", "--version"):
        what = "a command comes before the flags" if first.startswith("-") else "no such command"
        raise ConfigError(f"{words[0]}: {what}{nearest(first, COMMANDS)}; {there}")


def _write_completion(shell: str, file: str = "") -> None:
    """Write a script that completes commands and flags in a shell to a file, or print it."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        _explain(["--tyro-print-completion", shell])
    # tyro 1.0 prints the lines of a flag's help as if each were a flag.
    script = written.getvalue().replace("print(completion)", 'print(" ".join(completion.splitlines()))')
    if file:
        Path(file).write_text(script, encoding="utf-8")
    else:
        print(script, end="")


def _explain(words: Sequence[str]) -> None:
    """Let tyro print what `words` ask for: help, or a script for completion. It exits."""
    from fastgrpo import estimate, inspect, report
    from fastgrpo.settings.command_line import Start
    from fastgrpo.settings.commands import Evaluate, Export, Sample

    kinds = Start, Evaluate, Sample, Export, inspect.Inspect, estimate.Estimate, report.Report
    each = (
        Annotated[kind, tyro.conf.subcommand(name, description=line, prefix_name=False)]
        for kind, (name, line) in zip(kinds, COMMANDS.items(), strict=True)
    )
    one_of_them: Any = Union[tuple(each)]  # noqa: UP007 (of a tuple)
    described = (
        "Post-train a Stable Diffusion online. `fastgrpo COMMAND --help` explains a command's flags.\n"
        "--version says which fastgrpo this is. --tyro-print-completion SHELL prints a script that completes all this."
    )
    tyro.cli(one_of_them, prog=PROGRAM, args=words, description=described)


if __name__ == "__main__":
    sys.exit(main())
