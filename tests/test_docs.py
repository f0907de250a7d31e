"""What README and docs/ say is there: links, files, commands and their flags; and their Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo import estimate, inspect, report
from fastgrpo.__main__ import COMMANDS
from fastgrpo.settings import command_line
from fastgrpo.settings.command_line import flags_of
from fastgrpo.settings.commands import Evaluate, Export, Sample
from support import ROOT

WEIGHTS = ROOT / "fastgrpo" / "shapes" / "weights" / "pipeline"
# The log and the changelog speak of what was there at the time.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "LOG.md"),
]
FLAGS = {
    "train": {*flags_of(command_line.Start, ""), *flags_of(command_line._Resume, ""), "--run-folder"},
    "evaluate": set(flags_of(Evaluate, "")),
    "sample": set(flags_of(Sample, "")),
    "export": set(flags_of(Export, "")),
    "inspect": set(flags_of(inspect.Inspect, "")),
    "estimate": set(flags_of(estimate.Estimate, "")),
    "report": set(flags_of(report.Report, "")),
}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line that calls a command of ours."""
    lines = []
    for page in PAGES:
        whole = text(page).replace("\\\n", " ")
        lines += [(page.name, line) for line in re.findall(r"-m (fastgrpo\.\w+[^`\n]*)", whole)]
        called = rf"(?:^|`|-m )fastgrpo ((?:{'|'.join(COMMANDS)})\b[^`\n]*)"
        lines += [(page.name, f"fastgrpo.{line}") for line in re.findall(called, whole, flags=re.MULTILINE)]
    return lines


def test_readme_is_read_in_two_minutes() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text(page)) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|toml|cu|md|png))`", text(page))
    assert not [file for file in named if not any((place / file).exists() for place in (ROOT, ROOT / "fastgrpo"))]


def test_commands_and_their_flags_are_there() -> None:
    found = commands()
    assert len(found) > 20
    wrong = []
    for page, line in found:
        name, *words = shlex.split(line.partition("#")[0])
        known = FLAGS.get(name.removeprefix("fastgrpo."))
        if known is None:
            wrong += [] if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() else [(page, line)]
            continue
        asked = [word.split("=")[0] for word in words if word.startswith("--")]
        wrong += [
            (page, flag) for flag in asked if flag not in known and flag not in ("--help", "--help-all", "--version")
        ]
    assert not wrong


@pytest.mark.slow
def test_python_runs_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    """Beside a CPU torch and torchvision's CUDA build, without a word of fastgrpo: its entry point is enough."""
    pages = "\n".join(text(page) for page in PAGES)
    blocks = re.findall(r"^```python\n(.*?)^```$", pages, flags=re.MULTILINE | re.DOTALL)
    assert any("from diffusers import" in block for block in blocks)
    (checkpoint,) = set(re.findall(r'"(runs/[^"]+)/unet"', "".join(blocks)))
    (tmp_path / checkpoint).mkdir(parents=True)
    (tmp_path / checkpoint / "unet").symlink_to(WEIGHTS / "unet")
    (tmp_path / WEIGHTS.relative_to(ROOT).parent).mkdir(parents=True)
    (tmp_path / WEIGHTS.relative_to(ROOT)).symlink_to(WEIGHTS)
    draws = 'print(pipe("a red circle", num_inference_steps=2, output_type="np").images.shape)'
    program = "\n".join([*blocks, draws])
    # -I: neither the folder nor the environment's variables add a place to import from.
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 32, 32, 3)", done.stderr
