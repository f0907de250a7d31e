"""The bytes of the reward service's protocol, as docs/reward-service.md has them: JSON and tensors, never a pickle.

GET /        -> {"protocol": 1, "scores": [NAME, ...]}
POST /score  <- images, prompts and the names of scores, in one of two formats (FORMATS)
             -> {"scores": {NAME: [one number for each image]}}
any other status than 200 -> {"error": SENTENCE}
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastgrpo.system.errors import quoted
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

PROTOCOL = 1
JSON, SAFETENSORS = "application/json", "application/x-safetensors"
FORMATS = {"png": JSON, "raw": SAFETENSORS}
"""Value of reward.service.format -> content type of the request."""

MOST_BYTES = 2**28
"""Of a request's body, and of its images once they are decoded."""
_FASTEST = 1  # of zlib's levels: a local network is faster than the others
_IMAGES = "images"


class WrongAnswer(Exception):
    """A server's answer is not what the protocol has. The message begins with a verb: the server's url precedes it."""


class WrongRequest(ValueError):
    """A request is not what the protocol has; the message is a sentence for its sender."""


@dataclass(frozen=True)
class Request:
    """What is to be scored. images: [N, 3, h, w] uint8 on the CPU. prompts: the N they were drawn for."""

    scores: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


def pixels(images: Tensor) -> Tensor:
    """[N, 3, h, w] float in [0, 1] on any device -> uint8 in the host's memory, rounded to the nearest."""
    return (images * 255).round().clamp(0, 255).byte().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def encode(request: Request, form: str) -> bytes:
    """The body of a request. form: one of FORMATS."""
    told: dict[str, Any] = {
        "protocol": PROTOCOL,
        "scores": list(request.scores),
        "prompts": [asdict(prompt) for prompt in request.prompts],
    }
    if form == "png":
        return json.dumps(told | {_IMAGES: [base64.b64encode(_png(each)).decode() for each in request.images]}).encode()
    return save({_IMAGES: request.images.contiguous()}, metadata={key: json.dumps(each) for key, each in told.items()})


def decode(kind: str, body: bytes, most: int = MOST_BYTES) -> Request:
    """The request of a body. kind: its content type. most: bytes that its images may have once they are decoded.

    Raises WrongRequest, whatever is sent, and runs nothing of it.
    """
    if kind == JSON:
        told = _parsed(body)
        prompts = _prompts(told.get("prompts"))
        return _request(told, prompts, _from_png(told.get(_IMAGES), len(prompts), most))
    if kind == SAFETENSORS:
        told = {key: _json(text) for key, text in _metadata(body).items()}
        return _request(told, _prompts(told.get("prompts")), _from_tensors(body))
    raise WrongRequest(f"the content type is {quoted(kind)}; accepted are {JSON} and {SAFETENSORS}")


def _request(told: dict[str, Any], prompts: tuple[Prompt, ...], images: Tensor) -> Request:
    if told.get("protocol") != PROTOCOL:
        raise WrongRequest(f"protocol is {_shown(told.get('protocol'))}; accepted is {PROTOCOL}")
    scores = told.get("scores")
    if not isinstance(scores, list) or not scores or not all(isinstance(name, str) for name in scores):
        raise WrongRequest(f"scores is {_shown(scores)}; accepted is a list of names")
    if len(images) != len(prompts):
        raise WrongRequest(f"there are {len(images)} images and {len(prompts)} prompts; accepted is one for each image")
    return Request(tuple(scores), prompts, images)


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG", compress_level=_FASTEST)
    return file.getvalue()


def _from_png(texts: object, count: int, most: int) -> Tensor:
    """[N, 3, h, w] uint8. Sizes are read before pixels: a small file may hold a picture that fills the memory."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise WrongRequest(f"{_IMAGES} is {_shown(texts)}; accepted is a list of PNG files in base64")
    if len(texts) != count:
        raise WrongRequest(f"there are {len(texts)} images and {count} prompts; accepted is one for each image")
    images: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    for number, text in enumerate(texts):
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
                size = size or image.size
                if image.size != size:
                    raise WrongRequest(f"image {number} is {image.size}, the first {size}; accepted is one size")
                if (total := 3 * count * math.prod(size)) > most:
                    raise WrongRequest(f"the images have {total} bytes; accepted are {most}")
                images.append(np.array(image.convert("RGB")))
        except (OSError, binascii.Error, SyntaxError, Image.DecompressionBombError) as error:
            raise WrongRequest(f"image {number} is no PNG file in base64: {quoted(str(error))}") from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _metadata(body: bytes) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors, which `load` does not return."""
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise WrongRequest("the body is no safetensors file: it ends within its header")
    told = _parsed(body[8 : 8 + size]).get("__metadata__")
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise WrongRequest(f"the metadata is {_shown(told)}; accepted are texts by name")
    return told


def _from_tensors(body: bytes) -> Tensor:
    try:
        images = load(body).get(_IMAGES)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WrongRequest(f"the body is no safetensors file: {quoted(str(error))}") from error
    if images is None or images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        found = "not there" if images is None else f"{list(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
        raise WrongRequest(f"the tensor {_IMAGES} is {found}; accepted is [N, 3, h, w] of uint8")
    return images


def _prompts(told: object) -> tuple[Prompt, ...]:
    if not isinstance(told, list) or not told:
        raise WrongRequest(f"prompts is {_shown(told)}; accepted is a list of prompts, one for each image")
    return tuple(_prompt(number, each) for number, each in enumerate(told))


def _prompt(number: int, told: object) -> Prompt:
    kinds = {"text": str, "label": str, "category": str, "id": int}
    if not isinstance(told, dict) or "text" not in told:
        raise WrongRequest(f"prompt {number} is {_shown(told)}; accepted is an object with a text")
    values = {"label": POSITIVE} | {key: told[key] for key in kinds if key in told}  # later versions may tell more
    for key, value in values.items():
        if type(value) is not kinds[key]:
            accepted = "a text" if kinds[key] is str else "a whole number"
            raise WrongRequest(f"prompt {number} has the {key} {_shown(value)}; accepted is {accepted}")
    if values["label"] not in (POSITIVE, NEGATIVE):
        raise WrongRequest(f"prompt {number} has the label {_shown(values['label'])}; accepted: {POSITIVE}, {NEGATIVE}")
    return Prompt(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def read_hello(body: bytes) -> tuple[str, ...]:
    """The names of a server's scores. Raises WrongAnswer, also for another version of the protocol."""
    told = _answered(body)
    if "protocol" not in told:
        raise WrongAnswer(f"does not say which protocol it speaks: {_shown(told)}")
    if told["protocol"] != PROTOCOL:
        raise WrongAnswer(f"speaks version {_shown(told['protocol'])} of the protocol; accepted is {PROTOCOL}")
    scores = told.get("scores")
    if not isinstance(scores, list) or not all(isinstance(name, str) for name in scores):
        raise WrongAnswer(f"names its scores {_shown(scores)}, where a list of names is needed")
    return tuple(scores)


def read_scores(body: bytes, names: Sequence[str], count: int) -> dict[str, list[float]]:
    """The numbers of every score, `count` of each; NaN where a server has none to give, which it writes null or NaN.

    Raises WrongAnswer for anything else.
    """
    told = _answered(body).get("scores")
    if not isinstance(told, dict):
        raise WrongAnswer(f"gave the scores {_shown(told)}, where an object with {', '.join(names)} is needed")
    return {name: _numbers(name, told, count) for name in names}


def most_bytes_of_scores(names: Sequence[str], count: int) -> int:
    """How long an answer may be: a double has 24 characters at most, and servers may indent."""
    return 2**16 + 64 * len(names) * count


def _numbers(name: str, told: dict[str, Any], count: int) -> list[float]:
    if name not in told:
        others = f", but {quoted(', '.join(told))}" if told else ""
        raise WrongAnswer(f"gave no score {name!r}{others}")
    values = told[name]
    if not isinstance(values, list) or len(values) != count:
        what = f"{len(values)} numbers" if isinstance(values, list) else _shown(values)
        raise WrongAnswer(f"gave {what} as the score {name!r}, where a list of {count} is needed")
    numbers = []
    for value in values:
        if value is not None and type(value) not in (int, float):
            raise WrongAnswer(f"gave {_shown(value)} among the numbers of the score {name!r}")
        try:
            numbers.append(math.nan if value is None else float(value))
        except OverflowError:  # of an int
            numbers.append(math.inf)
    return numbers


def _answered(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WrongAnswer(f"answered what is no JSON: {quoted(body[:200].decode(errors='replace'))}") from error
    if not isinstance(told, dict):
        raise WrongAnswer(f"answered {_shown(told)}, where an object is needed")
    return told


def read_error(body: bytes) -> str:
    """The sentence of an answer that says what is wrong, quoted after a colon; nothing where it has none."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    sentence = told.get("error") if isinstance(told, dict) else None
    return f": {quoted(sentence, 200)}" if isinstance(sentence, str) and sentence else ""


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WrongRequest("the body is no JSON") from error
    if not isinstance(told, dict):
        raise WrongRequest(f"the body is {_shown(told)}; accepted is an object")
    return told


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongRequest(f"the metadata has {quoted(text)}, which is no JSON") from error


def _shown(value: object) -> str:
    """A value of somebody else's, for a sentence."""
    return quoted(value) if isinstance(value, str) else quoted(json.dumps(value))[1:-1]
