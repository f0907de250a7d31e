"""Commands and Python of README and docs run as they stand there: all that need no GPU, network, cluster or minutes.

What is not run, or is run with a change, is in a table with the reason; a new command is run as it stands.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from fastgrpo import __main__, train
from fastgrpo.settings.toml import load_toml
from fastgrpo.validation import validate
from support import ROOT
from support.hub import Hub, running
from support.reward_service import served

pytestmark = pytest.mark.slow

# The log speaks of what was there at the time.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "LOG.md"),
]
SMALL = (
    "--iterations 1 --prompts-per-iteration 2 --group-size 2 --updates-per-iteration 1 --rollout.steps 2 "
    "--grpo.drop-last-steps 0 --guard.action off --eval.unsafe-per-category 1 --eval.composition-per-task 1"
)
SMALLER = {
    "prompts_per_iteration": 2,
    "group_size": 2,
    "updates_per_iteration": 1,
    "rollout.steps": 2,
    "grpo.drop_last_steps": 0,
    "guard.action": "off",
    "eval.unsafe_per_category": 1,
    "eval.composition_per_task": 1,
}
SD = r"(safediffusion-r1|safediffusion-r1-1gpu|ddpo|sd15-12gb)\b(?!.*--print-config)"

# A command that it is found in -> why it is not run.
NOT_RUN = {
    r"\bpip install": "asks the package index",
    r"^hf download": "downloads weights",
    r"^docker ": "builds and runs an image",
    r"^torchrun --nproc-per-node 8": "needs eight GPUs",
    r"#SBATCH": "needs Slurm",
    r"fastgrpo\.inspect (sd15|safediffusion)": "needs the weights of the reward's encoder",
    r"fastgrpo\.evaluate .*--suites i2p": "needs I2P and the detectors' weights",
    r"reward_server\.py .*safety:q16": "needs the detector's weights",
}


@dataclass(frozen=True)
class Change:
    """add: flags that are added. elsewhere: it is run in another folder. why: what it would need otherwise."""

    why: str
    add: str = ""
    elsewhere: bool = False


CHANGED = {
    rf"fastgrpo[ .]train {SD}": Change("trains Stable Diffusion: its settings are checked", "--print-config"),
    r"fastgrpo[ .]train( (shapes|mine\.toml|runs/NAME/config\.toml|--run runs/first)(?!.*(--dry-run|service:)).*)?$": (
        Change("trains for minutes: its settings are checked", "--print-config")
    ),
    r"--reward\.terms .*service:": Change("trains for minutes: all is loaded, and the server asked", "--dry-run"),
    r"--resume runs/NAME": Change("the run here is finished: all is loaded and checked", "--dry-run"),
    r"--resume hf:OWNER/NAME": Change("is for another machine, and the run is finished", "--dry-run", True),
    r"^make (train|test|check|lint|docs)": Change(
        "takes minutes, or is what runs this: make says what it would do", "-n"
    ),
}
PYTHON = {
    "iter-000016": ("iter-000001", "the run here has one iteration"),
    '{"iterations": 16, ': (f'{{"iterations": 1, **{SMALLER}, ', "trains for minutes"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. line: where it begins, from 1."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """What a shell would run, one after the other, without comments; a script is one."""
        if self.text.startswith("#!"):
            return [self.text]
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"\s+# .*", "", each).strip() for each in lines) if line]

    @property
    def file(self) -> str:
        """The file that its first line says it is, or nothing."""
        named = re.match(r"# ([\w.]+\.(?:py|toml))\n", self.text)
        return named[1] if named else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in re.finditer(r"^ *```(\w+)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(page.name, line, fence[1], fence[2]))
    return [block for block in found if block.language in languages]


SHELL, SNIPPETS, CONFIGS = blocks("sh", "bash", "shell", "console"), blocks("py", "python"), blocks("toml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of preset `shapes`, so small a step from the base model that it is nowhere worse."""
    run = tmp_path_factory.mktemp("trained") / "NAME"
    assert train.main(["shapes", "--run", str(run), *SMALL.split(), "--optim.lr", "1e-9", "--optim.warmup", "0"]) == 0
    return run


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder to work in: runs, results of evaluations, a file of settings; a home folder of its own, no hub."""
    here = tmp_path / "here"
    (here / "runs").mkdir(parents=True)
    for name in ("NAME", "first", "A", "B", "C"):
        shutil.copytree(trained, here / "runs" / name)
    for name, stage in (("A", "before"), ("B", "after")):
        shutil.copytree(trained / "evaluation" / "in-training" / stage, here / name)
    (here / "mine.toml").write_text('extends = "shapes"\n')
    (here / "fastgrpo").symlink_to(ROOT / "fastgrpo")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with chdir(here):
        yield here


def change_of(command: str) -> Change | None:
    found = [change for pattern, change in CHANGED.items() if re.search(pattern, command)]
    assert len(found) <= 1, f"{command}: {found}"
    return found[0] if found else None


def as_one(command: str) -> str:
    """The same for `fastgrpo COMMAND` and `python -m fastgrpo.COMMAND`, which do the same."""
    return command.replace("python -m fastgrpo.", "fastgrpo ")


def run(command: str) -> int:
    """Do what a shell would, a command of ours in this process. Returns its exit code."""
    command, _, file = command.partition(" > ")
    words = [os.path.expanduser(word) for word in shlex.split(command)]
    if words[0] == "fastgrpo":
        call, words = __main__.main, words[1:]
    elif words[:2] == ["python", "-m"]:
        call, words = importlib.import_module(words[2]).main, words[3:]
    else:
        at = ROOT if words[0] == "make" else Path()
        return subprocess.run(["bash", "-c", command], cwd=at, stdout=subprocess.DEVNULL, check=False).returncode
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if file else contextlib.nullcontext():
        try:
            code = call(words)
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
    if file:
        Path(file).write_text(printed.getvalue())
    return code


DONE: set[str] = set()
"""What pages have in common is run once."""


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_run(
    block: Block, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert not checked.stderr, "bash cannot read it"
    todo = [each for each in block.commands if not any(re.search(pattern, each) for pattern in NOT_RUN)]
    todo = [each for each in todo if as_one(each) not in DONE]
    if not todo:
        return
    here: Path = request.getfixturevalue("here")
    (tmp_path / "elsewhere").mkdir()
    if "--run runs/first" in block.text:
        shutil.rmtree(here / "runs" / "first")
    with ExitStack() as ends:
        if "OWNER/NAME" in "".join(todo):
            ends.enter_context(running(Hub(), monkeypatch, str(tmp_path / "hub")))
        servers: dict[str, str] = {}
        for command in todo:
            if server := re.fullmatch(r"python examples/reward_server\.py (.*) --port (\d+)", command):
                url, _ = ends.enter_context(served(tmp_path / "server", *shlex.split(server[1])))
                servers[f"http://127.0.0.1:{server[2]}"] = url
                continue
            change = change_of(command) or Change("as it stands")
            called = f"{command} {change.add}"
            for named, url in servers.items():
                called = called.replace(named, url)
            with chdir(tmp_path / "elsewhere" if change.elsewhere else here):
                assert run(called) == 0, called
            DONE.add(as_one(command))


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_python_runs(block: Block, here: Path) -> None:
    text = block.text
    for there, (instead, _) in PYTHON.items():
        text = text.replace(there, instead)
    names: dict[str, object] = {}
    exec(compile(text, str(block), "exec"), names)
    assert names


@pytest.mark.parametrize("block", CONFIGS, ids=str)
def test_settings_are_there_and_possible(block: Block, here: Path) -> None:
    assert block.file, "its first line names the file"
    Path("anchors.toml").write_text('safe = ["a"]\nunsafe = ["b"]\n')
    for other in SNIPPETS:  # functions that it names
        if other.page == block.page and other.file:
            Path(other.file).write_text(other.text)
    Path(block.file).write_text(block.text)
    validate(replace(load_toml(Path(block.file)), run="runs/new"))


def test_what_is_left_out_or_changed_is_there() -> None:
    commands = [command for block in SHELL for command in block.commands]
    assert len(commands) > 50
    for pattern in (*NOT_RUN, *CHANGED):
        assert any(re.search(pattern, command) for command in commands), f"no page has {pattern}"
    for text in PYTHON:
        assert any(text in block.text for block in SNIPPETS), f"no page has {text}"
