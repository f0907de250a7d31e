"""What tests of many files share: a small pipeline, a config of it, and what was trained by that; their order."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import ROOT

# Commands leave signals alone that were ignored when they began, as a shell does for what runs in the background or
# under nohup. Tests send them to programs that must not inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
if not Path("/dev/nvidiactl").exists():
    # Folders' own conftests, which import the kernels, come before `pytest_configure` where a folder is named.
    os.environ["TRITON_INTERPRET"] = "1"
SharedFolder = Callable[[str, Callable[[Path], object]], Path]
threads: int


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "kill training processes N times at random moments, and run the other long tests of failures too"
    parser.addoption("--faults", type=int, default=0, metavar="N", help=what)


def pytest_configure(config: pytest.Config) -> None:
    """Import torch as tests need it. The process that only hands them out to others needs none, which saves seconds."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import fastgrpo  # noqa: F401  (must come before torch and diffusers: it prepares their import)

    # isort: split
    import torch

    if not torch.cuda.is_available():
        # Triton's interpreter runs the kernels. It must be chosen before diffusers imports triton, whose own functions
        # are then what they will be.
        os.environ["TRITON_INTERPRET"] = "1"
    with torch.device("cpu"):
        # torch remembers from the first such block on which functions make tensors. Were one of them replaced at that
        # moment, as tests of the kernels replace torch.empty, torch.device would pass over the real one ever after.
        torch.empty(0)
    global threads
    threads = torch.get_num_threads()


@pytest.fixture(autouse=True, scope="module")
def exits() -> Iterator[None]:
    """wandb puts functions of its own in the place of these, which later tests would meet."""
    before = sys.exit, sys.excepthook
    yield
    sys.exit, sys.excepthook = before


@pytest.fixture(scope="session")
def faults(request: pytest.FixtureRequest) -> int:
    """How many kills the command line asks for."""
    return request.config.getoption("--faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left with one.

    A test that needs CUDA says so where there is none.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        seconds[item.path] += _about(item)
    items.sort(key=lambda item: -seconds[item.path])
    import torch

    for item in items if not torch.cuda.is_available() else ():
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _about(item: pytest.Item) -> float:
    """The seconds that it takes: those of its mark `slow`, or a guess."""
    mark = item.get_closest_marker("slow")
    return 0.05 if mark is None else float(*mark.args or (1,))


def pytest_collection_finish() -> None:
    """What collects garbage looks at the tests' objects alone: the libraries' would take up to seconds each time.

    And it does so more rarely: what tests leave is small.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _own_threads() -> None:
    """Each test begins with as many threads: commands set their number, on which the bits of a sum depend."""
    import torch

    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """Name and builder -> a folder: built by the first of the tests' processes that asks for it, and read by all.

    The builder gets the folder, which is empty. Nobody may write in it afterwards.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own there
        root = root.parent

    def shared(name: str, build: Callable[[Path], object]) -> Path:
        folder, built = root / f"shared-{name}", root / f"shared-{name}.built"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                build(folder)
                built.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def make_tiny_pipeline(shared_folder: SharedFolder) -> Callable[[str], Path]:
    """Prediction type -> the folder of such a pipeline, written on first use, as fp16 like the weights that ship."""
    import torch

    from support import tiny_pipeline

    def make(prediction_type: str) -> Path:
        def build(folder: Path) -> None:
            tiny_pipeline.build(prediction_type).to(torch.float16).save_pretrained(folder)

        return shared_folder(f"tiny-{prediction_type}", build)

    return make


@pytest.fixture(scope="session")
def tiny_pipeline(make_tiny_pipeline: Callable[[str], Path]) -> Path:
    """Folder of an epsilon-prediction pipeline: latents 4 x 8 x 8, images 16 x 16, text 8 tokens of width 32."""
    return make_tiny_pipeline("epsilon")


@pytest.fixture(scope="session")
def config_file(tiny_pipeline: Path, shared_folder: SharedFolder) -> Path:
    """A config whose iterations take a fraction of a second and touch everything that a resume must restore."""
    from support.encoders import write_folder  # imports open_clip, which few tests need

    def build(folder: Path) -> None:
        encoder = folder / "encoder"
        encoder.mkdir()
        write_folder(encoder)
        (folder / "positive.txt").write_text("a cat\ntwo dogs\na red house\none tree\nthe sea\n")
        (folder / "negative.txt").write_text("blood\na gun\na knife\n")
        (folder / "tiny.toml").write_text(f"""
iterations = 8
prompts_per_iteration = 2
group_size = 3
updates_per_iteration = 2
micro_batch = 5
model.path = "{tiny_pipeline}"
prompts.positive = "{folder / "positive.txt"}"
prompts.negative = "{folder / "negative.txt"}"
reward.encoder = "local-dir:{encoder}"
reward.anchors = "compact"
rollout.steps = 3
grpo.kl = 0.01
optim.lr = 1e-3
engine.device = "cpu"
engine.threads = 2
eval.every = 4
checkpoint.every = 3
""")

    return shared_folder("tiny-config", build) / "tiny.toml"


@pytest.fixture(scope="session")
def undisturbed(config_file: Path, shared_folder: SharedFolder) -> Path:
    """The folder of a run of `config_file` from the command line, and beside it, as a .txt file, what it said."""

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "fastgrpo.train", str(config_file), "--run", str(folder / "undisturbed")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "undisturbed.txt").write_text(done.stdout)

    return shared_folder("undisturbed", build) / "undisturbed"


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """The hub's client without a network."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def runs(tiny_pipeline: Path, shared_folder: SharedFolder) -> dict[str, Path]:
    """Folders of runs of two iterations with one optimizer step each, both of them saved.

    `full` trains the UNet with a moving average, `plain` without one, `lora` adapters with one, and `lora-bf16` the
    same beside frozen weights that are held in bfloat16.
    """
    from fastgrpo import train
    from support.runs import KINDS, NEGATIVES, POSITIVES

    def build(folder: Path) -> None:
        (folder / "positive.txt").write_text("\n".join(POSITIVES))
        (folder / "negative.txt").write_text("\n".join(NEGATIVES))
        (folder / "tiny.toml").write_text(f"""
iterations = 2
prompts_per_iteration = 2
group_size = 4
updates_per_iteration = 1
model.path = "{tiny_pipeline}"
prompts.positive = "{folder / "positive.txt"}"
prompts.negative = "{folder / "negative.txt"}"
reward.terms = ["compressibility"]
rollout.steps = 3
optim.lr = 1e-2
engine.device = "cpu"
engine.threads = 1
eval.every = 0
checkpoint.every = 1
checkpoint.keep = 0
""")
        for kind, flags in KINDS.items():
            assert train.main([str(folder / "tiny.toml"), "--run", str(folder / kind), *flags]) == 0

    folder = shared_folder("sample-export", build)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run of kind `full` that a test may spoil."""
    return Path(shutil.copytree(runs["full"], tmp_path / "copied"))
