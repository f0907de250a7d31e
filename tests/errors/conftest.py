"""Every mistake ends with one clear sentence and an exit code, as early as it can be found, and nothing is lost."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import pytest

from fastgrpo import train
from support.mistakes import Mistake, Scene, contents, forbid_loading


@pytest.fixture(scope="session")
def finished(config_file: Path, shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A run of two iterations with a checkpoint of each."""

    def build(run: Path) -> None:
        argv = [str(config_file), "--run", str(run), "--iterations", "2", "--eval.every", "0", "--engine.threads", "1"]
        assert train.main([*argv, "--checkpoint.every", "1", "--checkpoint.keep", "0"]) == 0

    return shared_folder("finished", build)


@pytest.fixture
def scene(
    config_file: Path,
    tiny_pipeline: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Scene]:
    """A working directory of its own, without a network, the hub's cache being empty."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("tiny.toml", "positive.txt"):
        shutil.copy(config_file.with_name(name), here / name)
    monkeypatch.chdir(here)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside plugins
    capsys.readouterr()  # what the fixtures said
    scene = Scene(here, tiny_pipeline, config_file.with_name("encoder"), finished, monkeypatch)
    with scene.cleanup:
        yield scene


@pytest.fixture
def end(
    scene: Scene, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> Callable[[Mistake], None]:
    """Makes a mistake in the scene, and looks at how it ends."""

    def make(mistake: Mistake) -> None:
        for name, content in mistake.files.items():
            (scene.here / name).parent.mkdir(exist_ok=True)
            (scene.here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        forbid_loading(scene.patch, mistake.loaded)
        for step in mistake.given:
            step(scene)
        before = contents(scene.here)

        code = mistake.command(shlex.split(mistake.argv))

        scene.cleanup.close()
        out, err = capsys.readouterr()
        assert code == mistake.code, err
        assert re.fullmatch(f"fastgrpo: {re.escape(mistake.says).replace(re.escape('...'), '.*')}\n", err), err
        assert err.endswith(".\n")
        assert [str(warning) for warning in recwarn if warning.category is UserWarning] == []  # they would be lines too
        if mistake.loaded != "model":
            assert out.removeprefix("loading\n") == ""  # which a slow machine says before it refuses
        after = contents(scene.here)
        touched = {name for name in before | after if before.get(name) != after.get(name)}
        unexpected = {name for name in touched if not any(fnmatch(name, pattern) for pattern in mistake.leaves)}
        assert unexpected == set()
        mistake.after(scene)

    return make
