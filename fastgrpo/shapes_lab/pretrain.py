"""`python -m fastgrpo.shapes_lab.pretrain`: the embedded Stable Diffusion and its reward encoder, trained from nothing.

Four stages, each seeded and each writing its part of the output folder:

    vae        AutoencoderKL on clean pictures                            pipeline/vae
    encoder    open_clip model, contrastive, on clean captions            encoder/
    diffusion  UNet + CLIP text encoder on pictures that contradict their captions at stated rates
                                                                          pipeline/
    refine     the same on pictures that do so less often                 pipeline/

`--stage` runs one of them alone, so that `encoder` can run beside the others. The diffusion model learns from wrong
captions on purpose: as with the web's captions, it then draws a hazard for only some of the prompts that ask for one,
and gets only some compositions right, so that reinforcement learning has something to prefer.
"""

import copy
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fastgrpo.models.configs import Components
from fastgrpo.models.save import save_pipeline
from fastgrpo.shapes.captions import SceneRequest
from fastgrpo.shapes.verdicts import describes
from fastgrpo.shapes_lab import architectures
from fastgrpo.shapes_lab.drawings import (
    CaptionedPictures,
    CaptionNoise,
    alter,
    caption,
    degrade,
    paint_pictures,
    to_unit,
)
from fastgrpo.system.console import Console
from fastgrpo.system.output import steady_output

GENERIC_SAFE = (
    "a safe picture",
    "a harmless picture",
    "safe",
    "harmless",
    "a harmless picture with no hazard",
    "a safe drawing",
    "a picture with no hazard",
)
GENERIC_UNSAFE = (
    "an unsafe picture",
    "a picture of a hazard",
    "unsafe",
    "a hazard",
    "an unsafe picture of a hazard",
    "an unsafe drawing",
    "a drawing of a hazard",
)
_NOISE = CaptionNoise(hazard_absent=0.62, color=0.3, shape=0.12, count=0.25, place=0.4, stand_in=0)
_REFINE_NOISE = CaptionNoise(hazard_absent=0.55, color=0.15, shape=0.08, count=0.2, place=0.1, stand_in=1)


@dataclass(frozen=True)
class PretrainConfig:
    """Train the embedded Stable Diffusion and its reward encoder from nothing."""

    out: Path = Path("shapes-weights")
    """Folder to write: pipeline/ (diffusers) and encoder/ (open_clip local-dir)."""
    stage: Literal["all", "vae", "encoder", "diffusion", "refine"] = "all"
    """Which part to train; diffusion needs the vae's, refine needs both."""
    seed: int = 7
    """Seed of pictures, captions, weights and noise."""
    device: str = "cpu"
    """Torch device."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    pictures: int = 40_000
    """Pictures painted for each stage."""
    vae_steps: int = 2000
    """Optimizer steps of the autoencoder, at batch 32."""
    encoder_steps: int = 1800
    """Optimizer steps of the reward's encoder, at batch 128."""
    diffusion_steps: int = 2600
    """Optimizer steps of the UNet and text encoder, at batch 128."""
    noise: CaptionNoise = _NOISE
    """How often the diffusion model's pictures contradict their captions."""
    refine_steps: int = 1000
    """Further optimizer steps of the UNet and text encoder, at batch 128."""
    refine_noise: CaptionNoise = _REFINE_NOISE
    """The same rates while refining."""


@steady_output()
def main() -> None:
    """The command."""
    config = tyro.cli(PretrainConfig, description=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    stages = {"vae": train_vae, "encoder": train_encoder, "diffusion": train_diffusion, "refine": refine_diffusion}
    for name in stages if config.stage == "all" else [config.stage]:
        torch.manual_seed(config.seed)
        started = time.time()
        measured = stages[name](config)
        _record(config, name, time.time() - started, measured)


def train_vae(config: PretrainConfig) -> dict[str, float]:
    """L1 + L2 reconstruction with a faint KL; the scaling factor makes the latents' std 1."""
    images = to_unit(_paint(config, 1).images) * 2 - 1
    vae = architectures.build_vae().to(config.device, memory_format=torch.channels_last)
    optimizer = _Optimizer(vae, 2e-3, config.vae_steps)
    generator = torch.Generator().manual_seed(config.seed)
    for step in _steps("autoencoder", config.vae_steps):
        batch = images[torch.randint(len(images), (32,), generator=generator)].to(config.device)
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.step(loss)
        _say(step, f"loss {loss.item():.4f}")
    with torch.no_grad():
        held = images[:512].to(config.device)
        latents = vae.encode(held).latent_dist.mode()
        error = (vae.decode(latents).sample - held).square().mean().item() / 4
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(config.out / "pipeline/vae")
    return {"vae_psnr_db": -10 * np.log10(error)}


def train_encoder(config: PretrainConfig) -> dict[str, float]:
    """Contrastive training on clean captions, with altered ones as hard negatives. A true caption is no negative."""
    folder = config.out / "encoder"
    tokenizer = architectures.build_tokenizer(folder)
    architectures.write_encoder_config(folder, tokenizer)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).to(config.device).train()
    pictures = _paint(config, 2)
    rng, generator = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    optimizer = _Optimizer(model, 1e-3, config.encoder_steps, weight_decay=0.05)
    accuracy = 0.0
    for step in _steps("encoder", config.encoder_steps):
        index = rng.integers(len(pictures.requests), size=128)
        images = degrade(to_unit(pictures.images[index]), generator) * 2 - 1
        texts, true = _caption_batch(pictures, index, rng)
        ids = tokenizer(texts, padding="max_length", max_length=architectures.CONTEXT, return_tensors="pt").input_ids
        image, text, scale = model(images.to(config.device), ids.to(config.device))
        loss, correct = _contrastive_loss(scale * image @ text.T, true.to(config.device))
        accuracy = 0.98 * accuracy + 0.02 * correct
        optimizer.step(loss)
        _say(step, f"loss {loss.item():.3f}, accuracy {accuracy:.3f}")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return {"encoder_batch_accuracy": accuracy, "encoder_logit_scale": model.logit_scale.exp().item()}


def _caption_batch(
    pictures: CaptionedPictures, index: np.ndarray, rng: np.random.Generator
) -> tuple[list[str], Tensor]:
    """Captions of N indexed pictures, then an altered one for each, and which are true of which picture: [N, 2N]."""
    captions: list[tuple[str, SceneRequest | None]] = []  # a general one has no request
    for i in index:
        request = pictures.requests[i]
        if rng.random() < 0.2:
            captions.append((str(rng.choice(GENERIC_UNSAFE if request.hazard else GENERIC_SAFE)), None))
        else:
            captions.append((caption(request, rng), request))
    for i in index:
        altered = alter(pictures.requests[i], rng)
        captions.append((caption(altered, rng), altered))
    true = [
        [describes(scene, r) if r else (text in GENERIC_UNSAFE) == bool(scene.hazards) for text, r in captions]
        for scene in (pictures.scenes[i] for i in index)
    ]
    return [text for text, _ in captions], torch.tensor(true)


def _contrastive_loss(logits: Tensor, true: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy both ways over [N, 2N] logits without true pairs off the diagonal, and image-to-text accuracy."""
    count = len(logits)
    own = torch.eye(count, 2 * count, dtype=torch.bool, device=logits.device)
    masked = logits.masked_fill(true & ~own, -torch.inf)
    target = torch.arange(count, device=logits.device)
    loss = (F.cross_entropy(masked, target) + F.cross_entropy(masked[:, :count].T, target)) / 2
    return loss, (masked.argmax(1) == target).float().mean().item()


def train_diffusion(config: PretrainConfig) -> dict[str, float]:
    """UNet and text encoder from nothing, on the noisier captions."""
    tokenizer = architectures.build_tokenizer(config.out / "pipeline/tokenizer")
    unet = architectures.build_unet()
    text_encoder = architectures.build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    return _denoise(config, unet, text_encoder, tokenizer, config.noise, config.diffusion_steps, 2e-3, stream=3)


def refine_diffusion(config: PretrainConfig) -> dict[str, float]:
    """The same two, further, on less noisy captions: colours, counts and places become mediocre rather than absent."""
    folder = config.out / "pipeline"
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return _denoise(config, unet, text_encoder, tokenizer, config.refine_noise, config.refine_steps, 1.2e-3, stream=4)


def _denoise(
    config: PretrainConfig,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    caption_noise: CaptionNoise,
    steps: int,
    lr: float,
    stream: int,
) -> dict[str, float]:
    """Train UNet and text encoder to predict epsilon, with 12% of captions dropped, and save their running average."""
    vae = AutoencoderKL.from_pretrained(config.out / "pipeline/vae", dtype=torch.float32).to(config.device)
    pictures = _paint(config, stream, caption_noise)
    with torch.no_grad():
        chunks = (to_unit(chunk).to(config.device) * 2 - 1 for chunk in pictures.images.split(256))
        modes = torch.cat([vae.encode(chunk).latent_dist.mode().cpu() for chunk in chunks])
        latents = modes * vae.config.scaling_factor
    unet.to(config.device, memory_format=torch.channels_last)
    trained = nn.ModuleList([unet, text_encoder.to(config.device)]).train()
    average = copy.deepcopy(trained).requires_grad_(False)
    scheduler = DDPMScheduler(**{k: v for k, v in architectures.DDIM_CONFIG.items() if k != "set_alpha_to_one"})
    optimizer = _Optimizer(trained, lr, steps)
    rng, generator = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    running = 1.0
    for step in _steps("diffusion", steps):
        index = rng.integers(len(latents), size=128)
        texts = ["" if rng.random() < 0.12 else caption(pictures.requests[i], rng) for i in index]
        ids = tokenizer(texts, padding="max_length", max_length=architectures.CONTEXT, return_tensors="pt").input_ids
        clean = latents[index].to(config.device)
        noise = torch.randn(clean.shape, generator=generator).to(config.device)
        times = torch.randint(1000, (128,), generator=generator).to(config.device)
        embeds = text_encoder(ids.to(config.device)).last_hidden_state
        output = unet(scheduler.add_noise(clean, noise, times), times, embeds, return_dict=False)[0]
        loss = F.mse_loss(output, noise)
        optimizer.step(loss)
        with torch.no_grad():
            decay = min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        running = 0.99 * running + 0.01 * loss.item()
        _say(step, f"loss {running:.4f}")
    scheduler = json.loads(DDIMScheduler(**architectures.DDIM_CONFIG).to_json_string())
    save_pipeline(config.out / "pipeline", Components(average[0], vae, average[1], tokenizer, scheduler), torch.float16)
    return {"diffusion_loss": running}


def _paint(config: PretrainConfig, stream: int, noise: CaptionNoise | None = None) -> CaptionedPictures:
    """The pictures of a stage. stream: the stage's number, so that each has pictures of its own."""
    with Console().bar("pictures", config.pictures) as bar:
        return paint_pictures(config.pictures, config.seed * 100 + stream, noise, bar.advance)


class _Optimizer:
    """AdamW under a one-cycle schedule, with gradients clipped to a norm of 1."""

    def __init__(self, module: nn.Module, lr: float, steps: int, weight_decay: float = 1e-3):
        self._parameters = list(module.parameters())
        self._adam = torch.optim.AdamW(self._parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._adam, lr, total_steps=steps + 1, pct_start=0.04)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._schedule.step()


def _steps(what: str, count: int) -> Iterator[int]:
    with Console().bar(what, count) as bar:
        for step in range(count):
            yield step
            bar.advance(1)


def _say(step: int, text: str) -> None:
    if step % 100 == 99:
        print(f"step {step + 1}: {text}", flush=True)


def _record(config: PretrainConfig, stage: str, seconds: float, measured: dict[str, float]) -> None:
    """Keep how a stage was trained, and how well it went, in pretrain.json."""
    path = config.out / "pretrain.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[stage] = {
        "command": "python -m fastgrpo.shapes_lab.pretrain",
        "settings": {name: value for name, value in asdict(config).items() if name not in ("out", "device")},
        "minutes": round(seconds / 60, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "measured": {name: round(float(value), 4) for name, value in measured.items()},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{stage}: {record[stage]['measured']}", file=sys.stderr)


if __name__ == "__main__":
    main()
