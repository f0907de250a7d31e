"""The protocol of reward servers: requests that are right and wrong, and the bytes in its documentation."""

import re

import pytest
import torch

from fastgrpo.rewards.service import wire
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support import ROOT
from support.service_requests import IMAGES, WRONG, body


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_is_wrong(name: str) -> None:
    kind, sent, says = WRONG[name]
    with pytest.raises(wire.WrongRequest, match=re.escape(says)):
        wire.decode(kind, sent, 4_000_000)


def test_a_request_that_is_right() -> None:
    request = wire.decode(wire.JSON, body())
    assert request.prompts == (Prompt("a cat", POSITIVE), Prompt("blood", NEGATIVE, "violence", 3))
    assert torch.equal(request.images, wire.pixels(IMAGES[:2]))


def test_the_documentation_shows_the_very_bytes() -> None:
    page = (ROOT / "docs" / "reward-service.md").read_text(encoding="utf-8")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2).contiguous()
    (sent,) = re.findall(r'^\{"protocol": 1, .*"images".*$', page, flags=re.MULTILINE)
    (length,) = re.findall(r"^Content-Length: (\d+)$", page, flags=re.MULTILINE)
    assert len(sent) == int(length)
    size, header, spaces, tensor = re.findall(
        r"^((?:[0-9a-f]{2} ){8}).*\n(\{.*\}) .*spaces up to (\d+) bytes.*\n((?:[0-9a-f]{2} ){12})",
        page,
        flags=re.MULTILINE,
    )[0]
    raw = bytes.fromhex(size) + header.encode().ljust(int(spaces)) + bytes.fromhex(tensor)
    for kind, shown in ((wire.JSON, sent.encode()), (wire.SAFETENSORS, raw)):
        request = wire.decode(kind, shown)
        assert request.scores == ("ocr",)
        assert request.prompts == (Prompt("a red square", POSITIVE, id=7),)
        assert torch.equal(request.images, red)
    assert wire.read_hello(re.findall(r'^\{"protocol": 1, "scores": .*\]\}$', page, flags=re.MULTILINE)[0].encode())
    (answer,) = re.findall(r'^\{"scores": .*$', page, flags=re.MULTILINE)
    assert wire.read_scores(answer.encode(), ["ocr"], 1) == {"ocr": [0.25]}
    (error,) = re.findall(r'^\{"error": .*$', page, flags=re.MULTILINE)
    assert wire.read_error(error.encode()).startswith(": ")
