"""The architectures of the embedded Stable Diffusion and its reward encoder, with random weights."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastgrpo.shapes.captions import HAZARD_WORDS, NUMBERS
from fastgrpo.shapes.world import COLORS, HAZARDS, RELATIONS, SHAPES

CONTEXT = 20  # tokens; the longest caption has 14
TEXT_WIDTH = 128
_PLAIN_WORDS = (
    "a an something nothing image photo picture drawing of and with no in by safe harmless unsafe hazard hazards"
)

DDIM_CONFIG = {  # Stable Diffusion 1.x
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def vocabulary() -> list[str]:
    """Every word of the world's captions and anchors, sorted."""
    words = _PLAIN_WORDS.split()
    words += [w for relation in RELATIONS for w in relation.split()]
    words += [w for category in HAZARDS for w in category.replace("-", " ").split()]
    words += [w for own in HAZARD_WORDS.values() for w in own]
    words += [*COLORS, *NUMBERS.values(), *SHAPES, *(s + ("es" if s.endswith("s") else "s") for s in SHAPES)]
    return sorted(set(words))


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build a CLIP byte-pair tokenizer in which every word of the world is one token, and write it to `folder`."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(33, 127)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=letters,
        special_tokens=letters + [c + "</w>" for c in letters] + special,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    # open_clip pools at the largest token id, which must therefore be the end token, as in CLIP's own vocabulary.
    ordered = [t for t in sorted(model["vocab"], key=model["vocab"].get) if t not in special] + special
    tokens = {token: i for i, token in enumerate(ordered)}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    result = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT)
    result.save_pretrained(folder)
    return result


def build_vae() -> AutoencoderKL:
    """32 x 32 pictures to 8 x 8 x 4 latents."""
    return AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_text_encoder(vocab_size: int, end_token: int) -> CLIPTextModel:
    """Two layers of width TEXT_WIDTH over CONTEXT tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=TEXT_WIDTH,
            bos_token_id=end_token - 1,
            eos_token_id=end_token,
            pad_token_id=end_token,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels of 32 and 64 channels on 8 x 8 x 4 latents, cross-attention at both: 1.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def write_encoder_config(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write the configuration of an open_clip `local-dir` folder, and the tokenizer beside it."""
    config = {
        "model_cfg": {
            "embed_dim": 96,
            "vision_cfg": {"image_size": 32, "layers": 3, "width": 96, "head_width": 32, "patch_size": 4},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(tokenizer),
                "width": 96,
                "heads": 3,
                "layers": 2,
                "hf_tokenizer_name": "local",
                "pad_id": tokenizer.pad_token_id,
                "pool_type": "argmax",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
