"""A Stable Diffusion small enough that a test can run it hundreds of times. Its weights are random, fixed by a seed."""

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

import fastgrpo  # noqa: F401  (must come before torch and diffusers: it prepares their import)
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels. It must be chosen before diffusers imports triton, whose own functions are
    # then what they will be.
    os.environ["TRITON_INTERPRET"] = "1"

import huggingface_hub.constants
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from support import ROOT

with torch.device("cpu"):
    # torch remembers from the first such block on which functions make tensors. Were one of them replaced at that
    # moment, as tests of the kernels replace torch.empty, torch.device would pass over the real one ever after.
    torch.empty(0)
# Commands leave signals alone that were ignored when they began, as a shell does for what runs in the background or
# under nohup. Tests send them to programs that must not inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
THREADS = torch.get_num_threads()
TOKENS = 8
WIDTH = 32


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "kill training processes N times at random moments, and run the other long tests of failures too"
    parser.addoption("--faults", type=int, default=0, metavar="N", help=what)


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
    for item in items if not torch.cuda.is_available() else ():
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _about(item: pytest.Item) -> float:
    """The seconds that it takes: those of its mark `slow`, or a guess."""
    mark = item.get_closest_marker("slow")
    return 0.05 if mark is None else float(*mark.args or (1,))


def pytest_collection_finish() -> None:
    """What collects garbage looks at the tests' objects alone: the libraries' would take up to seconds each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_threads() -> None:
    """Each test begins with as many threads: commands set their number, on which the bits of a sum depend."""
    torch.set_num_threads(THREADS)


SharedFolder = Callable[[str, Callable[[Path], object]], Path]


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

    def make(prediction_type: str) -> Path:
        def build(folder: Path) -> None:
            _build(prediction_type).to(torch.float16).save_pretrained(folder)

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


def _build(prediction_type: str) -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer() -> CLIPTokenizer:
    """Every lower-case letter, alone or at the end of a word; no merges."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
