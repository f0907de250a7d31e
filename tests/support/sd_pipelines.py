"""Small pipelines with the structure of SD 1.5 and SD 2.1, with random weights, in every form they are published in.

All that the real ones have is there, only narrow: four levels, attention at three of them, two layers a level, and a
tokenizer with the first of CLIP's merges. `sd1` has heads of equal number, convolutions around its transformers,
epsilon prediction and a PNDM scheduler; `sd2` heads of equal width, linear layers, v-prediction, DDIM and a text
encoder of 23 layers with gelu.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastgrpo.models.single_file import write_single_file
from fastgrpo.models.tokenizer import build_tokenizer

KINDS = ("sd1", "sd2")
VOCABULARY = 1500
REVISION = "0123456789abcdef0123456789abcdef01234567"

_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_unet(kind: str, **changes) -> UNet2DConditionModel:
    """2.4 M parameters on latents 4 x 8 x 8; `changes` to its config."""
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
    }
    if kind == "sd1":
        config |= {"attention_head_dim": 8, "cross_attention_dim": 32}
    else:
        config |= {"attention_head_dim": (2, 2, 4, 4), "cross_attention_dim": 48, "use_linear_projection": True}
    return UNet2DConditionModel(**config | changes)


def build_pipeline(kind: str, seed: int = 0) -> StableDiffusionPipeline:
    """kind: `sd1` or `sd2`. Latents 4 x 8 x 8, images 64 x 64, text 77 tokens of width 32 or 48; float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(kind)
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(_text_config(kind))
        for module in (unet, vae, text_encoder):
            _disturb(module)
    if kind == "sd1":
        scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True)
    else:
        scheduler = DDIMScheduler(**_BETAS, clip_sample=False, prediction_type="v_prediction")
    return StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=small_tokenizer("<|endoftext|>" if kind == "sd1" else "!"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small_tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's bytes and its first merges, VOCABULARY tokens in all: its whole vocabulary takes a second to read."""
    model = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    ordered = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*ordered[: VOCABULARY - 2], "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge) for merge in model["merges"][: VOCABULARY - 2 - 512]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad)


def save_folder(pipeline: StableDiffusionPipeline, folder: Path, variant: str = "") -> Path:
    """diffusers' layout, with the text encoder's tensors named as in the files on the hub."""
    pipeline.save_pretrained(folder, variant=variant or None)
    file = folder / "text_encoder" / (f"model.{variant}.safetensors" if variant else "model.safetensors")
    state = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, file, metadata={"format": "pt"})
    return folder


def save_single_file(pipeline: StableDiffusionPipeline, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The original layout: a .safetensors file, or for another suffix a torch file with a `state_dict`."""
    plain = path.with_suffix(".safetensors")
    write_single_file(plain, pipeline.unet, pipeline.vae, pipeline.text_encoder, dtype)
    if path != plain:
        torch.save({"global_step": 7, "state_dict": load_file(plain)}, path)
        plain.unlink()
    return path


def save_in_hub_cache(folder: Path, cache: Path, repository: str = "someone/small", revision: str = REVISION) -> str:
    """What the hub's client leaves in its cache after downloading `folder` as `repository`, whose id is returned."""
    root = cache / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    (root / "blobs").mkdir(exist_ok=True)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = root / "snapshots" / revision / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository


def _text_config(kind: str) -> CLIPTextConfig:
    shared = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 77,
        "num_attention_heads": 4,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
    }
    if kind == "sd1":
        return CLIPTextConfig(
            **shared,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            hidden_act="quick_gelu",
            pad_token_id=VOCABULARY - 1,
        )
    return CLIPTextConfig(
        **shared, hidden_size=48, intermediate_size=96, num_hidden_layers=23, hidden_act="gelu", pad_token_id=0
    )


def _disturb(module: torch.nn.Module) -> None:
    """Makes every tensor different from every other: fresh norms, all ones and zeros, could be exchanged unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
