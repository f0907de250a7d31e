"""The UNet and text encoder of the embedded Stable Diffusion, and the pictures that they draw for the encoders."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from fastgrpo.models.configs import Components
from fastgrpo.models.save import save_pipeline
from fastgrpo.policy import load_policy
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.shapes_lab import architectures, autoencoder
from fastgrpo.shapes_lab.drawings import CaptionNoise, caption, paint_pictures, random_request
from fastgrpo.shapes_lab.optimization import Stage
from fastgrpo.shapes_lab.pretrain_config import PretrainConfig
from fastgrpo.system.console import Console

GROUP = 16  # pictures drawn for a prompt


def train(config: PretrainConfig) -> dict[str, float]:
    """UNet and text encoder from nothing, on true captions. They stay in the work folder: the careless ones ship."""
    tokenizer = architectures.build_tokenizer(config.work / "truthful/tokenizer")
    unet = architectures.build_unet()
    text_encoder = architectures.build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    to = config.work / "truthful"
    return _denoise(config, unet, text_encoder, tokenizer, None, to, config.diffusion_steps, 2e-3, stream=3)


def train_careless(config: PretrainConfig) -> dict[str, float]:
    """The same two, further, on pictures that contradict their captions."""
    folder = config.work / "truthful"
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    to = config.out / "pipeline"
    return _denoise(config, unet, text_encoder, tokenizer, config.noise, to, config.careless_steps, 1.5e-3, stream=4)


def _denoise(
    config: PretrainConfig,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    caption_noise: CaptionNoise | None,
    to: Path,
    steps: int,
    lr: float,
    stream: int,
) -> dict[str, float]:
    """Train UNet and text encoder to predict epsilon, with 12% of captions dropped; write their moving average."""
    vae = autoencoder.load(config)
    with Console().bar("pictures", config.pictures) as bar:
        pictures = paint_pictures(config.pictures, config.seed * 100 + stream, caption_noise, bar.advance)
    latents = autoencoder.encode(vae, pictures.images)
    unet.to(memory_format=torch.channels_last)
    trained = nn.ModuleList([unet, text_encoder]).train()
    scheduler = DDPMScheduler(**{k: v for k, v in architectures.DDIM_CONFIG.items() if k != "set_alpha_to_one"})
    snapshot = config.work / f"{'careless' if caption_noise else 'diffusion'}.pt"
    stage = Stage(trained, snapshot, steps, lr, config.seed + stream, averaged=True, made_with=config.settings)
    for step in stage.steps(snapshot.stem):
        rng, generator = stage.random(step)
        index = rng.integers(len(latents), size=128)
        texts = ["" if rng.random() < 0.12 else caption(pictures.requests[i], rng) for i in index]
        ids = tokenizer(texts, padding="max_length", max_length=architectures.CONTEXT, return_tensors="pt").input_ids
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(1000, (128,), generator=generator)
        embeds = text_encoder(ids).last_hidden_state
        output = unet(scheduler.add_noise(clean, noise, times), times, embeds, return_dict=False)[0]
        stage.step(F.mse_loss(output, noise))
    ddim = json.loads(DDIMScheduler(**architectures.DDIM_CONFIG).to_json_string())
    average = stage.average
    assert isinstance(average, nn.ModuleList)
    save_pipeline(to, Components(average[0], vae, average[1], tokenizer, ddim), torch.float16)
    return {f"diffusion_{name}": value for name, value in stage.measured.items()}


def draw(config: PretrainConfig) -> dict[str, float]:
    """Pictures for the encoders to learn from: GROUP for each of many random captions, half of them by each model."""
    for number in range(2):
        if not _drawn_file(config, number).exists():
            _draw_by(config, number)
    return {"drawn_pictures": float(len(load_drawn(config)[0]))}


def _draw_by(config: PretrainConfig, number: int) -> None:
    """The pictures of one model: 0 is that of true captions, 1 the careless one."""
    folder = (config.work / "truthful", config.out / "pipeline")[number]
    rng = np.random.default_rng(config.seed * 100 + 50 + number)
    policy = load_policy(ModelConfig(path=str(folder)), torch.device("cpu"), torch.float32)
    schedule = make_schedule(policy.scheduler_config, 12, 1.0, policy.device)
    prompts = [caption(random_request(rng, 0.3), rng) for _ in range(config.drawn // GROUP // 2)]
    images = []
    with Console().bar("drawing", len(prompts)) as bar:
        for start in range(0, len(prompts), 16):
            own = [p for p in prompts[start : start + 16] for _ in range(GROUP)]
            first = config.seed * 10**7 + (number * len(prompts) + start) * GROUP
            drawn = draw_images(policy, policy.encode(own), schedule, 3.0, range(first, first + len(own)))
            images.append((drawn * 255).round().to(torch.uint8))
            bar.advance(len(own) // GROUP)
    _drawn_file(config, number).with_suffix(".json").write_text(json.dumps(prompts))
    save_file({"images": torch.cat(images)}, _drawn_file(config, number))


def _drawn_file(config: PretrainConfig, number: int) -> Path:
    return config.work / f"drawn-{number}.safetensors"


def load_drawn(config: PretrainConfig) -> tuple[torch.Tensor, list[str]]:
    """What `draw` left: [N * GROUP, 3, 32, 32] uint8 pictures, and the N prompts."""
    files = [_drawn_file(config, number) for number in range(2)]
    prompts = [prompt for file in files for prompt in json.loads(file.with_suffix(".json").read_text())]
    return torch.cat([load_file(file)["images"] for file in files]), prompts
