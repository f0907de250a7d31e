"""`fastgrpo COMMAND`: the commands, and scripts that complete them in a shell."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgrpo.__main__ import COMMANDS, PROGRAM, main


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert re.search(rf"\W {name} +{re.escape(line)} *\W$", printed, flags=re.MULTILINE), name


def test_every_command_is_the_modules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        given: list[object] = []
        module = importlib.import_module(f"fastgrpo.{name}")
        monkeypatch.setattr(module, "main", lambda *args, given=given: given.append(args) or 5)
        assert main([name, "a", "--help"]) == 5
        assert given == [(["a", "--help"], f"{PROGRAM} {name}")]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["tra"], ["train"]),
        (["train", "--rollout.steps-"], ["--rollout.steps-outside"]),
        (["evaluate", "--sui"], ["--suites"]),
        (["report", "--rollout.st"], []),
    ],
)
@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("python3")), reason="needs bash, and python3 in it")
def test_a_shell_completes_commands_and_flags(words: list[str], completed: list[str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    assert main(["--tyro-write-completion", "bash", str(script)]) == 0
    line = " ".join((PROGRAM, *words))
    asks = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE='{line}'; COMP_POINT={len(line)}"
    program = f"source {script}; {asks}; $(complete -p {PROGRAM} | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_has_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", shell]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    assert all(name in printed for name in (*COMMANDS, "--rollout.steps", "--suites"))
