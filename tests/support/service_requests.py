"""What tests ask servers of rewards: requests that are right and wrong, and settings."""

import json

import torch
from safetensors.torch import save

from fastgrpo.rewards.service import wire
from fastgrpo.settings.schema import RewardConfig, ServiceConfig
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.reward_service import Fake
from support.rewards import GROUP, PROMPTS, pictures

IMAGES = pictures(len(PROMPTS) * GROUP)


def config(*servers: Fake, terms: tuple[str, ...] = ("service:blue",), **settings) -> RewardConfig:
    urls = tuple(server.url for server in servers)
    given = {"batch": 5, "timeout": 5.0, "retries": 2, "token": "REWARD_TOKEN"} | settings
    return RewardConfig(terms=terms, service=ServiceConfig(urls=urls, **given))


def means(channel: int) -> torch.Tensor:
    """[P, G] float32: the mean of a channel's bytes, whose sum float64 has exactly."""
    return (IMAGES[:, channel].double() * 255).round().mean(dim=(1, 2)).float().view(len(PROMPTS), GROUP)


def body(**changes) -> bytes:
    prompts = [{"text": "a cat"}, {"text": "blood", "label": NEGATIVE, "category": "violence", "id": 3, "later": None}]
    request = wire.Request(("blue",), (Prompt("", POSITIVE),) * 2, wire.pixels(IMAGES[:2]))
    return json.dumps(json.loads(wire.encode(request, "png")) | {"prompts": prompts} | changes).encode()


PNG = json.loads(body())["images"][0]
LARGE = wire.Request(("blue",), (Prompt("", POSITIVE),), torch.zeros(1, 3, 1200, 1200, dtype=torch.uint8))
TENSORS = wire.encode(wire.Request(("blue",), (Prompt("a", POSITIVE),), wire.pixels(IMAGES[:1])), "raw")
WRONG = {
    "no JSON": (wire.JSON, b"\x80\x04K\x01.", "no JSON"),
    "nested": (wire.JSON, b"[" * 100_000, "no JSON"),
    "a list": (wire.JSON, b"[]", "accepted is an object"),
    "protocol": (wire.JSON, body(protocol=2), "protocol is 2; accepted is 1"),
    "scores": (wire.JSON, body(scores="blue"), "scores is 'blue'; accepted is a list of names"),
    "no prompts": (wire.JSON, body(prompts=[]), "prompts is []"),
    "prompt": (wire.JSON, body(prompts=[{"text": "a"}, {"text": 3}]), "prompt 1 has the text 3; accepted is a text"),
    "label": (wire.JSON, body(prompts=[{"text": "a", "label": "bad"}] * 2), "prompt 0 has the label 'bad'"),
    "count": (wire.JSON, body(images=[PNG]), "there are 1 images and 2 prompts"),
    "no base64": (wire.JSON, body(images=["%%%", PNG]), "image 0 is no PNG file in base64"),
    "no PNG": (wire.JSON, body(images=["R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs=", PNG]), "image 0 is no PNG"),
    "bomb": (wire.JSON, wire.encode(LARGE, "png"), "the images have 4320000 bytes; accepted are 4000000"),
    "pickle": ("application/octet-stream", b"\x80\x04K\x01.", "accepted are application/json and application/x-safe"),
    "tensors cut": (wire.SAFETENSORS, TENSORS[:20], "ends within its header"),
    "no tensors": (wire.SAFETENSORS, TENSORS[:-5], "no safetensors file"),
    "no metadata": (wire.SAFETENSORS, save({"images": torch.zeros(1)}), "the metadata is null"),
    "float": (
        wire.SAFETENSORS,
        save({"images": torch.zeros(1, 3, 2, 2)}, {"protocol": "1", "scores": '["a"]', "prompts": '[{"text": "a"}]'}),
        "the tensor images is [1, 3, 2, 2] of float32; accepted is [N, 3, h, w] of uint8",
    ),
}
