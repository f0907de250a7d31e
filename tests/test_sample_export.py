"""`python -m fastgrpo.sample` and `.export` on tiny runs: pictures, files that diffusers loads, kills and refusals."""

import contextlib
import io
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo import export, rollout, sample, train
from fastgrpo.assembly import Training, load_training
from fastgrpo.models import snippet
from fastgrpo.models.check import describe
from fastgrpo.policy import Policy, load_policy
from fastgrpo.run import checkpoint
from fastgrpo.run.trained import load_unet
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system import pictures
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.workers import available_cores
from fastgrpo.unet import lora

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EPS32 = 2.0**-23
RANK, ALPHA, DECAY = 3, 6.0, 0.5
POSITIVES = ["a cat", "two dogs", "a red house", "one tree", "the sea"]
NEGATIVES = ["blood", "a gun", "a knife"]
KINDS = {"full": ["--optim.ema", str(DECAY)], "plain": [], "lora": ["--optim.ema", str(DECAY)]}
KINDS["lora"] += ["--model.lora-rank", str(RANK), "--model.lora-alpha", str(ALPHA)]
KINDS["lora-bf16"] = [*KINDS["lora"], "--engine.dtype", "bf16"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def runs(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs of two iterations with one optimizer step each, both of them saved.

    `full` trains the UNet with a moving average, `plain` without one, `lora` adapters with one, and `lora-bf16` the
    same beside frozen weights that are held in bfloat16.
    """
    folder = tmp_path_factory.mktemp("sample-export")
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
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run of kind `full` that a test may spoil."""
    return Path(shutil.copytree(runs["full"], tmp_path / "copied"))


def newest(run: Path) -> Path:
    return run / "checkpoints" / "iter-000002"


def resumed(run: Path) -> Training:
    """What `--resume` would go on with: the training's own way of loading a checkpoint."""
    training = load_training(load_toml(run / "config.toml"), threads=available_cores())
    checkpoint.load(newest(run), training.trainable)
    return training


def weights_of(training: Training, weights: str) -> contextlib.AbstractContextManager[None]:
    return training.trainable.ema.in_place() if weights == "ema" else contextlib.nullcontext()


@torch.no_grad()
def outputs(unet: UNet2DConditionModel) -> Tensor:
    """On fixed inputs, in the memory layout that training computes in, which decides the rounding."""
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 32, generator=generator)
    return unet.to(memory_format=torch.channels_last)(latents, torch.tensor([3, 700]), embeds).sample


def run_export(run: Path, form: str, output: Path, *flags: str) -> StableDiffusionPipeline:
    """Export, then do what the command says to load it. Returns the pipeline."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert export.main([str(run), "--format", form, "--output", str(output), *flags]) == 0
    names: dict[str, StableDiffusionPipeline] = {}
    exec(said.getvalue().split("\n\n")[1], names)
    return names["pipe"]


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trained", "ema"])
@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_a_full_model_is_the_tuned_policy_bit_for_bit(
    runs: dict[str, Path], tiny_pipeline: Path, tmp_path: Path, form: str, weights: str
) -> None:
    pipeline = run_export(runs["full"], form, tmp_path / "out.safetensors", "--weights", weights)
    training = resumed(runs["full"])
    with weights_of(training, weights):
        assert torch.equal(outputs(pipeline.unet), outputs(training.policy.unet))
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(base, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = "a red house by the sea"  # longer than the tokenizer's length
    assert torch.equal(*(each.tokenizer(text, return_tensors="pt").input_ids for each in (pipeline, base)))
    assert pipeline.scheduler.config.prediction_type == base.scheduler.config.prediction_type
    assert (outputs(pipeline.unet) - outputs(base.unet)).abs().max() > 0.01


def test_an_exported_folder_draws_what_diffusers_draws_with_the_checkpoints_unet(
    runs: dict[str, Path], tiny_pipeline: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(newest(runs["full"]) / "unet")
    expected = StableDiffusionPipeline.from_pretrained(tiny_pipeline, unet=unet, dtype=torch.float32)
    exported = run_export(runs["full"], "diffusers", tmp_path / "out")
    assert exported.scheduler.config == expected.scheduler.config
    drawn = []
    for pipeline in (exported, expected):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        drawn.append(pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np").images)
    assert np.array_equal(*drawn)


def test_the_average_is_that_of_the_checkpoints_and_not_the_weights(
    runs: dict[str, Path], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """One optimizer step an iteration and all of them saved: the recursion can be done again, in float64."""
    steps = [load_file(runs["full"] / "checkpoints" / f"iter-00000{i}" / UNET) for i in (1, 2)]
    average = {name: tensor.double() for name, tensor in load_file(tiny_pipeline / UNET).items()}
    for state in steps:
        average = {name: DECAY * a + (1 - DECAY) * state[name].double() for name, a in average.items()}
    run_export(runs["full"], "diffusers", tmp_path / "out", "--weights", "ema")
    exported = load_file(tmp_path / "out" / UNET)
    assert exported.keys() == average.keys()
    for name, tensor in exported.items():
        # a + w (b - a): two roundings a step, of numbers below three times the largest on the way.
        bound = 2 * len(steps) * 3 * EPS32 * max(state[name].abs().max().item() for state in (*steps, average))
        assert (tensor.double() - average[name]).abs().max() <= bound
    assert any((tensor - steps[-1][name]).abs().max() > 1e-3 for name, tensor in exported.items())


@pytest.mark.parametrize("weights", ["trained", "ema"])
def test_adapters_on_the_base_model_are_the_tuned_policy_bit_for_bit(
    runs: dict[str, Path], tiny_pipeline: Path, tmp_path: Path, weights: str
) -> None:
    """alpha is not the rank, so a scale that gets lost shows."""
    pipeline = run_export(runs["lora"], "lora", tmp_path / "out", "--weights", weights)
    training = resumed(runs["lora"])
    with weights_of(training, weights):
        assert torch.equal(outputs(pipeline.unet), outputs(training.policy.unet))
    (file,) = (tmp_path / "out").iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize("weights", ["trained", "ema"])
@pytest.mark.parametrize("kind", ["lora", "lora-bf16"])
def test_merged_adapters_are_the_formula_in_float64(
    runs: dict[str, Path], tiny_pipeline: Path, tmp_path: Path, kind: str, weights: str
) -> None:
    """W + (alpha / rank) B A, from the base model's own files and those that training left."""
    pipeline = run_export(runs[kind], "diffusers", tmp_path / "out", "--weights", weights)
    merged, base = load_file(tmp_path / "out" / UNET), load_file(tiny_pipeline / UNET)
    name = "ema" if weights == "ema" else "adapters"
    adapters = load_file(newest(runs[kind]) / "trainer" / f"{name}.safetensors")
    adapters = {name.replace(".default.weight", ""): tensor for name, tensor in adapters.items()}
    changed = set()
    for name, tensor in merged.items():
        module, w = name.removesuffix(".weight"), base[name].double()
        if f"{module}.lora_A" in adapters:
            a, b = (adapters[f"{module}.lora_{letter}"].double() for letter in "AB")
            delta, size = ALPHA / RANK * b @ a, ALPHA / RANK * b.abs() @ a.abs()
            # RANK products and sums, the scale and the sum with W: a rounding each of at most the terms' sizes.
            bound = (RANK + 2) * EPS32 * (w.abs() + size)
            assert ((tensor.double() - (w + delta)).abs() <= bound).all(), name
            changed.add(name)
            assert delta.abs().max() > 1e-4, name
        else:
            assert torch.equal(tensor.double(), w), name
    assert len(changed) * 2 == len(adapters) > 0
    if kind == "lora-bf16":
        return  # while training, its adapters stand beside other frozen weights
    training = resumed(runs[kind])
    with weights_of(training, weights):
        ours = outputs(training.policy.unet)
    # W x + s B (A x) against (W + s B A) x: some dozen roundings in each of a dozen layers.
    torch.testing.assert_close(outputs(pipeline.unet), ours, atol=1e-4, rtol=1e-4)


def test_precision_and_checkpoint_are_those_asked_for(runs: dict[str, Path], tmp_path: Path) -> None:
    first = load_file(runs["full"] / "checkpoints" / "iter-000001" / UNET)
    run_export(runs["full"], "diffusers", tmp_path / "half", "--dtype", "fp16", "--checkpoint", "1")
    half = load_file(tmp_path / "half" / UNET)
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in first.items())
    run_export(runs["full"], "single-file", tmp_path / "a.safetensors", "--dtype", "bf16")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values() if tensor.is_floating_point()}
    assert dtypes == {torch.bfloat16}
    run_export(runs["lora"], "lora", tmp_path / "lora", "--dtype", "bf16")
    adapters = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    trained = load_file(newest(runs["lora"]) / "lora" / "pytorch_lora_weights.safetensors")
    assert adapters.keys() == trained.keys()
    assert all(torch.equal(adapters[name], tensor.bfloat16()) for name, tensor in trained.items())


def test_what_to_type_follows_the_base_model() -> None:
    def last(form: str, **fields: str) -> list[str]:
        return snippet.snippet(form, Path("out"), ModelConfig(**fields))[2:]

    pipeline, precision = "pipe = StableDiffusionPipeline.", "torch_dtype=torch.float32"
    assert last("lora", path="a/b", variant="fp16", revision="v1") == [
        f"{pipeline}from_pretrained('a/b', variant='fp16', revision='v1', {precision})",
        "pipe.load_lora_weights('out')",
    ]
    assert last("lora", path="m.ckpt")[0] == f"{pipeline}from_single_file('m.ckpt', {precision})"
    assert last("lora", path="a/b", unet="c/d:e") == [
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        f"{pipeline}from_pretrained('a/b', {precision})",
        "pipe.unet.load_state_dict(load_file(hf_hub_download('c/d', filename='e/diffusion_pytorch_model.safetensors')))",
        "pipe.load_lora_weights('out')",
    ]
    assert last("single-file", path="a/b", revision="v1") == [
        f"{pipeline}from_single_file('out', config='a/b', revision='v1', {precision})"
    ]
    assert last("single-file", path="m.ckpt") == [f"{pipeline}from_single_file('out', {precision})"]
    assert last("single-file", path="m.ckpt", config="c") == [
        f"{pipeline}from_single_file('out', config='c', {precision})"
    ]
    (shipped,) = last("single-file", path="shapes")
    assert Path(shipped.split("'")[3], "model_index.json").is_file()


def drawn_by(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline("a cat", num_inference_steps=3, generator=generator, output_type="np").images


def test_every_form_is_drawn_as_the_run_drew_it(runs: dict[str, Path], tmp_path: Path) -> None:
    """The run's config says v prediction of a base model whose own configs say epsilon."""
    run = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('prediction_type = "auto"', 'prediction_type = "v_prediction"'))
    pictures = {
        form: drawn_by(run_export(run, form, tmp_path / f"{form}.safetensors"))
        for form in ("diffusers", "single-file", "lora")
    }
    epsilon = drawn_by(run_export(runs["lora"], "diffusers", tmp_path / "epsilon"))
    assert np.abs(pictures["diffusers"] - epsilon).max() > 0.01
    assert np.array_equal(pictures["diffusers"], pictures["single-file"])
    # Adapters beside the weights instead of merged into them: other roundings, in three steps of a dozen layers.
    assert np.abs(pictures["diffusers"] - pictures["lora"]).max() < 1e-3
    with safe_open(tmp_path / "single-file.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert "v_pred" in file.keys()  # noqa: SIM118 (not a dict)
        assert "ztsnr" not in file.keys()  # noqa: SIM118
    base = load_toml(run / "config.toml").model.path  # whose configs say epsilon
    model = ModelConfig(path=str(tmp_path / "single-file.safetensors"), config=base)
    with pytest.raises(ConfigError, match=r"model\.prediction_type decides"):  # our own reader believes the file, too
        describe(model)
    assert describe(replace(model, prediction_type="v_prediction")).scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_half_precision_is_loaded_and_drawn_in_half_precision(runs: dict[str, Path], tmp_path: Path, form: str) -> None:
    pipeline = run_export(runs["full"], form, tmp_path / "out.safetensors", "--dtype", "bf16")
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.bfloat16}
    assert np.isfinite(drawn_by(pipeline)).all()


def test_what_only_a_single_file_says_is_in_the_lines(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers guesses the configs of a file that is given alone, and with them schedule and size."""
    said = {"_class_name": "DDIMScheduler", "clip_sample": False, "beta_schedule": "scaled_linear"}
    said |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    base = describe(ModelConfig(path=str(tiny_pipeline)))
    base = replace(base, scheduler=said, unet={**base.unet, "sample_size": 96})
    monkeypatch.setattr(snippet, "describe", lambda model: base)
    lines = snippet.snippet("lora", Path("out"), ModelConfig(path="m.safetensors"))
    names: dict[str, DDIMScheduler] = {}
    exec("\n".join(line for line in lines if line.startswith(("import", "from", "scheduler"))), names)
    assert {key: names["scheduler"].config[key] for key in said if key != "_class_name"} == {
        key: value for key, value in said.items() if key != "_class_name"
    }
    assert (
        "pipe = StableDiffusionPipeline.from_single_file('m.safetensors', torch_dtype=torch.float32, scheduler=scheduler)"
        in lines
    )
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    exec(next(line for line in lines if "sample_size" in line), {"pipe": pipe})
    assert pipe.unet.config.sample_size == 96


def test_adapters_stand_on_the_unet_that_the_run_began_with(
    runs: dict[str, Path], tiny_pipeline: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    state = {name: 0.5 * tensor for name, tensor in load_file(tiny_pipeline / UNET).items()}
    save_file(state, other / "diffusion_pytorch_model.safetensors")
    run = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('unet = ""', f'unet = "{other}"'))
    merged = run_export(run, "diffusers", tmp_path / "merged")
    # As above; the UNet's own weights are the other's.
    torch.testing.assert_close(
        outputs(run_export(run, "lora", tmp_path / "lora").unet), outputs(merged.unet), atol=1e-4, rtol=1e-4
    )


def test_a_killed_export_leaves_nothing_at_its_path_and_can_be_done_again(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forked process; exporting adapters computes nothing, so it does without the threads that a fork loses."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        write = lora.save_tensors

        def write_and_die(*arguments: object, **options: object) -> None:
            write(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(lora, "save_tensors", write_and_die)
        process = os.fork()
        if process == 0:
            try:
                signal.alarm(60)
                export.main([str(runs["lora"]), "--format", "lora", "--output", str(output)])
            finally:
                os._exit(1)
        _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert os.listdir(tmp_path) == ["out.partial"]
    assert len(os.listdir(tmp_path / "out.partial")) == 1  # it was killed late
    (tmp_path / "out.partial" / "rest").write_text("")
    run_export(runs["lora"], "diffusers", output)
    assert os.listdir(tmp_path) == ["out"]
    assert not (output / "rest").exists()


@pytest.mark.parametrize(
    ("form", "limit"), [("diffusers", 500), ("diffusers", 5000), ("single-file", 5000), ("lora", 500)]
)
def test_an_export_that_cannot_be_written_fails_and_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, limit: int
) -> None:
    """limit: bytes a file may have, above which writing fails as on a full disk: a config or the weights."""
    argv = [str(runs["lora"]), "--format", form, "--output", str(tmp_path / "out.safetensors")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        code = export.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"fastgrpo: {tmp_path / 'out.safetensors'}")
    assert "File too large" in err
    assert err.endswith("nothing was exported.\n")
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_accepted(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run_export(runs["lora"], "lora", tmp_path / "out")
    assert len(os.listdir(tmp_path / "out")) == 1


# --- sample ----------------------------------------------------------------------------------------------------------


def pixels(images: Tensor) -> np.ndarray:
    """[N, h, w, 3] int, of images in [0, 1]."""
    return np.floor(images.permute(0, 2, 3, 1).numpy().astype(np.float64) * 255 + 0.5).astype(int)


def read(folder: Path, name: str) -> np.ndarray:
    """[N, h, w, 3] int: NAME-*.png in the order of their names."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{name}-*.png"))]).astype(int)


def draw(policy: Policy, texts: list[str], seeds: list[int], steps: int, guidance: float, eta: float) -> np.ndarray:
    embeds = torch.cat([policy.encode([text]) for text in texts for _ in seeds])
    schedule = make_schedule(policy.scheduler_config, steps, eta, CPU)
    return pixels(rollout.draw_images(policy, embeds, schedule, guidance, seeds * len(texts)))


@pytest.mark.parametrize(
    ("kind", "weights", "flags", "settings"),
    [
        ("full", "trained", [], (3, 5.0, 1.0)),
        ("full", "ema", ["--steps", "2", "--guidance", "2", "--eta", "0.5"], (2, 2.0, 0.5)),
        ("lora", "trained", [], (3, 5.0, 1.0)),
        ("lora", "ema", [], (3, 5.0, 1.0)),
    ],
)
def test_images_are_those_of_the_two_policies(
    runs: dict[str, Path],
    tiny_pipeline: Path,
    tmp_path: Path,
    kind: str,
    weights: str,
    flags: list[str],
    settings: tuple[int, float, float],
) -> None:
    texts, seeds = ["a cat by the sea", "blood", "x"], [7, 8, 9]
    argv = [str(runs[kind]), "--prompts", *texts, "--images-per-prompt", "3", "--seed", "7", "--weights", weights]
    argv += ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "both.png"), *flags]
    assert sample.main(argv) == 0
    assert (tmp_path / "images" / "prompts.txt").read_text().splitlines() == texts
    numbers = [f"000{prompt}-{image}.png" for prompt in (1, 2, 3) for image in (1, 2, 3)]
    names = {f"{name}-{number}" for name in ("base", "tuned") for number in numbers}
    assert {path.name for path in (tmp_path / "images").glob("*.png")} == names

    base, tuned = (read(tmp_path / "images", name) for name in ("base", "tuned"))
    policy = load_policy(ModelConfig(path=str(tiny_pipeline)), CPU, torch.float32, available_cores())
    assert np.array_equal(base, draw(policy, texts, seeds, *settings))
    training = resumed(runs[kind])
    with weights_of(training, weights):
        expected = draw(training.policy, texts, seeds, *settings)
    # Merged adapters compute the same with other roundings: a colour near the middle of two may become its neighbour.
    assert np.abs(tuned - expected).max() <= (1 if kind == "lora" else 0)
    assert np.abs(tuned - base).mean() > 2

    with Image.open(tmp_path / "both.png") as picture:
        sheet = np.asarray(picture).astype(int)
    side = 64  # an image of 16 pixels, each shown as 4 x 4
    for images, left in (
        (base, pictures.CAPTION_WIDTH),
        (tuned, pictures.CAPTION_WIDTH + 3 * (side + pictures.GAP) + 4 * pictures.GAP),
    ):
        for index, image in enumerate(images):
            y = pictures.HEADING_HEIGHT + index // 3 * (side + pictures.GAP)
            x = left + index % 3 * (side + pictures.GAP)
            assert np.array_equal(sheet[y : y + side : 4, x : x + side : 4], image)
    headings = sheet[: pictures.HEADING_HEIGHT, pictures.CAPTION_WIDTH :]
    assert headings.min() < 128  # there is ink


def test_an_image_depends_on_its_own_prompt_and_seed_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    def images(folder: str, *flags: str) -> dict[str, np.ndarray]:
        argv = [
            str(runs["full"]),
            "--images",
            str(tmp_path / folder),
            "--output",
            str(tmp_path / f"{folder}.png"),
            *flags,
        ]
        assert sample.main(argv) == 0
        return {path.stem: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / folder).glob("*.png")}

    many = images("many", "--prompts", "a cat", "a gun", "--images-per-prompt", "3", "--seed", "4", "--batch", "4")
    one = images("one", "--prompts", "a gun", "--images-per-prompt", "1", "--seed", "5")
    for name in ("base", "tuned"):
        # Of another batch: roundings may differ, so that a colour near the middle of two becomes its neighbour.
        assert np.abs(one[f"{name}-0001-1"] - many[f"{name}-0002-2"]).max() <= 1
        assert np.abs(one[f"{name}-0001-1"] - many[f"{name}-0002-1"]).mean() > 2
        assert np.abs(one[f"{name}-0001-1"] - many[f"{name}-0001-2"]).max() > 1


def test_by_default_the_runs_own_prompts_go_to_the_runs_folder(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "samples")
    assert sample.main([str(copied), "--images-per-prompt", "1", "--images", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "prompts.txt").read_text().splitlines() == [*POSITIVES[:4], *NEGATIVES]
    out = capsys.readouterr().out
    assert f"pictures  {copied / 'samples' / 'compare.png'}\n" in out
    assert f"weights   {newest(copied)}, trained\n" in out
    with Image.open(copied / "samples" / "compare.png") as picture:
        assert picture.height == pictures.HEADING_HEIGHT + 7 * (64 + pictures.GAP)


def test_a_comparison_never_replaces_another(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(copied), "--prompts", "a cat", "--images-per-prompt", "1", "--steps", "1"]
    (copied / "samples" / "compare-2.png").write_text("mine")
    contents = []
    for name in ("compare.png", "compare-3.png"):
        assert sample.main(argv) == 0
        assert f"pictures  {copied / 'samples' / name}\n" in capsys.readouterr().out
        contents.append((copied / "samples" / name).read_bytes())
    assert contents[0] == (copied / "samples" / "compare.png").read_bytes()
    assert (copied / "samples" / "compare-2.png").read_text() == "mine"


def test_prompts_of_a_file_come_after_those_of_the_command_line(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one\n\ntwo\n")
    argv = [str(runs["full"]), "--prompts", "zero", "--prompt-file", str(tmp_path / "mine.txt")]
    argv += ["--images-per-prompt", "1", "--steps", "1", "--output", str(tmp_path / "a.png")]
    assert sample.main([*argv, "--images", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "prompts.txt").read_text() == "zero\none\ntwo\n"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that must refuse: one sentence with these words, exit code 2, no weight loaded."""

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("fastgrpo.run.export.load_components", unwanted)
    monkeypatch.setattr("fastgrpo.run.sample.load_policy", unwanted)

    def check(command: Callable[[list[str]], int], argv: list[object], *words: str) -> None:
        capsys.readouterr()
        code = command([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("fastgrpo: ")
        for word in words:
            assert word in err

    return check


@pytest.fixture(params=["sample", "export"])
def refused(request: pytest.FixtureRequest, refuse: Callable[..., None], tmp_path: Path) -> Callable[..., None]:
    """`refuse` for both commands, given a run and flags that both have."""
    flags = ["--format", "diffusers", "--output", tmp_path / "new"] if request.param == "export" else []
    command = {"sample": sample.main, "export": export.main}[request.param]

    def check(run: Path, flags_of_both: list[object], *words: str) -> None:
        refuse(command, [run, *flags, *flags_of_both], *words)
        assert not (tmp_path / "new").exists()
        assert not (run / "samples" / "compare.png").exists()

    return check


def test_a_folder_that_is_no_run_is_refused(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(tmp_path / "none", [], str(tmp_path / "none"), "no such folder")
    refused(tmp_path, [], str(tmp_path), "no config.toml")
    (tmp_path / "config.toml").write_text("iterations = 'many'")
    refused(tmp_path, [], "config.toml", "iterations")


def test_a_checkpoint_that_is_not_there_is_refused(refused: Callable[..., None], copied: Path) -> None:
    refused(copied, ["--checkpoint", "9"], "--checkpoint 9", "there are 1, 2")
    shutil.rmtree(copied / "checkpoints")
    refused(copied, [], str(copied), "no checkpoint in it yet")


def test_a_damaged_checkpoint_is_refused(refused: Callable[..., None], copied: Path) -> None:
    weights = newest(copied) / UNET
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(copied, [], f"{weights} is damaged", "the last good one is --checkpoint 1.")
    (copied / "checkpoints" / "iter-000001" / "trainer" / "state.json").unlink()
    refused(copied, [], f"{weights} is damaged", "there is no good checkpoint.")
    refused(copied, ["--checkpoint", "1"], "state.json is missing", "there is no good checkpoint.")


def test_an_average_that_was_not_kept_is_refused(refused: Callable[..., None], runs: dict[str, Path]) -> None:
    refused(runs["plain"], ["--weights", "ema"], "--weights ema", "optim.ema")


def test_a_base_model_that_is_gone_is_refused(refused: Callable[..., None], copied: Path, tiny_pipeline: Path) -> None:
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace(str(tiny_pipeline), "/gone"))
    refused(copied, [], f"{copied / 'config.toml'}: model.path", "'/gone'")


def test_a_base_model_of_other_shapes_is_refused(runs: dict[str, Path], tiny_pipeline: Path) -> None:
    config = UNet2DConditionModel.load_config(tiny_pipeline / "unet")
    for kind, weights in (("full", "trained"), ("full", "ema"), ("lora", "trained"), ("lora", "ema")):
        model = replace(load_toml(runs[kind] / "config.toml").model, path="other")
        for changes in (
            {"block_out_channels": (8, 16)},
            {"layers_per_block": 2},
            {"down_block_types": ("DownBlock2D",) * 2},  # fewer attentions than adapters
        ):
            unet = UNet2DConditionModel.from_config(config | changes)
            with pytest.raises(ConfigError, match=r"model\.path is 'other', whose UNet has other shapes"):
                load_unet(unet, newest(runs[kind]), weights, model)


def test_exports_that_come_to_nothing_are_refused(
    refuse: Callable[..., None], runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "a.safetensors").write_text("mine")
    for kind, form, output, words in (
        ("full", "lora", "new", ["--format lora", "no adapters", "diffusers and single-file"]),
        ("full", "diffusers", "full", ["--output", "there already", "new or empty"]),
        ("full", "diffusers", "a.safetensors", ["there already"]),
        ("lora", "lora", "full", ["there already"]),
        ("full", "single-file", "a.safetensors", ["there already", "a new file"]),
        ("full", "single-file", "new", ["ends in .safetensors"]),
        ("full", "diffusers", "none/new", ["cannot write in", "none", "No such file"]),
        ("full", "diffusers", "a.safetensors/new", ["cannot write in", "Not a directory"]),
        ("full", "diffusers", "/proc/new", ["cannot write in '/proc'"]),
    ):
        refuse(export.main, [runs[kind], "--format", form, "--output", tmp_path / output], *words)
    refuse(export.main, [runs["full"], "--format", "onnx", "--output", tmp_path / "new"], "onnx", "single-file")
    refuse(export.main, [runs["full"], "--formatt", "lora"], "--formatt: no such flag")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "full"]
    assert (tmp_path / "a.safetensors").read_text() == (tmp_path / "full" / "a").read_text() == "mine"


def test_samples_that_come_to_nothing_are_refused(
    refuse: Callable[..., None], runs: dict[str, Path], tmp_path: Path
) -> None:
    run = runs["full"]
    (tmp_path / "file.txt").write_text("\n")
    (tmp_path / "there.png").write_text("mine")
    for flags, words in (
        (["--images-per-prompt", 0], ["--images-per-prompt 0", "1 or more"]),
        (["--batch", 0], ["--batch 0"]),
        (["--steps", 0], ["--steps 0", "1 to 1000"]),
        (["--steps", 1001], ["--steps 1001"]),
        (["--guidance", 0.5], ["--guidance 0.5"]),
        (["--guidance", "inf"], ["--guidance inf"]),
        (["--guidance", "nan"], ["--guidance nan"]),
        (["--eta", 0], ["--eta 0.0", "above 0"]),
        (["--seed", -1], ["--seed -1"]),
        (["--output", tmp_path / "a.jpg"], ["--output", ".png"]),
        (["--output", tmp_path / "none" / "a.png"], ["--output", "cannot write in", "No such file"]),
        (["--output", tmp_path / "there.png"], ["--output", "there.png: it is there already; accepted is a new file"]),
        (["--images", tmp_path / "file.txt"], ["--images", "it is there already; accepted is a folder"]),
        (["--images", run], ["--images", "it is there already; accepted is a folder that is new or empty"]),
        (["--images", tmp_path / "none" / "images"], ["--images", "No such file"]),
        (["--prompt-file", tmp_path / "none.txt"], ["fastgrpo: --prompt-file: cannot read", "none.txt"]),
        (["--prompt-file", tmp_path / "file.txt"], ["--prompt-file", "holds no prompt"]),
        (["--weights", "best"], ["best"]),
    ):
        refuse(sample.main, [run, *flags], *words)
        refuse(sample.main, [run, "--images", tmp_path / "new", *flags], *words)  # which is not made
    if not torch.cuda.is_available():
        refuse(sample.main, [run, "--device", "cuda"], "--device cuda", "auto and cpu")
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "there.png"]
    assert (tmp_path / "there.png").read_text() == "mine"


def test_prompts_of_the_run_that_are_gone_are_refused_and_others_are_not_asked_for(
    refuse: Callable[..., None], copied: Path
) -> None:
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace("negative.txt", "gone.txt"))
    refuse(sample.main, [copied], f"{copied / 'config.toml'}: prompts.negative", "gone.txt")
    with pytest.raises(AssertionError, match="something was loaded"):
        sample.main([str(copied), "--prompts", "a cat"])
