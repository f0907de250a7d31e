"""`python -m fastgrpo.export` on tiny runs: files that diffusers loads, and kills."""

import contextlib
import io
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo import export
from fastgrpo.models import snippet
from fastgrpo.models.check import describe
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet import lora
from support.runs import ALPHA, DECAY, RANK, UNET, newest, resumed, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]

EPS32 = 2.0**-23


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
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_kohyas_layout_is_one_file_that_means_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--layout", "kohya", "--weights", "ema"]
    pipeline = run_export(runs["lora"], "lora", tmp_path / "a.safetensors", *flags, "--dtype", "fp32")
    training = resumed(runs["lora"])
    with weights_of(training, "ema"):
        assert torch.equal(outputs(pipeline.unet), outputs(training.policy.unet))
    run_export(runs["lora"], "lora", tmp_path / "half.safetensors", *flags)
    exact, half = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for name, tensor in half.items() if "alpha" not in name} == {torch.float16}
    assert all(torch.equal(half[name].float(), t.half().float()) for name, t in exact.items())
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "half.safetensors"]


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
        "pipe.unet.load_state_dict(load_file(hf_hub_download('c/d', "
        "filename='e/diffusion_pytorch_model.safetensors')))",
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
        "pipe = StableDiffusionPipeline.from_single_file('m.safetensors', torch_dtype=torch.float32, "
        "scheduler=scheduler)" in lines
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
    files = ["README.md", "before_after.png", "pytorch_lora_weights.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == files
