"""Encoders small enough for a test: a folder of open_clip's kind, features by hand, the axis in float64."""

import json
from dataclasses import dataclass, field

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.anchors import Anchors

U = 2.0**-24  # float32 unit roundoff
EMBED = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)  # not open_clip's defaults: they must be read from the folder
TEXTS = ("a safe picture", "a hazard", "two red squares and a circle", "harmless")


def tiny_config(vocabulary: int) -> dict:
    """Model config of a two-layer CLIP for 32 x 32 images."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": vocabulary, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text}


def tiny_model(config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        # open_clip starts embeddings at std 0.01..0.02, which would make all features nearly alike.
        model.token_embedding.weight.normal_(std=0.5)
        model.visual.conv1.weight.normal_(std=0.2)
    return model.eval()


def write_folder(folder, preprocess: dict | None = None, tokenizer_kwargs: dict | None = None):
    """A local-dir encoder with a character tokenizer. Returns the model."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    config = tiny_config(len(tokens))
    model = tiny_model(config)
    config["text_cfg"] |= {"hf_tokenizer_name": "tiny"}
    if tokenizer_kwargs:
        config["text_cfg"]["tokenizer_kwargs"] = tokenizer_kwargs
    preprocess = {"mean": MEAN, "std": STD} | (preprocess or {})
    config = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reference_direction(encoder, anchors: Anchors) -> tuple[np.ndarray, float]:
    """v_safe in float64, and the length of the difference before it is normalised."""
    difference = -np.mean([encoder.encode_text([t])[0].double().numpy() for t in anchors.unsafe], axis=0)
    if anchors.safe:
        difference = difference + np.mean([encoder.encode_text([t])[0].double().numpy() for t in anchors.safe], axis=0)
    return unit(difference), float(np.linalg.norm(difference))


@dataclass
class TableEncoder:
    """Vectors by hand: a text's from a table, an image's from its first pixel. Remembers the texts it encoded."""

    table: dict[str, tuple[float, ...]]
    encoded: list[str] = field(default_factory=list)

    def encode_text(self, texts):
        self.encoded += texts
        return torch.tensor([self.table[text] for text in texts])

    def encode_image(self, images, batch):
        return F.normalize(images[:, :, 0, 0], dim=-1)


AXIS = Anchors(safe=("safe",), unsafe=("unsafe",))
AXIS_TABLE = {"safe": (1.0, 0.0, 0.0), "unsafe": (-1.0, 0.0, 0.0)}
