"""What a command prints never stops it: encodings that lack a character, readers and terminals that have gone away."""

import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from fastgrpo import estimate, report
from fastgrpo.evaluation.results.tables import console_tables
from fastgrpo.rewards.axis.text import _EIGHTHS
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.output import steady_output
from support import ROOT
from support.evaluation import result_of

RATES = ({"violence": (20, 40)}, {})


@contextmanager
def output_to(path: Path, encoding: str) -> Iterator[None]:
    """Standard output and error are a file of an encoding, as strict as Python opens files."""
    with open(path, "w", encoding=encoding) as file, redirect_stdout(file), redirect_stderr(file):
        yield


@contextmanager
def nobody_reads() -> Iterator[None]:
    """Standard output and error are a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    file = io.TextIOWrapper(io.FileIO(write, "w"), encoding="utf-8", write_through=True)
    with file, redirect_stdout(file), redirect_stderr(file):
        yield


def test_the_final_table_is_shown_in_ascii(tmp_path: Path) -> None:
    with output_to(tmp_path / "output", "ascii"):
        tables = console_tables(result_of(RATES, RATES, ("violence",)))
        assert run_command(lambda: Console().say(*tables), "") == 0
    shown = (tmp_path / "output").read_text(encoding="ascii")
    assert "* violence" in shown
    assert "* trained on   o never trained on" in shown
    assert "50.0 [35.2, 64.8]" in shown


def test_every_substitute_of_a_bar_is_one_column_and_much_higher_bars_look_otherwise(tmp_path: Path) -> None:
    with output_to(tmp_path / "output", "ascii"):
        assert run_command(lambda: print(_EIGHTHS), "") == 0
    shown = (tmp_path / "output").read_text(encoding="ascii").rstrip("\n")
    assert len(shown) == len(_EIGHTHS)
    assert "?" not in shown
    assert len(set(shown[::2])) == len(_EIGHTHS[::2])


def test_latin_1_keeps_what_it_has(tmp_path: Path) -> None:
    with output_to(tmp_path / "output", "latin-1"):
        assert run_command(lambda: print("12.5 ± 0.3 ○ 猫"), "") == 0
    assert (tmp_path / "output").read_text(encoding="latin-1") == "12.5 ± 0.3 o ?\n"


def test_a_path_that_is_no_text_is_shown_as_the_bytes_that_it_is(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")  # a Latin-1 name under UTF-8
    with output_to(tmp_path / "output", "utf-8"):
        assert report.main([str(tmp_path / name)]) == 2
    assert b"caf\xe9 is not the folder of a run" in (tmp_path / "output").read_bytes()


def test_a_refusal_in_ascii_is_one_sentence(tmp_path: Path) -> None:
    with output_to(tmp_path / "output", "ascii"):
        assert estimate.main(["s○hnen"]) == 2
    assert (tmp_path / "output").read_text(encoding="ascii").startswith("fastgrpo: sohnen: no such preset")


def test_a_command_goes_on_when_nobody_reads_it() -> None:
    done = []

    def command() -> None:
        Console().say("a line", "another")
        print("a third")
        print("on the other side", file=sys.stderr)
        done.append(True)

    with nobody_reads():
        assert run_command(command, "") == 0
    assert done


def test_a_refusal_that_nobody_reads_has_its_exit_code() -> None:
    def refuse() -> None:
        raise ConfigError("no")

    with nobody_reads():
        assert run_command(refuse, "") == 2


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    ours, terminal = pty.openpty()
    with open(terminal, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file), steady_output():
        Console().say("shown")
        assert b"shown" in os.read(ours, 100)
        os.close(ours)  # writing is an input/output error from here on
        console = Console()
        with console.bar("rollout", 2) as bar:
            bar.advance(1)
        console.say("not shown")


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)  # as another program at the same terminal can leave it
    received: list[bytes] = []

    def receive() -> None:
        while part := os.read(read, 1 << 12):
            received.append(part)

    text = "0123456789" * 30_000  # several times what a pipe holds
    reader = threading.Timer(0.05, receive)
    with open(write, "w", encoding="utf-8") as file, redirect_stdout(file), steady_output():
        reader.start()
        print(text)
    reader.join()
    os.close(read)
    assert b"".join(received).decode() == text + "\n"


def test_streams_are_put_back_and_those_of_a_notebook_left_alone() -> None:
    notebook, before = io.StringIO(), sys.stderr
    with redirect_stdout(notebook):
        with steady_output():
            print("○")
        assert sys.stdout is notebook
    assert sys.stderr is before
    assert notebook.getvalue() == "○\n"


def test_closed_standard_files_get_nothing_that_others_open(tmp_path: Path) -> None:
    code = """
import runpy, sys
output = runpy.run_path("fastgrpo/system/output.py")  # alone: the whole package takes seconds
with output["steady_output"]():
    with open(sys.argv[1], "w") as file:
        print("to nobody")
        print("to nobody", file=sys.stderr)
        output["say_in_handler"]("to nobody")
        file.write(str(file.fileno()))
"""
    path = tmp_path / "opened.txt"
    command = ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, str(path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert int(path.read_text()) > 2
