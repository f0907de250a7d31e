"""Digests of what a run learns from, kept in checkpoints: nothing else tells a resumed run that one has changed."""

import hashlib
import importlib.util
import json
import string
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.assembly import Parts
from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.files import file_sha256
from fastgrpo.types import NEGATIVE, POSITIVE

_PROBES = ("", string.printable, "Two red dogs, above a tall house!", "naïve 漢字 🦉")  # what tells tokenizers apart


def input_digests(config: TrainConfig, training: Parts) -> dict[str, str]:
    """From the name of each input to the digest of its content, wherever it was loaded from.

    training: as they were loaded, before a checkpoint is. Prompts count by their texts, the user's reward functions by
    their files (not by what these import), models by `weights_digest`, the tokenizer by what it makes of a few texts.
    """
    policy, terms = training.policy, parse_terms(config.reward.terms)
    texts = {label: [p.text for p in training.prompts if p.label == label] for label in (POSITIVE, NEGATIVE)}
    tokenizer = policy.tokenizer
    tokens = [tokenizer(list(_PROBES), verbose=False).input_ids, tokenizer.model_max_length, tokenizer.pad_token_id]
    scheduler = {k: v for k, v in policy.scheduler_config.items() if k == "_class_name" or not k.startswith("_")}
    digests = {f"prompts.{label}": _digest(each) for label, each in texts.items()}
    digests |= {"the tokenizer of model.path": _digest(tokens), "the scheduler of model.path": _digest(scheduler)}
    for term in terms:
        if file := _source(term.place):
            digests[f"{file.name} of reward.terms"] = file_sha256(file)
    if training.reward.steering:
        anchors = load_anchors(config.reward.anchors)
        digests["reward.anchors"] = _digest([anchors.safe, anchors.unsafe])
    digests |= training.reward.hashes
    models = {f"the encoder of {field}": model for field, model in training.reward.models.items()}
    precise = f"of model.path, in {str(policy.dtype).removeprefix('torch.')}"  # they are held in it, rounded
    models |= {f"the VAE {precise}": policy.vae, f"the text encoder {precise}": policy.text_encoder}
    if config.model.lora_rank or config.kl_term:  # otherwise it is in the checkpoint, all of it
        models[f"the UNet {precise}"] = policy.unet
    return digests | {name: weights_digest(model) for name, model in models.items()}


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the name, dtype, shape and CRC-32 of every tensor of a module, adapters left out.

    SHA-256 of all bytes would be too slow for gigabytes. A change of up to 32 neighbouring bits always shows, of others
    all but one in four billion: enough to notice a mistaken model, not one that was made to deceive.
    """
    return _digest(
        [
            [name, str(tensor.dtype), list(tensor.shape), _crc(tensor)]
            for name, tensor in sorted(module.state_dict().items())
            if ".lora_" not in name
        ]
    )


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of inputs that have changed. What only one side has, such as weights in another precision, is left out."""
    return [name for name, digest in now.items() if before.get(name, digest) != digest]


def _source(place: str) -> Path | None:
    """The file of a term that is a function of the user's own, or None where there is none."""
    if place.endswith(".py"):
        return Path(place).expanduser()
    spec = importlib.util.find_spec(place) if place else None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _crc(tensor: Tensor) -> int:
    # Bytes, since NumPy has no bfloat16; flattened first, since a scalar cannot be seen as bytes.
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
