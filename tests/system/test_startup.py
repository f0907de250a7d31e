"""How a command starts: whoever launched it, whatever is left over in the environment, and stopped while it imports."""

import argparse
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import fastgrpo
from fastgrpo import evaluate, export, policy, sample
from fastgrpo.kernels import language
from fastgrpo.settings.command_line import flags_of, parse_command
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.system import distributed
from fastgrpo.system.console import memory_full
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.launch import Launch, read_launch
from support import ROOT

pytestmark = pytest.mark.slow

LAUNCHER = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "ACCELERATE_MIXED_PRECISION",
)
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, env=variables)


# --- launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left_over", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"RANK": "3", "MASTER_ADDR": "there"}]
)
def test_one_process_needs_nothing_else(left_over: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch()
    with distributed.join("cpu") as ranks:
        assert ranks.count == 1


def test_what_a_launcher_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(index=1, count=2, local=0, address="localhost:29501", elastic=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    expected = Launch(1, 2, 0, "localhost:29501", elastic=True, agent_store=True, restarts=2)
    assert read_launch() == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': accepted is 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0': accepted is 1 or more"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2': accepted is 1 or more"),
        ({"WORLD_SIZE": "1.0"}, "WORLD_SIZE = '1.0': accepted is 1 or more"),
        ({"RANK": "2"}, "RANK = '2': accepted is 0 to 1"),
        ({"RANK": "x"}, "RANK = 'x': accepted is 0 to 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1': accepted is 0 to 1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http': accepted is 1 to 65535"),
        ({"RANK": ""}, "WORLD_SIZE = '2': without RANK beside it; accepted is to unset it"),
        (
            dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), ""),
            "WORLD_SIZE = '2': without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT beside it",
        ),
        (
            {"WORLD_SIZE": None, "ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate was asked for several processes and started one",
        ),
    ],
)
def test_half_a_launcher_is_refused(
    changes: dict[str, str | None], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (WHOLE | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_launch()
    assert evaluate.main(["--output", "/proc"]) == 2  # before it looks at anything else that takes time
    assert capsys.readouterr().err.count("\n") == 1


def test_processes_that_do_not_come_are_waited_for_and_then_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (WHOLE | {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=1))
    late = f"not all 2 processes of WORLD_SIZE came to 127.0.0.1:{port}"
    with pytest.raises(ConnectionError, match=late), distributed.join("cpu"):
        pass
    said = capsys.readouterr().err
    assert f"it waits up to 0 minutes for the others at 127.0.0.1:{port}; unset WORLD_SIZE to go on with one" in said


def test_accelerate_without_gpus_starts_one_process_of_two_and_is_refused(tmp_path: Path) -> None:
    """As accelerate itself does it; a version that starts two would be welcome, and fail here."""
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "fastgrpo.train"]
    done = python(*launch, "--run", str(tmp_path / "run"), HF_HOME=str(tmp_path))
    assert "fastgrpo: accelerate was asked for several processes and started one, as it does" in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()


# --- flags -----------------------------------------------------------------------------------------------------------


def option_strings(parser: argparse.ArgumentParser) -> set[str]:
    return {text for action in parser._actions for text in action.option_strings}


def test_no_flag_but_run_could_be_torchruns() -> None:
    """Its argparse takes the beginning of a flag for the flag, and looks at a module's arguments too.

    That of accelerate does not.
    """
    launchers = option_strings(get_args_parser())
    assert not launch_command_parser().allow_abbrev
    commands = (TrainConfig, evaluate.Evaluate, sample.Sample, export.Export)
    ours = {flag for kind in commands for flag in flags_of(kind, "")}
    assert {flag for flag in ours if any(theirs.startswith(flag) for theirs in launchers)} <= {"--run"}
    assert "--run-folder" in ours


@pytest.mark.parametrize("flag", ["--run", "--run-folder", "--run_folder"])
def test_the_runs_folder_has_two_names(flag: str) -> None:
    assert parse_command([flag, "there"])[0].run == "there"
    assert parse_command([f"{flag}=there"])[0].run == "there"


@pytest.mark.parametrize(
    "argv", [["--version"], ["shapes", "--seed", "1", "--version"], ["--resume", "none", "--version"]]
)
def test_the_version_is_told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command(argv)
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastgrpo {fastgrpo.__version__}\n"


@pytest.mark.parametrize("main", [evaluate.main, sample.main, export.main])
def test_every_command_tells_its_version(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fastgrpo {fastgrpo.__version__}\n"


# --- stopped while it imports ----------------------------------------------------------------------------------------

# Ctrl-C comes as a module begins to be imported: what Python runs before anything else.
INTERRUPTING = """
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED"]:
            sys.meta_path.remove(Finder)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.fixture(scope="module")
def interrupting(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("interrupting")
    (folder / "sitecustomize.py").write_text(INTERRUPTING)
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.mark.parametrize(
    ("command", "module", "says"),
    [
        ("train", "fastgrpo.system.console", "stopped."),
        ("train", "tyro", "stopped."),
        ("train", "torch", "stopped; no iteration was begun."),
        ("train", "diffusers", "stopped; no iteration was begun."),
        ("evaluate", "tyro", "stopped."),
        ("", "tyro", "stopped."),
        ("script", "tyro", "stopped."),
        (
            "evaluate",
            "torch",
            "stopped; images that were drawn are kept, and the same command goes on from there.",
        ),
    ],
)
def test_ctrl_c_while_importing_is_one_sentence(
    command: str, module: str, says: str, interrupting: str, tmp_path: Path
) -> None:
    where = "--output" if command == "evaluate" else "--run"
    called = ["-m", f"fastgrpo.{command}"] if command else ["-m", "fastgrpo", "train"]
    if command == "script":
        (tmp_path / "fastgrpo").write_text("import sys\nfrom fastgrpo.__main__ import main\nsys.exit(main())\n")
        called = [str(tmp_path / "fastgrpo"), "train"]
    done = python(*called, where, str(tmp_path / "out"), PYTHONPATH=interrupting, INTERRUPTED=module)
    assert done.stderr == f"fastgrpo: {says}\n"
    assert done.returncode in (130, -2)  # of both a shell says 130
    assert not (tmp_path / "out").exists()


def test_other_programs_keep_their_way_with_ctrl_c(interrupting: str) -> None:
    done = python("-c", "import fastgrpo.train", PYTHONPATH=interrupting, INTERRUPTED="tyro")
    assert done.stderr.endswith("\nKeyboardInterrupt\n")
    assert "Traceback" in done.stderr


# --- without triton --------------------------------------------------------------------------------------------------


def test_sizes_of_kernels_are_the_same_without_triton() -> None:
    absent = language._Absent()
    for number in range(1, 70):
        assert absent.next_power_of_2(number) == triton.next_power_of_2(number)
        assert [absent.cdiv(number, k) for k in range(1, 9)] == [triton.cdiv(number, k) for k in range(1, 9)]
    with pytest.raises(ImportError, match=r"triton\.Config: Triton is not installed"):
        absent.Config()
    with pytest.raises(ImportError, match="Triton is not installed"):
        absent.jit(lambda x_ptr, n: None)[(1,)]


def test_a_gpu_without_triton_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "VERSION", "")
    monkeypatch.setattr(policy, "load_components", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"the device is cuda, and Triton, .* is not installed; accepted is cpu"):
        policy.load_policy(ModelConfig("shapes"), torch.device("cuda"), torch.float32)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_running_out_is_told_from_other_errors() -> None:
    for allocate in (lambda: torch.empty(2**58), lambda: np.empty(2**58), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate()
        assert memory_full(error.value) == "the memory is full"
    assert memory_full(torch.OutOfMemoryError("CUDA out of memory")) == "the GPU's memory is full"
    assert memory_full(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    assert memory_full(ValueError("not enough memory")) == ""
