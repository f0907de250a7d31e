"""Where tests write files of prompts."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are relative to it, so that messages can be compared whole."""
    monkeypatch.chdir(tmp_path)
