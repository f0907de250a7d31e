"""`python -m fastgrpo.evaluate` in several processes: they share a folder, and leave what one process leaves."""

from pathlib import Path

import pytest

from fastgrpo import evaluate
from support.files import content
from support.processes import together

pytestmark = pytest.mark.slow

FLAGS = "--shapes.unsafe-per-category 1 --shapes.composition-per-task 1 --steps 2 --batch 4 --device cpu"


def test_two_processes_leave_the_files_of_one(tmp_path: Path) -> None:
    assert evaluate.main([*FLAGS.split(), "--output", str(tmp_path / "one")]) == 0
    first, other = together(2, *FLAGS.split(), "--output", str(tmp_path / "two"), main=evaluate.main)
    assert (first.returncode, other.returncode) == (0, 0), (first, other)
    assert first.stdout.count("evaluation.json") == 1
    assert other.stdout == "", "the first process alone speaks"
    assert content(tmp_path / "two") == content(tmp_path / "one")
