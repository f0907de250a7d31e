"""Training on small pipelines of the real classes of SD 1.5 and SD 2.1, from every place a pipeline can come from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from fastgrpo import train
from fastgrpo.engine.trainable import make_trainable
from fastgrpo.models.load import load_components
from fastgrpo.policy import load_policy
from fastgrpo.rollout import draw_images
from fastgrpo.run import checkpoint
from fastgrpo.run.metrics import read_metrics
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from support.encoders import write_folder as write_encoder
from support.sd_pipelines import KINDS, build_pipeline, save_folder, save_in_hub_cache, save_single_file

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROMPT = "a red cube"
FORMS = {"sd1": ("folder", "hub", "single file"), "sd2": ("folder", "single file")}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, str]]:
    """Kind and form -> the fields of `model` that name such a pipeline; the hub's cache holds both kinds."""
    root = tmp_path_factory.mktemp("places")
    fields: dict[tuple[str, str], dict[str, str]] = {}
    for kind in KINDS:
        pipeline = build_pipeline(kind)
        folder = save_folder(pipeline, root / kind)
        hub_id = save_in_hub_cache(folder, root / "cache", repository=f"someone/{kind}")
        file = save_single_file(pipeline, root / f"{kind}.safetensors")
        fields[kind, "folder"] = {"path": str(folder)}
        fields[kind, "hub"] = {"path": hub_id}
        fields[kind, "single file"] = {"path": str(file), "config": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "cache"))
        yield lambda kind, form: fields[kind, form]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration of two prompts, two images each, three steps; everything but the model."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "encoder").mkdir()
    write_encoder(folder / "encoder")
    (folder / "positive.txt").write_text("two dogs\n")
    (folder / "negative.txt").write_text("a knife\n")
    path = folder / "small.toml"
    path.write_text(f"""
iterations = 1
prompts_per_iteration = 2
group_size = 2
updates_per_iteration = 1
micro_batch = 4
prompts.positive = "{folder / "positive.txt"}"
prompts.negative = "{folder / "negative.txt"}"
reward.encoder = "local-dir:{folder / "encoder"}"
rollout.steps = 3
rollout.guidance = 3.0
optim.lr = 1e-3
engine.device = "cpu"
engine.threads = 1
eval.every = 0
checkpoint.every = 1
""")
    return path


def train_on(fields: dict[str, str], config_file: Path, run: Path, *options: str) -> Path:
    """The folder of the checkpoint after its iteration."""
    model = [argument for name, value in fields.items() for argument in (f"--model.{name}", value)]
    assert train.main([str(config_file), "--run", str(run), *model, *options]) == 0
    assert all(record["ratio/max_abs_dev_first"] <= 1e-6 for record in read_metrics(run / "metrics.jsonl"))
    return run / "checkpoints" / "iter-000001"


def draw(pipeline: StableDiffusionPipeline, seed: int) -> torch.Tensor:
    """One image by diffusers alone, DDIM with eta 1, [1, 3, h, w] float32 in [0, 1]."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPT, num_inference_steps=3, guidance_scale=3.0, eta=1.0, generator=generator, output_type="pt")[
        0
    ]


def draw_with_policy(model: ModelConfig, checkpoint_folder: Path, seed: int) -> torch.Tensor:
    """The same image by the policy that was trained, brought back from its checkpoint."""
    policy = load_policy(model, CPU, torch.float32)
    config = replace(TrainConfig(), model=model)
    checkpoint.load(checkpoint_folder, make_trainable(policy.unet, config, CPU, torch.float32))
    schedule = make_schedule(policy.scheduler_config, 3, 1.0, CPU)
    return draw_images(policy, policy.encode([PROMPT]), schedule, 3.0, [seed])


@pytest.mark.slow(10)
@pytest.mark.parametrize("kind", KINDS)
def test_full_training_is_the_same_from_a_folder_the_hub_and_a_single_file(
    kind: str, places: Callable[[str, str], dict[str, str]], config_file: Path, tmp_path: Path
) -> None:
    trained = {
        form: UNet2DConditionModel.from_pretrained(
            train_on(places(kind, form), config_file, tmp_path / form) / "unet", use_safetensors=True
        ).state_dict()
        for form in FORMS[kind]
    }
    base = load_components(ModelConfig(**places(kind, "folder")), torch.float32).unet.state_dict()
    # AdamW moves a weight by up to lr = 1e-3 a step, whatever its gradient, so a weight without one shows.
    moved = [name for name, tensor in trained["folder"].items() if not torch.equal(tensor, base[name])]
    assert moved == list(base)
    for name, tensor in trained["folder"].items():
        assert all(torch.equal(trained[form][name], tensor) for form in FORMS[kind]), name


@pytest.mark.parametrize("kind", KINDS)
def test_lora_training_comes_out_the_same_in_plain_diffusers(
    kind: str, places: Callable[[str, str], dict[str, str]], config_file: Path, tmp_path: Path
) -> None:
    options = ("--model.lora-rank", "2", "--model.lora-alpha", "8", "--optim.lr", "1e-2")
    trained = train_on(places(kind, "folder"), config_file, tmp_path / "run", *options)
    path = places(kind, "folder")["path"]
    adapted, merged, base = (StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32) for _ in range(3))
    adapted.load_lora_weights(trained / "lora")
    merged.unet = UNet2DConditionModel.from_pretrained(trained / "unet", use_safetensors=True)
    ours = draw_with_policy(ModelConfig(path=path, lora_rank=2, lora_alpha=8.0), trained, seed=3)
    # The same image to within a step of 8 bits; what training did is many such steps.
    assert (draw(adapted, seed=3) - ours).abs().max() < 1 / 255
    assert (draw(merged, seed=3) - ours).abs().max() < 1 / 255
    assert (draw(base, seed=3) - ours).abs().max() > 10 / 255
