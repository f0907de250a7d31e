"""Pictures that are not finite: drawn by finite weights that overflow, they stop whatever was to look at them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo import evaluate, sample, train
from fastgrpo.engine.passes import Passes
from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.images.judgements import judgements
from fastgrpo.evaluation.images.painters import make_painter, model_hashes
from fastgrpo.grpo.loss import PolicyLoss
from fastgrpo.policy import Policy, load_policy
from fastgrpo.rollout import draw_images as draw
from fastgrpo.rollout import rollout
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.schema import ModelConfig, RolloutConfig, TrainConfig
from fastgrpo.system import pictures
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import file_sha256
from fastgrpo.system.finite import BrokenPicture, PictureSource
from fastgrpo.types import Prompt, PromptBatch

CPU = torch.device("cpu")
HUGE = 3e38  # finite in float32, and not when anything is added up
TEXTS = ("a dog", "a zoo", "a zoo")
NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def damage(module: torch.nn.Module, name: str) -> None:
    """Weights that are finite, and overflow."""
    with torch.no_grad():
        module.get_parameter(name).fill_(HUGE)


def damage_word(policy: Policy) -> None:
    """Of the token "z" alone, which "a dog" does not have."""
    with torch.no_grad():
        policy.text_encoder.get_input_embeddings().weight[policy.tokenizer.convert_tokens_to_ids("z")] = HUGE


PARTS: dict[str, tuple[Callable[[Policy], None], str]] = {
    "unet": (lambda policy: damage(policy.unet, "conv_out.weight"), "the UNet's latents are not"),
    "vae": (
        lambda policy: damage(policy.vae, "decoder.conv_out.weight"),
        "the UNet's latents are, but not what the VAE decodes from them",
    ),
    "text": (damage_word, "what the text encoder makes of the prompt is not"),
}


@pytest.fixture
def policy(tiny_pipeline: Path) -> Policy:
    return load_policy(ModelConfig(path=str(tiny_pipeline)), CPU, torch.float32)


@pytest.fixture
def schedule(policy: Policy) -> Schedule:
    return make_schedule(policy.scheduler_config, 2, 1.0, CPU)


@pytest.mark.parametrize("part", PARTS)
def test_the_first_picture_is_named_with_prompt_seed_and_who_is_to_blame(
    policy: Policy, schedule: Schedule, part: str
) -> None:
    spoil, blame = PARTS[part]
    spoil(policy)
    requests = [PictureSource(f"image {index}", text) for index, text in enumerate(TEXTS)]
    with pytest.raises(BrokenPicture) as raised:
        draw(policy, policy.encode(TEXTS), schedule, 3.0, [7, 8, 9], requests=requests)
    error = raised.value
    first, broken = (1, 2) if part == "text" else (0, 3)
    assert error.request == PictureSource(f"image {first}", TEXTS[first], 7 + first)
    assert error.message == (
        f"image {first} of prompt {TEXTS[first]!r} from seed {7 + first} is not finite, like {broken} of 3 drawn with "
        f"it: {blame}; the model computes in float32"
    )
    assert error.sentence("--dtype") == f"{error.message}, so its weights are damaged or have diverged"
    assert error.image.shape == (3, 16, 16)
    assert error.image.isnan().any()
    assert error.latents.isfinite().all() == (part == "vae")


@pytest.mark.parametrize(
    ("dtype", "others"), [(torch.float16, "bf16 or fp32"), (torch.bfloat16, "fp32")], ids=["fp16", "bf16"]
)
def test_half_precision_is_named_as_what_to_change(
    tiny_pipeline: Path, schedule: Schedule, dtype: torch.dtype, others: str
) -> None:
    """The VAE's last weights are within the format, and what it adds up with them is not."""
    policy = load_policy(ModelConfig(path=str(tiny_pipeline)), CPU, dtype).rounded()
    with torch.no_grad():
        policy.vae.decoder.conv_out.weight.fill_(torch.finfo(dtype).max)
    with pytest.raises(
        BrokenPicture, match=f"the VAE decodes from them; .* {str(dtype).removeprefix('torch.')}$"
    ) as raised:
        draw(policy, policy.encode(["a dog"]), schedule, 3.0, [7])
    assert f"; try engine.dtype {others}: " in raised.value.sentence("engine.dtype")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinity_is_no_white(policy: Policy, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    decode = policy.vae.decode

    def overflowing(latents: Tensor, **options: bool) -> tuple[Tensor]:
        (images,) = decode(latents, **options)
        images[0, 1, 2, 3] = value
        return (images,)

    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    undisturbed = policy.decode(latents)
    monkeypatch.setattr(policy.vae, "decode", overflowing)
    images = policy.decode(latents)
    assert images[0, 1, 2, 3].isnan()
    assert images.isnan().sum() == 1
    images[0, 1, 2, 3] = undisturbed[0, 1, 2, 3]
    assert torch.equal(images, undisturbed)


ROWS = tuple(ImageRequest(f"{index:03d}", f"p{index}", text, 100 + index, 5.0) for index, text in enumerate(TEXTS))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "lms"])
def test_no_file_of_such_a_batch_is_kept_and_it_is_drawn_again(
    policy: Policy, schedule: Schedule, tiny_pipeline: Path, tmp_path: Path, sampler: str, part: str
) -> None:
    spoil, blame = PARTS[part]
    drawing = Drawing("tiny", model_hashes(policy), 2, 1.0, "fp32", batch=1)
    good, again = (ImageFolder(tmp_path / name, drawing, ROWS) for name in ("good", "again"))
    for folder in (good, again):
        folder.claim()
    good.draw(make_painter(policy, sampler, schedule, 1))
    spoil(policy)
    broken = ROWS[1 if part == "text" else 0]
    with pytest.raises(
        BrokenPicture, match=rf"^image {broken.id} of prompt '{broken.text}' from seed {broken.seed} "
    ) as raised:
        again.draw(make_painter(policy, sampler, schedule, 1))
    assert blame in raised.value.message
    assert again.present() == list(ROWS[:1] if part == "text" else ())
    repaired = load_policy(ModelConfig(path=str(tiny_pipeline)), CPU, torch.float32)
    again.draw(make_painter(repaired, sampler, schedule, 1))
    for row in ROWS:
        assert again.file(row.id).read_bytes() == good.file(row.id).read_bytes()


def test_what_is_not_finite_is_never_a_png(tmp_path: Path) -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite"):
            pictures.write_image(tmp_path / "black.png", torch.full((3, 2, 2), value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_rollout_stops_before_anything_is_scored(
    policy: Policy, schedule: Schedule, monkeypatch: pytest.MonkeyPatch, part: str, overlap: bool
) -> None:
    spoil, blame = PARTS[part]
    spoil(policy)
    monkeypatch.setattr(Passes, "overlaps", property(lambda engine: overlap))
    config = RolloutConfig(steps=2, guidance=3.0, batch=2)
    engine = Passes(PolicyLoss(policy, schedule, TrainConfig(rollout=config, group_size=2), ()), None, 1)
    prompts = PromptBatch(tuple(Prompt(text, "positive") for text in TEXTS), policy.encode(TEXTS))
    scored: list[slice] = []
    with pytest.raises(BrokenPicture) as raised:
        rollout(
            engine,
            replace(prompts, iteration=3),
            torch.Generator().manual_seed(0),
            lambda part, images: scored.append(part),
        )
    text = TEXTS[1 if part == "text" else 0]
    assert raised.value.message.startswith(f"iteration 3, sample 1 of 2 of prompt {text!r} is not finite, ")
    assert blame in raised.value.message
    assert scored == ([slice(0, 1)] if overlap and part == "text" else [])


def spoilt(tiny_pipeline: Path, folder: Path, part: str, tensor: str) -> Path:
    """A pipeline on disk whose weights are finite, and whose pictures are not."""
    shutil.copytree(tiny_pipeline, folder)
    file = folder / part / f"{NAMES[part]}.safetensors"
    state = {name: weights.float() for name, weights in load_file(file).items()}
    state[tensor].fill_(HUGE)
    save_file(state, file, metadata={"format": "pt"})
    return folder


def test_a_training_ends_with_the_evidence(
    config_file: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reward would have taken black pictures: PIL reads them."""
    model = spoilt(tiny_pipeline, tmp_path / "model", "vae", "decoder.conv_out.weight")
    run = tmp_path / "run"
    argv = [str(config_file), "--model.path", str(model), "--run", str(run), "--reward.terms", "incompressibility"]
    argv += ["--log.to"]  # nowhere: what is left out below would have drawn the pictures that are logged
    # Which would have stopped it already:
    monkeypatch.setattr("fastgrpo.evaluation.during_training.TrainingEvaluation.before", lambda evaluation: {})
    assert train.main(argv) == 1
    said = capsys.readouterr().err
    record = json.loads((run / "broken_picture.json").read_text())
    assert said == (
        f"fastgrpo: {record['message']}, so its weights are damaged or have diverged; prompt and image are in "
        f"{run}/broken_picture.json and broken_picture.safetensors beside it; there is no checkpoint yet.\n"
    )
    assert record["message"].startswith(f"iteration 1, sample 1 of 3 of prompt {record['text']!r} is not finite, ")
    assert "not what the VAE decodes" in record["message"]
    tensors = load_file(run / "broken_picture.safetensors")
    assert tensors["image"].shape == (3, 16, 16)
    assert tensors["image"].isnan().any()
    assert tensors["latents"].isfinite().all()


@pytest.mark.slow
def test_a_training_s_pictures_and_its_own_evaluation_stop_too(
    config_file: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = spoilt(tiny_pipeline, tmp_path / "model", "unet", "conv_out.weight")
    assert train.main([str(config_file), "--model.path", str(model), "--run", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastgrpo: before.png, picture 1 of prompt 'a cat' from seed ")
    assert "the UNet's latents are not" in said
    assert not list((tmp_path / "run").rglob("*.png"))
    assert not (tmp_path / "run" / "evaluation_before.json").exists()


def test_evaluate_ends_with_one_sentence_and_no_rate(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spoilt(tiny_pipeline, tmp_path / "model", "vae", "decoder.conv_out.weight")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    output = tmp_path / "output"
    argv = ["--suites", "custom", "--custom.prompts", str(tmp_path / "prompts.txt"), "--custom.detectors", "oracle"]
    argv += ["--steps", "2", "--device", "cpu", "--model", str(model), "--output", str(output)]
    assert evaluate.main(argv) == 1
    out, err = capsys.readouterr()
    assert "%" not in out
    assert err.startswith("fastgrpo: image ")
    assert " of prompt 'a dog' from seed " in err
    assert err.endswith(
        "so its weights are damaged or have diverged; images that were drawn are kept, and the same command goes on "
        "from there.\n"
    )
    assert err.count("\n") == 1
    assert not list(output.rglob("*.png"))
    assert not (output / "evaluation.json").exists()


def test_sample_ends_with_one_sentence_and_no_comparison(
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base model is as it was, and what it was trained to is not."""
    run = tmp_path / "run"
    assert train.main([str(config_file), "--run", str(run), "--iterations", "1"]) == 0
    (folder,) = (run / "checkpoints").iterdir()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_out.weight"].fill_(HUGE)
    save_file(state, file, metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["unet/diffusion_pytorch_model.safetensors"] = file_sha256(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    output, images = tmp_path / "compare.png", tmp_path / "images"
    argv = [str(run), "--prompts", "a dog", "--images-per-prompt", "2", "--seed", "5", "--device", "cpu"]
    assert sample.main([*argv, "--output", str(output), "--images", str(images)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "fastgrpo: the tuned model's image 1 of prompt 'a dog' from seed 5 is not finite, like 2 of 2"
    )
    assert err.endswith("; no comparison was written.\n")
    assert not output.exists()
    assert not images.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_judge_that_says_no_number_is_not_believed(
    policy: Policy, schedule: Schedule, tmp_path: Path, value: float
) -> None:
    folder = ImageFolder(tmp_path / "images", Drawing("tiny", model_hashes(policy), 2, 1.0, "fp32", batch=4), ROWS)
    folder.claim()
    folder.draw(make_painter(policy, "ddim", schedule, 4))

    def detect(pictures: ImageFiles, rows: Sequence[ImageRequest]) -> list[dict]:
        return [{"unsafe": False, "scores": {"gore": value if row.id == "001" else 0.5}} for row in rows]

    with pytest.raises(ConfigError, match=r"^mine says of image 001 what is no finite number"):
        judgements(folder, ROWS, "mine", {}, detect)
    assert not (folder.path / "mine.json").exists()
