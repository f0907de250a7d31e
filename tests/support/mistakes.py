"""How a mistake is made and how it must end."""

import fcntl
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastgrpo import train
from fastgrpo.run import checkpoint

TRAIN = "tiny.toml --run run --iterations 1 "
A_RUN = (
    "run/engine.json",
    "run/.lock",
    "run/axis.json",
    "run/config.toml",
    "run/evaluation_before.json",
    "run/metrics.jsonl",
    "run/samples/before.png",
    "run/samples/prompts.json",
    "run/tensorboard/*",
)
# What torch says where the system gives it nothing.
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)
GO_ON_FROM = "the newest checkpoint is run/checkpoints/iter-000002"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Scene:
    """Where a mistake is made.

    here: the working directory, with the config tiny.toml in it. finished: a run of two iterations and checkpoints.
    cleanup: is closed when the command has ended.
    """

    here: Path
    pipeline: Path
    encoder: Path
    finished: Path
    patch: pytest.MonkeyPatch
    cleanup: ExitStack = field(default_factory=ExitStack)


Step = Callable[[Scene], Any]


@dataclass(frozen=True)
class Mistake:
    """How to make it, and how it ends.

    argv: the command line. says: what is on standard error after `fastgrpo: `, `...` being anything. code: the exit
    code. files: content by name, to be written first. given: other preparations. loaded: what may have been loaded
    until then: `nothing`, `encoder`, or `model`, which is everything. leaves: patterns of the names of files that it
    may have written. after: further checks.
    """

    name: str
    argv: str
    says: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    given: tuple[Step, ...] = ()
    code: int = 2
    loaded: str = "nothing"
    leaves: tuple[str, ...] = ()
    after: Step = lambda scene: None
    command: Callable[[list[str]], int] = train.main


def mistakes(*those: Mistake) -> pytest.MarkDecorator:
    """A test of each."""
    return pytest.mark.parametrize("mistake", those, ids=lambda mistake: mistake.name)


def dry(those: Sequence[Mistake], *names: str) -> list[Mistake]:
    """Those of these names where nothing is to be trained: they are refused in the same words."""
    named = {mistake.name: mistake for mistake in those}
    return [
        replace(named[name], name=f"dry run: {name}", argv=f"{named[name].argv} --dry-run", leaves=()) for name in names
    ]


def pipeline(file: str = "", **changes: Any) -> Step:
    """The folder `model`: a whole pipeline, but for `changes` to one of its JSON files."""

    def write(scene: Scene) -> None:
        shutil.copytree(scene.pipeline, scene.here / "model")
        if file:
            change(scene.here / "model" / file, changes)

    return write


def encoder(**changes: Any) -> Step:
    """The folder `encoder`: a whole one, but for `changes` to its preprocess_cfg."""

    def write(scene: Scene) -> None:
        shutil.copytree(scene.encoder, scene.here / "encoder")
        config = json.loads((scene.here / "encoder" / "open_clip_config.json").read_text())
        change(scene.here / "encoder" / "open_clip_config.json", {"preprocess_cfg": config["preprocess_cfg"] | changes})

    return write


def change(file: Path, changes: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def finished_run(scene: Scene) -> None:
    """The folder `run`."""
    shutil.copytree(scene.finished, scene.here / "run")


def written(name: str, content: bytes) -> Step:
    """Something else in a file that an earlier step made."""
    return lambda scene: (scene.here / name).write_bytes(content)


def removed(name: str) -> Step:
    return lambda scene: (scene.here / name).unlink()


def edited(name: str, old: str, new: str) -> Step:
    def edit(scene: Scene) -> None:
        text = (scene.here / name).read_text()
        assert old in text
        (scene.here / name).write_text(text.replace(old, new))

    return edit


def linked(name: str, target: str) -> Step:
    def link(scene: Scene) -> None:
        (scene.here / name).parent.mkdir(exist_ok=True)
        (scene.here / name).symlink_to(target)

    return link


def tensors(name: str, *keys: str) -> Step:
    return lambda scene: save_file({key: torch.zeros(2) for key in keys}, scene.here / name)


def code_in_a_checkpoint(scene: Scene) -> None:
    torch.save({"state_dict": {}, "callbacks": Scene}, scene.here / "model.ckpt")


def in_use(scene: Scene) -> None:
    """As by another process."""
    (scene.here / "run").mkdir(exist_ok=True)
    lock = scene.cleanup.enter_context((scene.here / "run" / ".lock").open("w"))
    fcntl.flock(lock, fcntl.LOCK_EX)


def file_size_limit(size: int) -> Step:
    """No file may be larger, in bytes: writing fails as on a full disk."""

    def limit(scene: Scene) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        scene.cleanup.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)

    return limit


def room_left(size: int) -> Step:
    """The disk has so many bytes left."""

    def fill(scene: Scene) -> None:
        before = shutil.disk_usage
        scene.patch.setattr(shutil, "disk_usage", lambda path: before(path)._replace(total=10**12, free=size))
        scene.cleanup.callback(scene.patch.setattr, shutil, "disk_usage", before)

    return fill


def metrics_of(size: int) -> Step:
    """Blanks within the records of metrics.jsonl, until it is of this size in bytes."""

    def pad(scene: Scene) -> None:
        file = scene.here / "run" / "metrics.jsonl"
        text = file.read_text().removesuffix("}\n")
        file.write_text(text.ljust(size - 2) + "}\n")

    return pad


def no_cuda(scene: Scene) -> None:
    scene.patch.setattr(torch.cuda, "is_available", lambda: False)


def not_installed(module: str) -> Step:
    return lambda scene: scene.patch.setitem(sys.modules, module, None)  # what Python takes for it


def offline(scene: Scene) -> None:
    """Whether or not there is a network: asking it would take as long as it likes."""
    scene.patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    scene.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def raises(target: str, error: BaseException) -> Step:
    def patch(scene: Scene) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        scene.patch.setattr(target, fail)

    return patch


def goes_on(scene: Scene) -> None:
    """Both checkpoints are whole, and the run can be resumed."""
    folders = sorted((scene.here / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["iter-000001", "iter-000002"]
    assert [checkpoint.find_damage(folder) for folder in folders] == [None, None]
    assert train.main(["--resume", "run", "--iterations", "3"]) == 0


def evidence(scene: Scene) -> None:
    record = json.loads((scene.here / "run" / "broken_reward.json").read_text())
    assert record["text"] in (scene.here / "tiny.toml").with_name("positive.txt").read_text().splitlines()
    assert "reward term 'mine.py:" in record["message"]
    with Image.open(scene.here / "run" / "broken_reward.png") as image:
        image.load()
        assert image.size == (16, 16)  # the tiny pipeline's


def forbid_loading(patch: pytest.MonkeyPatch, loaded: str) -> None:
    """Let the test fail as soon as more than `loaded` is read."""

    def too_early(*_: Any, **__: Any) -> None:
        pytest.fail("the mistake could have been found earlier")  # a BaseException, so nothing catches it

    if loaded != "model":
        for module in ("policy", "run.export"):
            patch.setattr(f"fastgrpo.{module}.load_components", too_early)
    if loaded == "nothing":
        patch.setattr(open_clip, "create_model", too_early)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Of all files and links in a folder, by name; but for those that a kill may leave and the next start removes."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir() and path.suffix != ".partial"
    }
