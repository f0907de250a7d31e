"""Serve rewards over HTTP, for trainings elsewhere: the terms of fastgrpo, or a function of your own.

    pip install "fastgrpo[serve]"
    python examples/reward_server.py clip --encoder shapes
    python examples/reward_server.py judge.py:score --port 8001 --token-env REWARD_TOKEN

and in the training

    python -m fastgrpo.train shapes --reward.terms steering service:clip --reward.service.urls http://127.0.0.1:8000

docs/reward-service.md has the protocol. Nothing that arrives is executed: JSON, PNG files and safetensors.
"""

import hmac
import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from fastgrpo.evaluation.detectors.registry import load_detector
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.reward import WeightedReward
from fastgrpo.rewards.service import wire
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.paths import PathText, PathTexts
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.console import run_command
from fastgrpo.system.devices import choose_device
from fastgrpo.system.errors import ConfigError, require_between

FORGOTTEN = 2**30
"""Bytes of a request that is too large which are still read."""


@dataclass(frozen=True)
class Options:
    """Serve terms of the reward over HTTP."""

    terms: tyro.conf.Positional[PathTexts]
    """What to serve, as in reward.terms: clip, hpsv2, pickscore, aesthetic, safety:DETECTOR, FILE.py:FUNCTION ..."""
    encoder: PathText = ""
    """As reward.encoder, of steering and clip; empty: that of --config."""
    config: PathText = ""
    """A preset's name or a FILE.toml of a training, whose [reward] says what terms need: encoders, files of weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    batch: int = 64
    """Images encoded at once."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for other machines, which then need a token."""
    port: int = 8000
    """Port to listen at."""
    token_env: str = ""
    """Name of the environment variable that holds the token that clients must show; empty: none."""
    megabytes: int = 256
    """Most that a request may have, and its images once they are decoded."""


class NotServed(Exception):
    """A request that gets no scores. status: HTTP's."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Scorer:
    """Scores requests, one at a time: encoders and functions need not be safe to call from several threads."""

    def __init__(self, reward: WeightedReward, device: torch.device) -> None:
        self._reward, self._device, self._lock = reward, device, threading.Lock()
        self.names = tuple(term.label for term in reward.terms)

    def __call__(self, request: wire.Request) -> dict[str, list[float | None]]:
        """The numbers of the scores that are asked for; None where there is none. Raises NotServed."""
        if unknown := [name for name in request.scores if name not in self.names]:
            raise NotServed(400, f"there is no score {unknown[0]!r}; there are {', '.join(self.names)}")
        with self._lock:
            images = request.images.to(self._device).float() / 255
            try:
                # One prompt for each image; what is not finite becomes NaN in the values.
                raw = self._reward.score(images, request.prompts, 1, broken=[])
            except BrokenReward as error:
                raise NotServed(500, error.message) from error
            except torch.OutOfMemoryError as error:
                raise NotServed(500, "the GPU's memory is full: lower --batch, or the client's batch") from error
        return {
            name: [v if math.isfinite(v) else None for v in raw[name].flatten().tolist()] for name in request.scores
        }


def make_app(scorer: Scorer, token: str, most: int) -> FastAPI:
    """The application. token: what clients must show; "" is none. most: bytes of a request."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def hello(request: Request) -> Response:
        return await answered(request, lambda: {"protocol": wire.PROTOCOL, "scores": list(scorer.names)})

    @app.post("/score")
    async def score(request: Request) -> Response:
        def scores(kind: str, body: bytes) -> dict:
            return {"scores": scorer(wire.decode(kind, body, most))}

        async def work() -> dict:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            body = await bounded(request, most)
            return await run_in_threadpool(scores, kind, body)

        return await answered(request, work)

    async def answered(request: Request, work) -> Response:
        try:
            authorize(request, token)
            found = work()
            found = found if isinstance(found, dict) else await found
            return answer(200, found)
        except wire.WrongRequest as error:
            return answer(400, {"error": str(error)})
        except NotServed as error:
            return answer(error.status, {"error": str(error)})

    return app


def authorize(request: Request, token: str) -> None:
    shown = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        raise NotServed(401, "a token is needed, as Authorization: Bearer TOKEN")


async def bounded(request: Request, most: int) -> bytes:
    """The body of a request, of which no more than `most` bytes are ever held.

    What is too large is read and forgotten, within limits: a client that still writes does not see an answer.
    """
    told = request.headers.get("content-length", "")
    size, body = 0, bytearray()
    if not told.isdigit() or int(told) <= FORGOTTEN:
        async for piece in request.stream():
            size += len(piece)
            if size <= most:
                body += piece
            elif size > FORGOTTEN:
                break
            else:
                body.clear()
        if size <= most:
            return bytes(body)
    raise NotServed(413, f"the request has more than {most} bytes; send fewer images at once")


def answer(status: int, told: dict) -> Response:
    return Response(json.dumps(told, allow_nan=False), status, media_type="application/json")


def serve(options: Options) -> None:
    """Load what is to be served, then serve until a signal comes. Raises ConfigError."""
    require_between(0, 65535, "--port", options.port)
    require_between(1, 2**16, "--megabytes", options.megabytes)
    token = os.environ.get(options.token_env, "") if options.token_env else ""
    if options.token_env and not token:
        raise ConfigError("--token-env names an environment variable that is not set; accepted is one with the token.")
    config = load_toml(find_preset(options.config)).reward if options.config else RewardConfig()
    encoder = options.encoder or config.encoder
    config = replace(config, terms=options.terms, encoder=encoder, batch=options.batch)
    device = choose_device(options.device, "--device")
    reward = load_reward(config, device, load_detector)
    app = make_app(Scorer(reward, device), token, options.megabytes * 10**6)
    uvicorn.run(app, host=options.host, port=options.port, log_level="info", access_log=False)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: serve(parse_flags(Options, argv, "python examples/reward_server.py")), "")


if __name__ == "__main__":
    sys.exit(main())
