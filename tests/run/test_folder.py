"""Folders of runs."""

import time
from pathlib import Path

import pytest

from fastgrpo.run.folder import claim, new_folder
from fastgrpo.system.errors import ConfigError


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    made = [new_folder("tiny") for _ in range(3)]
    assert [str(folder) for folder in made] == [f"runs/tiny-20260102-030405{end}" for end in ("", "-2", "-3")]
    for folder in made:
        with claim(folder, resumed=False):
            (folder / "config.toml").write_text("")
    (tmp_path / "file").mkdir()
    monkeypatch.chdir(tmp_path / "file")
    (tmp_path / "file" / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"run = 'runs/tiny-20260102-030405': cannot be made \(Not a directory\)"):
        new_folder("tiny")
